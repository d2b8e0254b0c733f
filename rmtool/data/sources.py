"""The records of one or several sources: read, given a format, and mixed as a recipe says.

In: sources with their shares. Out: the records, in the order of the sources; what was read of each.
Cost: one reading of every source; all records are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rmtool.config import Source
from rmtool.data.formats import Format, Reading, Record, preference_records
from rmtool.data.rejects import Rejects
from rmtool.data.rows import read_rows
from rmtool.errors import RmtoolError


@dataclass
class SourceCount:
    """What was read of a source; `format` is what its first row was recognised as, and all others are."""

    path: str
    format: str = "unknown"
    records: int = 0
    taken: int = 0


@dataclass
class Mixture:
    """Records of all sources, and what was read of each."""

    records: list[Record] = field(default_factory=list)
    sources: list[SourceCount] = field(default_factory=list)


def read_mixture(
    sources: Sequence[Source], reading: Reading, seed: int, rejects: Rejects, advance: Callable[[], None]
) -> Mixture:
    """All records of the mixture; calls `advance` once per record read.

    Raises:
        RmtoolError: as `read_rows` and `draw_share`; bad rows go to `rejects`.
    """
    mixture = Mixture()
    for number, source in enumerate(sources):
        count = SourceCount(source.path)
        records = list(read_records(source.path, reading, rejects, count, advance))
        indices = draw_share(source, len(records), seed, number)
        count.records, count.taken = len(records), len(indices)
        mixture.records += [records[index] for index in indices]
        mixture.sources.append(count)
    return mixture


def draw_share(source: Source, count: int, seed: int, number: int) -> np.ndarray:
    """Which of the `count` records of the mixture's source `number` stand in it, ascending: a function of nothing but
    the arguments. With a fraction above 1, all of them stand in it once or more, and the rest is drawn.

    Raises:
        RmtoolError: E0308 the source has fewer records than are asked for.
    """
    if source.rows is not None and source.rows > count:
        raise RmtoolError(
            "E0308",
            f"{source.rows:,} rows of {source.path} are asked for, and it has {count:,}",
            f"write rows: {count}, or fraction: {source.rows / max(count, 1):.3g} to use some of them several times",
        )
    wanted = source.rows if source.rows is not None else round((source.fraction or 1.0) * count)
    whole, rest = divmod(wanted, count) if count else (0, 0)
    drawn = np.random.default_rng([seed, 2**30, number]).permutation(count)[:rest]
    return np.sort(np.concatenate([*[np.arange(count)] * whole, drawn])).astype(int)


def read_records(
    path: str, reading: Reading, rejects: Rejects, count: SourceCount, advance: Callable[[], None]
) -> Iterator[Record]:
    """The records of one source, whose format `count` then names."""

    def recognised(format: Format) -> None:
        count.format = format.name

    for record in preference_records(read_rows(path, rejects), reading, rejects, recognised):
        advance()
        yield record
