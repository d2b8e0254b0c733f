"""Exact means over pairs, however the pairs were cut into batches and ranks.

In: the rewards of pairs. Out: `PairSums`, which add up, and the metric names that the field reads.
Sums and counts are float64 and are divided last; a batch mean is never averaged.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

import torch

METRICS = ("accuracy", "loss", "chosen_rewards", "rejected_rewards", "reward_margin")


@dataclass(frozen=True)
class PairSums:
    """Sums over `pairs` pairs. `correct` counts r_chosen > r_rejected; an equal pair earns nothing and is in `ties`."""

    pairs: float = 0.0
    correct: float = 0.0
    ties: float = 0.0
    loss: float = 0.0
    chosen: float = 0.0
    rejected: float = 0.0

    @classmethod
    def of(cls, chosen: torch.Tensor, rejected: torch.Tensor, losses: torch.Tensor) -> PairSums:
        """From rewards and losses, each float[B]."""
        c, r = chosen.detach().double(), rejected.detach().double()
        return cls(
            pairs=float(len(c)),
            correct=float((c > r).sum()),
            ties=float((c == r).sum()),
            loss=float(losses.detach().double().sum()),
            chosen=float(c.sum()),
            rejected=float(r.sum()),
        )

    def __add__(self, other: PairSums) -> PairSums:
        return PairSums(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def vector(self) -> torch.Tensor:
        """float64[6], to be summed over ranks."""
        return torch.tensor(astuple(self), dtype=torch.float64)

    @classmethod
    def from_vector(cls, vector: torch.Tensor) -> PairSums:
        assert vector.shape == (len(fields(cls)),)
        return cls(*vector.tolist())

    def report(self, prefix: str) -> dict[str, float]:
        """{prefix/accuracy, loss, chosen_rewards, rejected_rewards, reward_margin}; needs at least one pair."""
        assert self.pairs > 0
        values = (
            self.correct / self.pairs,
            self.loss / self.pairs,
            self.chosen / self.pairs,
            self.rejected / self.pairs,
            (self.chosen - self.rejected) / self.pairs,
        )
        return {f"{prefix}/{name}": value for name, value in zip(METRICS, values, strict=True)}
