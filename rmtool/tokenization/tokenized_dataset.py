"""Many records tokenized, with what became of each.

In: an `Encoder` and records with preferences. Out: a `TokenizedDataset`; invalid rows go to `rejects`.
Cost: that of the encoder; metadata and indices in memory, groups wherever they are appended.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from rmtool.data.record import PairMetadata, Record
from rmtool.data.rejects import Rejects
from rmtool.errors import RmtoolError
from rmtool.tokenization.encoder import Encoder, EncodeResult
from rmtool.tokenization.response_group import ResponseGroup


class GroupSink(Protocol):
    """Where groups go: a list, or a file."""

    def append(self, group: ResponseGroup, /) -> None: ...


@dataclass
class TokenizedDataset:
    """The records that have a group: their metadata and groups, and what became of the other records.

    indices: the position of each among all records
    counts:  records that were dropped or changed, by reason
    failed:  positions of the records with an error
    """

    metadata: list[PairMetadata] = field(default_factory=list)
    groups: Sequence[ResponseGroup] = ()
    indices: array[int] = field(default_factory=lambda: array("q"))
    counts: Counter[str] = field(default_factory=Counter)
    failed: list[int] = field(default_factory=list)


def tokenize_records(
    encoder: Encoder,
    records: Iterable[Record],
    on_identical: str,
    advance: Callable[[], None],
    rejects: Rejects | None = None,
    groups: GroupSink | None = None,
    known: Iterable[PairMetadata] | None = None,
) -> TokenizedDataset:
    """Tokenize records with preferences; `advance` is called once per record.

    Args:
        rejects: gets invalid rows; without it, the first one raises.
        known: the metadata of the records, where it is held already.
        on_identical: "error", "drop" or "keep" (in evaluation: a tie) pairs whose two responses have the same ids.
        groups: gets the groups; without it they are held in memory, in the result.

    Raises:
        RmtoolError: as `Encoder.encode`, and E0304 for a pair whose two responses have the same ids.
    """
    held = list[ResponseGroup]()
    dataset, sink = TokenizedDataset(groups=held), held if groups is None else groups
    known = iter(known) if known is not None else None
    for index, result in enumerate(encoder.encode_many(records, skip_unlabeled=True)):
        advance()
        metadata = next(known) if known else result.record.metadata()
        try:
            metadata, event = _checked(result, metadata, on_identical)
        except RmtoolError as error:
            if rejects is None:
                raise
            rejects.add(error, result.record.row)
            dataset.failed.append(index)
            continue
        dataset.counts.update(result.counts | ({event: 1} if event else {}))
        if result.group is not None and metadata.preferences:
            dataset.metadata.append(metadata)
            dataset.indices.append(index)
            sink.append(result.group)
    return dataset


def _checked(result: EncodeResult, metadata: PairMetadata, on_identical: str) -> tuple[PairMetadata, str | None]:
    """Return the metadata of the pairs that stay, and what happened to the record; raise its error."""
    if result.error:
        raise result.error
    if result.group is None:
        return metadata, result.event
    if on_identical == "keep":
        return metadata, "same_ids" if renders_alike(result.record, result.group) else result.event
    metadata, event = without_identical(metadata, result.group, on_identical, result.event)
    if event == "identical_text" and not _same_text(result.record):
        event = "identical_after_rendering"
    return metadata, event


def renders_alike(record: Record, group: ResponseGroup) -> bool:
    """Return whether different responses have the same ids: the template leaves out what distinguishes them."""
    return len({ids.tobytes() for ids in group.responses}) < len(set(record.responses))


def _same_text(record: Record) -> bool:
    """Return whether the two responses of a pair are the same before rendering and truncation."""
    return any(record.responses[winner] == record.responses[loser] for winner, loser in record.preferences)


def without_identical(
    metadata: PairMetadata, group: ResponseGroup, on_identical: str, event: str | None
) -> tuple[PairMetadata, str | None]:
    """Return the metadata without pairs whose responses have the same ids, and what happened to the record.

    Raises:
        RmtoolError: E0304 there is such a pair, and `on_identical` is "error".
    """
    same = [np.array_equal(group.responses[a], group.responses[b]) for a, b in metadata.preferences]
    if not any(same):
        return metadata, event
    if on_identical == "error":
        raise RmtoolError(
            "E0304",
            "chosen and rejected have the same token ids",
            "remove the row, or set data.on_identical=drop",
            metadata.place,
        )
    preferences = tuple(itertools.compress(metadata.preferences, (not equal for equal in same)))
    margins = tuple(itertools.compress(metadata.margins, (not equal for equal in same)))
    return replace(metadata, preferences=preferences, margins=margins), "identical_text"
