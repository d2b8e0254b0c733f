"""Records of one or several sources, mixed in the shares that a recipe sets.

In: sources and their shares. Out: a `RecordSubset`: which records, their metadata, and on request their text.
Cost: a source is parsed once per node: what was parsed is a cache entry (`record_store.py`), which other processes and
later runs read until the source changes. In memory: the metadata (and while a format groups rows by prompt, the rows).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from rmtool.config import Source
from rmtool.data.arrow_rows import load_hub_dataset
from rmtool.data.cache_files import cache_errors, commit_entry, find_entry, unfinished_entry
from rmtool.data.formats import Format, preference_records
from rmtool.data.record import PairMetadata, Record, RowOptions
from rmtool.data.record_store import RecordStore, RecordWriter
from rmtool.data.rejects import Rejects
from rmtool.data.rows import is_hub_source, read_rows
from rmtool.errors import RmtoolError

_RECORDS = "records"  # the kind of cache entries
_CLOCK_TICK_S = 0.02  # file systems give changes within a tick of the kernel's clock (up to 10 ms) the same time


@dataclass
class SourceCount:
    """Counts of a source, for the data report; `format` is the one recognized by its first row, `unread` names the
    fields that are not read, `dropped_pairs` are those of prompts with too many; `digest` is a hash of all rows.
    """

    path: str
    format: str = "unknown"
    records: int = 0
    taken: int = 0
    counted: str = "rows"  # or prompts, where rows are grouped by prompt
    unread: list[str] = field(default_factory=list)
    dropped_pairs: int = 0
    digest: str = ""


@dataclass(frozen=True)
class LoadedSource:
    """A parsed source: its records in a file, their metadata in memory, and a hash of their text."""

    count: SourceCount
    records: RecordStore
    metadata: list[PairMetadata]

    @property
    def digest(self) -> str:
        return self.records.facts["digest"]


@dataclass(frozen=True)
class RecordSubset:
    """Some records of some sources, in order: record `indices[i]` of source `loaded[sources[i]]`."""

    loaded: tuple[LoadedSource, ...] = ()
    sources: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    indices: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.indices)

    def metadata(self) -> Iterator[PairMetadata]:
        for source, index in zip(self.sources.tolist(), self.indices.tolist(), strict=True):
            yield self.loaded[source].metadata[index]

    def take(self, positions: Iterable[int]) -> RecordSubset:
        """The records at these positions, which must ascend."""
        chosen = np.fromiter(positions, dtype=np.int64)
        return RecordSubset(self.loaded, self.sources[chosen], self.indices[chosen])

    def records(self) -> Iterator[Record]:
        """The records with their text."""
        for source, index in zip(self.sources.tolist(), self.indices.tolist(), strict=True):
            yield self.loaded[source].records[index]

    def digest(self) -> str:
        """Hash the text of all records, in order."""
        digest = blake2b(digest_size=16)
        for part in (*(each.digest.encode() for each in self.loaded), self.sources.tobytes(), self.indices.tobytes()):
            digest.update(part)
        return digest.hexdigest()


def select(
    sources: Sequence[Source],
    options: RowOptions,
    seed: int,
    rejects: Rejects,
    advance: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
    use_cache: bool = False,
) -> RecordSubset:
    """Load all sources and draw their shares.

    Raises:
        RmtoolError: as `load_source` and `draw_share`; invalid rows go to `rejects`.
    """
    loaded, numbers, indices = list[LoadedSource](), list[np.ndarray](), list[np.ndarray]()
    for number, source in enumerate(sources):
        each = load_source(source.path, options, rejects, advance, say, use_cache)
        drawn = draw_share(source, len(each.metadata), seed, number)
        each.count.taken = len(drawn)
        loaded.append(each)
        numbers.append(np.full(len(drawn), number, dtype=np.int32))
        indices.append(drawn)
    return RecordSubset(tuple(loaded), np.concatenate(numbers), np.concatenate(indices))


def load_source(
    path: str,
    options: RowOptions,
    rejects: Rejects,
    advance: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
    use_cache: bool = False,
) -> LoadedSource:
    """Load a source from the cache, or parse it (into the cache); calls `advance` once per record.

    Raises:
        RmtoolError: as `read_rows`; E0502 the disk is full. Invalid rows go to `rejects`, from the cache, too.
    """
    key = _cache_key(path, options) if use_cache else None
    entry = find_entry(_RECORDS, key, say) if key else None
    if entry:
        store = RecordStore(open(entry, "rb"))  # noqa: SIM115 - open as long as the store
        for error, row in store.invalid_rows():
            rejects.add(error, row)
    elif key:
        with unfinished_entry(_RECORDS) as unfinished:
            store = _parse(path, options, rejects, advance, unfinished)
            if key == _cache_key(path, options):  # else the file changed while it was read
                commit_entry(unfinished, key, ".arrow")
    else:
        store = _parse(path, options, rejects, advance, None)
    metadata = store.metadata()
    if entry:
        for _ in metadata:
            advance()
    facts, dropped = store.facts, int(store.facts["dropped_pairs"])
    count = SourceCount(path, facts["format"], len(metadata), counted=facts["counted"], dropped_pairs=dropped)
    count.unread = json.loads(facts["unread"])
    count.digest = hashlib.sha256(f"{facts['digest']} {facts['labels']}".encode()).hexdigest()
    return LoadedSource(count, store, metadata)


def _cache_key(path: str, options: RowOptions) -> str | None:
    """A hash of everything the records depend on; None for a source that cannot be read."""
    identity = _identity(path)
    parts = [_code(), path, identity, asdict(options)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32] if identity else None


def _identity(path: str) -> list[Any] | None:
    """What changes with the content of a source: a file's size, times and inode, a Hub dataset's fingerprint.

    A file that was changed within the last clock tick could change again at the same time: after one more tick it
    cannot. One that is still being written then has no identity.
    """
    try:
        if 0 <= time.time() - os.stat(path).st_ctime < _CLOCK_TICK_S:
            time.sleep(_CLOCK_TICK_S)
        status = os.stat(path)
        if 0 <= time.time() - status.st_ctime < _CLOCK_TICK_S:
            return None
    except FileNotFoundError:
        return [load_hub_dataset(path)._fingerprint] if is_hub_source(path) else None
    except (OSError, ValueError):
        return None
    regular = stat.S_ISREG(status.st_mode)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino] if regular else None


@functools.cache
def _code() -> str:
    """A hash of the code that parses, so that a different version of it finds no entries of this one."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).parent.parent / "errors.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class _Recorder(Rejects):
    """Passes invalid rows on, and writes them to the record file."""

    def __init__(self, rejects: Rejects, writer: RecordWriter):
        super().__init__()
        self._rejects, self._writer = rejects, writer

    def add(self, error: RmtoolError, row: Any = None) -> None:
        self._rejects.add(error, row)
        self._writer.append_invalid(error, row)


