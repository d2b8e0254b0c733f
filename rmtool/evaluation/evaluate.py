"""Held-out accuracy, loss and rewards of a reward model.

In: a model, labels and their groups. Out: an `EvalResult`: the five eval metrics, overall and per subset, and the
rewards of a few sampled records.
Cost: one forward over the unique tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from rmtool.data.record import PairMetadata
from rmtool.dist import SINGLE_PROCESS, DistInfo
from rmtool.errors import RmtoolError
from rmtool.evaluation.metrics import PairSums
from rmtool.model.loss import bradley_terry
from rmtool.model.reward_model import RewardModel
from rmtool.model.rewards import compute_rewards
from rmtool.tokenization.response_group import ResponseGroup
from rmtool.ui import Bar

PREFIX = "eval/rm"


@dataclass(frozen=True)
class EvalResult:
    """`subsets` is empty where no row names one."""

    total: PairSums
    subsets: dict[str, PairSums]
    samples: tuple[tuple[int, list[float]], ...]  # a record's place, and the rewards of its responses

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
        }


def evaluate(
    model: RewardModel,
    metadata: Sequence[PairMetadata],
    groups: Sequence[ResponseGroup],
    max_tokens: int,
    bar: Bar,
    samples: int = 0,
    seed: int = 0,
    forward_module: nn.Module | None = None,
    dist: DistInfo = SINGLE_PROCESS,
) -> EvalResult:
    """Score all pairs; `run` and `ranks` as in `compute_rewards`.

    Args:
        samples: so many records are drawn, and their rewards shown.

    Raises:
        RmtoolError: E0409 a reward is not a finite number.
    """
    rewards = compute_rewards(model, groups, max_tokens, bar, forward_module, dist)
    for each, values in zip(metadata, rewards, strict=True):
        require_finite(each, values)
    total, subsets = PairSums(), dict[str, PairSums]()
    for each, values in zip(metadata, rewards, strict=True):
        sums = _record_sums(each, values)
        total += sums
        if each.subset is not None:
            subsets[each.subset] = subsets.get(each.subset, PairSums()) + sums
    chosen = sorted(np.random.default_rng(seed).permutation(len(metadata))[:samples].tolist())
    return EvalResult(total, dict(sorted(subsets.items())), tuple((index, rewards[index]) for index in chosen))


def require_finite(metadata: PairMetadata, rewards: Sequence[float]) -> None:
    if not all(math.isfinite(value) for value in rewards):
        raise RmtoolError(
            "E0409",
            f"the model's reward for this row is not a finite number ({rewards})",
            "check the checkpoint; in 16 bits, try --precision fp32",
            metadata.place,
        )


def _record_sums(metadata: PairMetadata, rewards: Sequence[float]) -> PairSums:
    chosen = torch.tensor([rewards[winner] for winner, _ in metadata.preferences], dtype=torch.float64)
    rejected = torch.tensor([rewards[loser] for _, loser in metadata.preferences], dtype=torch.float64)
    return PairSums.of(chosen, rejected, bradley_terry(chosen, rejected))
