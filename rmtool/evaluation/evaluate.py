"""Evaluation of a reward model on preference pairs.

In: a model, and the pairs' metadata and token ids. Out: an `EvalResult`: the eval/rm metrics, overall and per subset,
and the rewards of a few examples.
Cost: one forward pass over the unique tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from rmtool.data.record import PairMetadata
from rmtool.dist import SINGLE_PROCESS, DistInfo
from rmtool.errors import RmtoolError
from rmtool.evaluation.metrics import EVAL_PREFIX, PairSums
from rmtool.model.loss import bradley_terry
from rmtool.model.out_of_memory import PackOutOfMemoryError, row_out_of_memory
from rmtool.model.reward_model import RewardModel
from rmtool.model.rewards import compute_rewards
from rmtool.tokenization.response_group import ResponseGroup
from rmtool.ui import Bar

Samples = tuple[tuple[int, list[float]], ...]


@dataclass(frozen=True)
class EvalResult:
    """Metrics of all pairs and of each subset, and examples.

    total, subsets: their loss is plain Bradley-Terry, whatever the model was trained with
    samples:        for some rows, drawn at random, the index and the rewards of the responses
    """

    total: PairSums
    subsets: dict[str, PairSums]
    samples: Samples

    def as_dict(self) -> dict[str, Any]:
        """Return the `--json` form."""

        def fields(sums: PairSums) -> dict[str, Any]:
            return {**sums.report(EVAL_PREFIX), "pairs": int(sums.pairs), "ties": int(sums.ties)}

        return {**fields(self.total), "subsets": {name: fields(sums) for name, sums in self.subsets.items()}}


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
    interrupt: Callable[[], bool] | None = None,
) -> EvalResult:
    """Compute the eval metrics of all pairs; arguments as of `compute_rewards`.

    Args:
        samples: number of rows whose rewards are returned.

    Raises:
        AbandonedError: when `interrupt` says so.
        RmtoolError: E0409 a reward is NaN or inf; E0503 out of memory, a `PackOutOfMemoryError` if smaller packs help.
    """
    try:
        rewards = compute_rewards(model, groups, max_tokens, bar, forward_module, dist, interrupt)
    except PackOutOfMemoryError as error:
        if len(error.indices) > 1:
            raise
        raise row_out_of_memory(metadata[error.indices[0]].place, error.tokens) from None
    total, subsets = PairSums(), dict[str, PairSums]()
    for each, values in zip(metadata, rewards, strict=True):
        _require_finite(each, values)
        sums = _row_sums(each, values)
        total += sums
        if each.subset is not None:
            subsets[each.subset] = subsets.get(each.subset, PairSums()) + sums
    indices = sorted(np.random.default_rng(seed).permutation(len(metadata))[:samples].tolist())
    return EvalResult(total, dict(sorted(subsets.items())), tuple((index, rewards[index]) for index in indices))


def _require_finite(metadata: PairMetadata, rewards: Sequence[float]) -> None:
    if not all(math.isfinite(value) for value in rewards):
        raise RmtoolError(
            "E0409",
            f"reward is NaN or inf: {', '.join(f'{value:g}' for value in rewards)}",
            "check the checkpoint, or set train.precision=fp32",
            metadata.place,
        )


def _row_sums(metadata: PairMetadata, rewards: Sequence[float]) -> PairSums:
    chosen = torch.tensor([rewards[winner] for winner, _ in metadata.preferences], dtype=torch.float64)
    rejected = torch.tensor([rewards[loser] for _, loser in metadata.preferences], dtype=torch.float64)
    return PairSums.of(chosen, rejected, bradley_terry(chosen, rejected))
