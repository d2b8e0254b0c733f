"""The pairs of each optimizer step: a pure function of the records, the seed, the epoch and the batch size.

In: records with preferences. Out: per step, its batch items (a record's group and its preferences in this step).
Neither the number of processes nor the memory limit enters here, so neither can change what a step learns.
Cost: one permutation per epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rmtool.data.record import PairMetadata
from rmtool.tokenization.response_group import ResponseGroup


@dataclass(frozen=True)
class BatchItem:
    """A record's part of one batch: the responses used, and (winner, loser, margin) by index among them."""

    metadata: PairMetadata
    group: ResponseGroup
    preferences: tuple[tuple[int, int, float], ...]

    @property
    def weight(self) -> float:
        """The weight of each of its pairs in the loss."""
        return self.metadata.weight


def count_pairs(records: Iterable[PairMetadata | BatchItem]) -> int:
    """Return the number of pairs of records or batch items."""
    return sum(len(each.preferences) for each in records)


def plan_steps(epochs: int, max_steps: int | None, pairs: int, batch_size: int) -> int:
    """Return the optimizer steps of a run; the last step of an epoch may have fewer pairs than the batch size."""
    total = epochs * -(-pairs // batch_size)
    return total if max_steps is None else min(total, max_steps)


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the order of `count` records in this epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def run_steps(
    metadata: Sequence[PairMetadata], groups: Sequence[ResponseGroup], seed: int, batch_size: int, taken: int
) -> Iterator[list[BatchItem]]:
    """Yield the batches of one epoch after the other, without those of the steps that were taken."""
    epoch, skipped = divmod(taken, -(-count_pairs(metadata) // batch_size))
    for number in itertools.count(epoch):
        yield from epoch_steps(metadata, groups, seed, number, batch_size, skipped if number == epoch else 0)


def epoch_steps(
    metadata: Sequence[PairMetadata],
    groups: Sequence[ResponseGroup],
    seed: int,
    epoch: int,
    batch_size: int,
    skipped: int = 0,
) -> Iterator[list[BatchItem]]:
    """Yield the batches of one epoch, but not the first `skipped`. The pairs of a record stay together unless a step
    boundary splits them.
    """
    order = epoch_order(seed, epoch, len(metadata))
    sizes = np.fromiter((len(metadata[index].preferences) for index in order), dtype=np.int64, count=len(order))
    records = np.repeat(order, sizes)
    preferences = np.arange(len(records)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    for start in range(skipped * batch_size, len(records), batch_size):
        step, chosen = slice(start, start + batch_size), dict[int, list[int]]()
        for index, preference in zip(records[step].tolist(), preferences[step].tolist(), strict=True):
            chosen.setdefault(index, []).append(preference)
        yield [batch_item(metadata[index], groups[index], which) for index, which in chosen.items()]


def batch_item(metadata: PairMetadata, group: ResponseGroup, which: Sequence[int]) -> BatchItem:
    """Return the item of some of a record's preferences, with only the responses in them."""
    used = sorted({response for index in which for response in metadata.preferences[index]})
    place = {response: position for position, response in enumerate(used)}
    return BatchItem(
        metadata,
        group if len(used) == len(group.responses) else group.select(used),
        tuple(
            (place[metadata.preferences[i][0]], place[metadata.preferences[i][1]], metadata.margins[i] or 0.0)
            for i in which
        ),
    )
