"""Evaluation of a reward model on preference pairs.

In: the pairs' metadata, and what computes their rewards. Out: an `EvalResult`: the eval/rm metrics, overall and per
subset, and the rewards of a few examples.
Cost: that of the rewards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rmtool.data.record import PairMetadata
from rmtool.errors import RmtoolError
from rmtool.evaluation.metrics import EVAL_PREFIX, PairSums
from rmtool.model.fidelity import Fidelity
from rmtool.model.loss import bradley_terry
from rmtool.model.out_of_memory import PackOutOfMemoryError, row_out_of_memory

Samples = tuple[tuple[int, list[float]], ...]


@dataclass(frozen=True)
class EvalResult:
    """Metrics of all pairs and of each subset, and examples.

    total, subsets: their loss is plain Bradley-Terry, whatever the model was trained with
    samples:        for some rows, drawn at random, the index and the rewards of the responses
    fidelity:       of the rewards, where that was measured
    """

    total: PairSums
    subsets: dict[str, PairSums]
    samples: Samples
    fidelity: Fidelity | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the `--json` form."""

        def fields(sums: PairSums) -> dict[str, Any]:
            return {**sums.report(EVAL_PREFIX), "pairs": int(sums.pairs), "ties": int(sums.ties)}

        return {**fields(self.total), "subsets": {name: fields(sums) for name, sums in self.subsets.items()}}


def evaluate(
    metadata: Sequence[PairMetadata],
    compute: Callable[[], tuple[list[list[float]], Fidelity | None]],
    samples: int = 0,
    seed: int = 0,
) -> EvalResult:
    """Compute the eval metrics of all pairs.

    Args:
        compute: computes the rewards of all rows, as `compute_rewards` or `rewards_with_fidelity` does.
        samples: number of rows whose rewards are returned.

    Raises:
        AbandonedError: when `compute` raises it.
        RmtoolError: E0409 a reward is NaN or inf; E0503 out of memory, a `PackOutOfMemoryError` if smaller packs help.
    """
    try:
        rewards, fidelity = compute()
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
    shown = tuple((index, rewards[index]) for index in indices)
    return EvalResult(total, dict(sorted(subsets.items())), shown, fidelity)


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
