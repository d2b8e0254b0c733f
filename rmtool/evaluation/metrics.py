"""Metrics of preference pairs as sums and counts, independent of how the pairs are divided into batches and ranks.

In: the rewards and losses of pairs. Out: `PairSums`, which add up, and the train/rm and eval/rm metrics.
Sums are float64 and are divided last: a mean over batches is never averaged.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch

from rmtool.dist import DistInfo

TRAIN_PREFIX, EVAL_PREFIX = "train/rm", "eval/rm"
# `train/rm/loss` is the recipe's loss (hinge, margins, label smoothing, centering, weights); `eval/rm/loss` is plain
# Bradley-Terry whatever the recipe, so that runs can be compared.
METRICS = ("accuracy", "loss", "chosen_rewards", "rejected_rewards", "reward_margin")


@dataclass(frozen=True)
class PairSums:
    """Sums over `pairs` pairs: of the caller's loss, of rewards, and of outcomes.

    correct: pairs with r_chosen > r_rejected
    ties:    pairs with equal rewards, which are not correct
    loss:    the loss that the caller passed: the recipe's in training, plain Bradley-Terry in evaluation
    """

    pairs: float = 0.0
    correct: float = 0.0
    ties: float = 0.0
    loss: float = 0.0
    chosen: float = 0.0
    rejected: float = 0.0

    @classmethod
    def of(cls, chosen: torch.Tensor, rejected: torch.Tensor, losses: torch.Tensor) -> PairSums:
        """Sum the rewards and losses of pairs, each float[B]."""
        return cls(*sum_pairs(chosen, rejected, losses).tolist())

    @classmethod
    def reduce(cls, sums: torch.Tensor, dist: DistInfo) -> PairSums:
        """Sum what `sum_pairs` returned over all ranks, which must all call this."""
        return cls(*dist.sum(sums).tolist())

    def __add__(self, other: PairSums) -> PairSums:
        return PairSums(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def report(self, prefix: str) -> dict[str, float]:
        """Return `METRICS` with their prefix; there must be at least one pair."""
        assert self.pairs > 0
        sums = (self.correct, self.loss, self.chosen, self.rejected, self.chosen - self.rejected)
        return {f"{prefix}/{name}": value / self.pairs for name, value in zip(METRICS, sums, strict=True)}


def sum_pairs(chosen: torch.Tensor, rejected: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """Return the values of `PairSums`, float64 on the device of the rewards, without waiting for them."""
    c, r = chosen.detach().double(), rejected.detach().double()
    sums = (c > r).sum(), (c == r).sum(), losses.detach().double().sum(), c.sum(), r.sum()
    return torch.stack([c.new_full((), len(c)), *(value.double() for value in sums)])


def describe(metrics: dict[str, float]) -> str:
    """Return eval metrics as one short line."""
    return ", ".join(f"{name.rpartition('/')[2]} {value:.4f}" for name, value in metrics.items())
