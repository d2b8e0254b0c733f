"""Held-out accuracy, loss and rewards of a reward model.

In: a model, records with preferences and their trees. Out: an `EvalResult`: the five eval metrics, overall and per
subset, and a few sampled pairs with their rewards.
Cost: one forward over the unique tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rmtool.data.formats import Record
from rmtool.errors import RmtoolError
from rmtool.loss import bradley_terry
from rmtool.metrics import PairSums
from rmtool.model import RewardModel, compute_rewards
from rmtool.tree import TokenTree
from rmtool.ui import Bar

PREFIX = "eval/rm"


@dataclass(frozen=True)
class Sample:
    """One pair and its two rewards."""

    prompt: str
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float


@dataclass(frozen=True)
class EvalResult:
    """`subsets` is empty where no row names one."""

    total: PairSums
    subsets: dict[str, PairSums]
    samples: tuple[Sample, ...]

    def as_dict(self) -> dict[str, Any]:
        """The `--json` form; metric names as the field reads them."""
        return {
            **self.total.report(PREFIX),
            "pairs": int(self.total.pairs),
            "ties": int(self.total.ties),
            "subsets": {
                name: {**sums.report(PREFIX), "pairs": int(sums.pairs), "ties": int(sums.ties)}
                for name, sums in self.subsets.items()
            },
            "samples": [vars(sample) for sample in self.samples],
        }


def evaluate(
    model: RewardModel,
    records: Sequence[Record],
    trees: Sequence[TokenTree],
    budget: int,
    bar: Bar,
    samples: int = 0,
    seed: int = 0,
) -> EvalResult:
    """Score all pairs of `records`.

    Raises:
        RmtoolError: E0409 a reward is not a finite number.
    """
    rewards = compute_rewards(model, trees, budget, bar)
    for record, values in zip(records, rewards, strict=True):
        require_finite(record, values)
    total, subsets = PairSums(), dict[str, PairSums]()
    for record, values in zip(records, rewards, strict=True):
        sums = _record_sums(record, values)
        total += sums
        if record.subset is not None:
            subsets[record.subset] = subsets.get(record.subset, PairSums()) + sums
    chosen = np.random.default_rng(seed).permutation(len(records))[:samples]
    return EvalResult(
        total, dict(sorted(subsets.items())), tuple(_sample(records[index], rewards[index]) for index in sorted(chosen))
    )


def require_finite(record: Record, rewards: Sequence[float]) -> None:
    if not all(math.isfinite(value) for value in rewards):
        raise RmtoolError(
            "E0409",
            f"the model's reward for this row is not a finite number ({rewards})",
            "check the checkpoint; in 16 bits, try --precision fp32",
            record.place,
        )


def _record_sums(record: Record, rewards: Sequence[float]) -> PairSums:
    chosen = torch.tensor([rewards[winner] for winner, _ in record.preferences], dtype=torch.float64)
    rejected = torch.tensor([rewards[loser] for _, loser in record.preferences], dtype=torch.float64)
    return PairSums.of(chosen, rejected, bradley_terry(chosen, rejected))


def _sample(record: Record, rewards: Sequence[float]) -> Sample:
    winner, loser = record.preferences[0]
    return Sample(
        prompt=record.prompt[-1].content if record.prompt else "",
        chosen=record.responses[winner][-1].content,
        rejected=record.responses[loser][-1].content,
        chosen_reward=rewards[winner],
        rejected_reward=rewards[loser],
    )