def _parse(
    path: str, options: RowOptions, rejects: Rejects, advance: Callable[[], None], target: Path | None
) -> RecordStore:
    """Parse a source into the file `target`, or into one that has no name."""
    folder = target.parent if target else Path(tempfile.gettempdir())
    with cache_errors(folder):
        file = open(target, "w+b") if target else tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the store
    writer, count = RecordWriter(file, folder), SourceCount(path)
    for record in read_records(path, options, _Recorder(rejects, writer), count, advance):
        writer.append(record)
        count.dropped_pairs += record.dropped_pairs
    facts = {"unread": json.dumps(count.unread), "dropped_pairs": str(count.dropped_pairs)}
    writer.finish(format=count.format, counted=count.counted, **facts)
    return RecordStore(file)


def draw_share(source: Source, count: int, seed: int, number: int) -> np.ndarray:
    """Draw the indices of the records that are used, ascending, from the `count` records of source `number`: a function
    of nothing but the arguments. With a fraction above 1, all records are repeated, and the rest is drawn.

    Raises:
        RmtoolError: E0308 the source has fewer records than `rows`, or the share selects none.
    """
    if source.rows is not None and source.rows > count:
        raise RmtoolError(
            "E0308",
            f"cannot take {source.rows:,} rows from {source.path}: it has {count:,}",
            f"set rows: {count}, or fraction: {source.rows / max(count, 1):.3g} to repeat rows",
        )
    wanted = source.rows if source.rows is not None else round((source.fraction or 1.0) * count)
    if count and not wanted:
        what = f"fraction {source.fraction:g} of {source.path} selects none of its {count:,} rows"
        raise RmtoolError("E0308", what, "set a larger fraction or rows: 1, or remove the source")
    whole, rest = divmod(wanted, count) if count else (0, 0)
    drawn = np.random.default_rng([seed, 2**30, number]).permutation(count)[:rest]
    return np.sort(np.concatenate([*[np.arange(count)] * whole, drawn])).astype(np.int64)


def read_records(
    path: str, options: RowOptions, rejects: Rejects, count: SourceCount, advance: Callable[[], None]
) -> Iterator[Record]:
    """Parse the records of one source; sets the format and the unread fields in `count`.

    Raises:
        RmtoolError: as `read_rows`; invalid rows go to `rejects`.
    """

    def recognized(format: Format) -> None:
        count.format = format.name
        count.counted = "prompts" if format.grouped else "rows"

    unread = set[str]()
    for record in preference_records(read_rows(path, rejects), options, rejects, recognized, unread):
        advance()
        yield record
    count.unread = sorted(unread)
