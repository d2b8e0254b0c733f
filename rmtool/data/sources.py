"""The records of one or several sources: read, given a format, and mixed as a recipe says.

In: sources with their shares. Out: a `RecordSubset`: labels of the records, and the records themselves, when they are
asked for.
Cost: every source is read once; labels are held in memory, and text in a temporary file (but that of rated rows that
are put together by prompt, while they are read).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from rmtool.config import Source
from rmtool.data.formats import Format, preference_records
from rmtool.data.record import PairMetadata, Record, RowOptions
from rmtool.data.record_store import RecordStore
from rmtool.data.rejects import Rejects
from rmtool.data.rows import read_rows
from rmtool.errors import RmtoolError


@dataclass
class SourceCount:
    """What was read of a source; `format` is what its first row was recognized as, and all others are."""

    path: str
    format: str = "unknown"
    records: int = 0
    taken: int = 0
    counted: str = "rows"  # or prompts, where rows of one prompt are put together


@dataclass(frozen=True)
class LoadedSource:
    """A source that was read: its records in a file, their labels in memory, and a hash of their text."""

    count: SourceCount
    records: RecordStore
    metadata: list[PairMetadata]
    digest: bytes


@dataclass(frozen=True)
class RecordSubset:
    """Some records of some sources, in order: record `indices[i]` of source `scans[sources[i]]`."""

    scans: tuple[LoadedSource, ...] = ()
    sources: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    indices: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.indices)

    def metadata(self) -> Iterator[PairMetadata]:
        for source, index in zip(self.sources.tolist(), self.indices.tolist(), strict=True):
            yield self.scans[source].metadata[index]

    def take(self, places: Iterable[int]) -> RecordSubset:
        """Those at these places, ascending."""
        chosen = np.fromiter(places, dtype=np.int64)
        return RecordSubset(self.scans, self.sources[chosen], self.indices[chosen])

    def records(self) -> Iterator[Record]:
        """The records with their text."""
        for source, index in zip(self.sources.tolist(), self.indices.tolist(), strict=True):
            yield self.scans[source].records[index]

    def digest(self) -> str:
        """A hash of all records' text, in order."""
        digest = blake2b(digest_size=16)
        for part in (*(scan.digest for scan in self.scans), self.sources.tobytes(), self.indices.tobytes()):
            digest.update(part)
        return digest.hexdigest()


def select(
    sources: Sequence[Source], reading: RowOptions, seed: int, rejects: Rejects, advance: Callable[[], None]
) -> RecordSubset:
    """The mixture: all sources, read once; calls `advance` once per record.

    Raises:
        RmtoolError: as `read_rows` and `draw_share`; bad rows go to `rejects`.
    """
    scans, numbers, indices = list[LoadedSource](), list[np.ndarray](), list[np.ndarray]()
    for number, source in enumerate(sources):
        scan = _scan(source.path, reading, rejects, advance)
        drawn = draw_share(source, len(scan.metadata), seed, number)
        scan.count.taken = len(drawn)
        scans.append(scan)
        numbers.append(np.full(len(drawn), number, dtype=np.int32))
        indices.append(drawn)
    return RecordSubset(tuple(scans), np.concatenate(numbers), np.concatenate(indices))


def _scan(path: str, reading: RowOptions, rejects: Rejects, advance: Callable[[], None]) -> LoadedSource:
    count, kept, metadata, digest = SourceCount(path), RecordStore(), list[PairMetadata](), blake2b(digest_size=16)
    for record in read_records(path, reading, rejects, count, advance):
        kept.append(record)
        metadata.append(record.metadata())
        digest.update(blake2b(record.content(), digest_size=16).digest())
    kept.finish()
    count.records = len(metadata)
    return LoadedSource(count, kept, metadata, digest.digest())


def draw_share(source: Source, count: int, seed: int, number: int) -> np.ndarray:
    """Which of the `count` records of the mixture's source `number` stand in it, ascending: a function of nothing but
    the arguments. With a fraction above 1, all of them stand in it once or more, and the rest is drawn.

    Raises:
        RmtoolError: E0308 the source has fewer records than are asked for, or the share comes to none.
    """
    if source.rows is not None and source.rows > count:
        raise RmtoolError(
            "E0308",
            f"{source.rows:,} rows of {source.path} are asked for, and it has {count:,}",
            f"write rows: {count}, or fraction: {source.rows / max(count, 1):.3g} to use some of them several times",
        )
    wanted = source.rows if source.rows is not None else round((source.fraction or 1.0) * count)
    if count and not wanted:
        what = f"a fraction of {source.fraction:g} of {source.path} is none of its {count:,} rows"
        raise RmtoolError("E0308", what, "raise the fraction, write rows: 1, or leave the source out")
    whole, rest = divmod(wanted, count) if count else (0, 0)
    drawn = np.random.default_rng([seed, 2**30, number]).permutation(count)[:rest]
    return np.sort(np.concatenate([*[np.arange(count)] * whole, drawn])).astype(np.int64)


def read_records(
    path: str, reading: RowOptions, rejects: Rejects, count: SourceCount, advance: Callable[[], None]
) -> Iterator[Record]:
    """The records of one source, whose format `count` then names."""

    def recognized(format: Format) -> None:
        count.format = format.name
        count.counted = "prompts" if format.grouped else "rows"

    for record in preference_records(read_rows(path, rejects), reading, rejects, recognized):
        advance()
        yield record
