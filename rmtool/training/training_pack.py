"""A pack of training: the batch of a forward and the pairs in it, and this rank's packs of a step.

In: batch items. Out: `TrainingPack`s on the CPU, which `to_device` copies as one; a `StepPlan`.
Cost: of a plan, that of `plan_packs`.
Shapes: B pairs of a pack.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rmtool.dataset.batches import BatchItem
from rmtool.model.reward_model import RewardModel
from rmtool.packing.packs import Batch


@dataclass(frozen=True)
class PackedPairs:
    """The B pairs of a pack.

    items:            the index of each pair's item in the pack
    chosen, rejected: int64[B], indices into the pack's rewards
    margins:          float32[B], 0 without one
    weights:          float32[B]
    """

    items: tuple[int, ...]
    chosen: torch.Tensor
    rejected: torch.Tensor
    margins: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, items: Sequence[BatchItem]) -> PackedPairs:
        """Number the responses of a pack's items in the order of its rewards."""
        starts = itertools.accumulate((len(item.group.responses) for item in items), initial=0)
        pairs = [
            (index, start + winner, start + loser, margin, item.weight)
            for index, (start, item) in enumerate(zip(starts, items, strict=False))
            for winner, loser, margin in item.preferences
        ]
        numbers, chosen, rejected, margins, weights = zip(*pairs, strict=True)
        floats = (torch.tensor(values, dtype=torch.float32) for values in (margins, weights))
        return cls(numbers, torch.tensor(chosen), torch.tensor(rejected), *floats)


@dataclass(frozen=True)
class TrainingPack:
    """A batch and its pairs."""

    batch: Batch
    pairs: PackedPairs

    @classmethod
    def build(cls, model: RewardModel, items: Sequence[BatchItem]) -> TrainingPack:
        """Build the pack of these items on the CPU."""
        return cls(model.build_batch([item.group for item in items]), PackedPairs.of(items))


@dataclass(frozen=True)
class StepPlan:
    """This rank's part of a step: the items of each of its packs, and the first pack.

    batch, tokens_per_pack: what the plan was made from
    """

    batch: Sequence[BatchItem]
    tokens_per_pack: int
    packs: list[list[BatchItem]]
    first: TrainingPack
