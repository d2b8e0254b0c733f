"""Records in an Arrow file on disk, so that their text is not held in memory and a node's processes share it.

In: records and invalid rows, in the order of their source. Out: the same, by index or in order, and the metadata of
all records. The file may be a cache entry (`cache_files.py`) or have no name.
Cost: the text once on disk; in memory one batch. Batches are read, not mapped: mapped pages count as resident memory
of the process, 302 MiB more for 300,000 pairs of hh-rlhf.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import numpy as np

from rmtool.data.cache_files import cache_errors
from rmtool.data.json_values import as_json
from rmtool.data.record import Message, PairMetadata, Record
from rmtool.errors import Place, RmtoolError

BATCH = 256  # records that are written and read together
# An invalid row has no content and no metadata, and its error and itself in `rest`.
COLUMNS = ("content", "rest", "file", "line", "column", "prompt_hash", "labels")
METADATA = range(2, len(COLUMNS))


class RecordWriter:
    """Writes records and invalid rows to `file`, which lies in `folder`; call `finish` before it is read.

    Raises:
        RmtoolError: E0502 the file cannot be written (every method).
    """

    def __init__(self, file: IO[bytes], folder: Path):
        import pyarrow as pa

        kinds = (pa.binary(), pa.binary(), pa.binary(), pa.int32(), pa.int32(), pa.uint64(), pa.binary())
        self._schema = pa.schema(list(zip(COLUMNS, kinds, strict=True)))
        options = pa.ipc.IpcWriteOptions(compression="lz4")  # 2.4 times smaller, 15% slower to parse and write
        self._file, self._folder, self._writer = file, folder, pa.ipc.new_file(file, self._schema, options=options)
        self._rows, self._digest = list[tuple[Any, ...]](), blake2b(digest_size=16)
        self._labels = blake2b(digest_size=16)

    def append(self, record: Record) -> None:
        metadata, given = record.metadata(), (record.tools, record.template_kwargs)
        content = _json(record.prompt, record.responses, given, record.preferences)
        self._digest.update(blake2b(content, digest_size=16).digest())
        place, labels = record.place, _labels_json(record.preferences, record.margins, record.subset, record.weight)
        self._labels.update(blake2b(labels, digest_size=16).digest())
        rest = _json(record.row, [(each.file, each.line, each.column) for each in record.places])
        file = place.file.encode("utf-8", "surrogatepass")
        self._add((content, rest, file, place.line, place.column, metadata.prompt_hash, labels))

    def append_invalid(self, error: RmtoolError, row: Any) -> None:
        self._add((None, _json(error.as_dict(), row), *[None] * len(METADATA)))

    def _add(self, row: tuple[Any, ...]) -> None:
        self._rows.append(row)
        if len(self._rows) == BATCH:
            self._flush()

    def _flush(self, facts: dict[str, str] | None = None) -> None:
        import pyarrow as pa

        columns = zip(*self._rows, strict=True) if self._rows else [()] * len(COLUMNS)
        arrays = [pa.array(column, kind) for column, kind in zip(columns, self._schema.types, strict=True)]
        with cache_errors(self._folder):
            self._writer.write_batch(pa.record_batch(arrays, schema=self._schema), custom_metadata=facts)
        self._rows.clear()

    def finish(self, **facts: str) -> None:
        """Complete the file; `facts` are what `RecordStore.facts` returns."""
        self._flush({**facts, "digest": self._digest.hexdigest(), "labels": self._labels.hexdigest()})
        with cache_errors(self._folder):
            self._writer.close()
            self._file.flush()


class RecordStore:
    """A complete record file, opened for reading."""

    def __init__(self, file: IO[bytes]):
        import pyarrow as pa

        self._file, self._reader = file, pa.ipc.open_file(file)
        last = self._reader.get_batch_with_custom_metadata(self._reader.num_record_batches - 1)
        self.facts = {name.decode(): value.decode() for name, value in last.custom_metadata.items()}
        self._columns, self._number = list[list[Any]](), -1  # the batch that was read last
        self._rows = np.zeros(0, dtype=np.int64)  # where records are among rows; set by `metadata`

    def metadata(self) -> list[PairMetadata]:
        """Read the metadata of all records, and nothing else."""
        import pyarrow as pa

        options = pa.ipc.IpcReadOptions(included_fields=list(METADATA))
        reader, found, rows = pa.ipc.open_file(self._file, options=options), list[PairMetadata](), list[np.ndarray]()
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            valid = batch.column("labels").is_valid()
            rows.append(number * BATCH + np.flatnonzero(valid.to_numpy(zero_copy_only=False)))
            columns = (column.to_pylist() for column in batch.filter(valid).columns)
            for file, line, column, prompt_hash, labels in zip(*columns, strict=True):
                found.append(PairMetadata(Place(_shared(file), line, column), prompt_hash, *_labels(labels)))
        self._rows = np.concatenate(rows)
        return found

    def __getitem__(self, index: int) -> Record:
        """The record at `index` of `metadata()`."""
        number, row = divmod(int(self._rows[index]), BATCH)
        if number != self._number:
            self._columns = [column.to_pylist() for column in self._reader.get_batch(number).columns]
            self._number = number
        content, rest, file, line, column, _, labels = (values[row] for values in self._columns)
        prompt, responses, (tools, template_kwargs), _ = json.loads(content)
        preferences, margins, subset, weight = _labels(labels)
        data, places = json.loads(rest)
        return Record(
            Place(_shared(file), line, column),
            _messages(prompt),
            tuple(map(_messages, responses)),
            *(preferences, margins, subset, weight, tools, data),
            tuple(Place(*each) for each in places),
            template_kwargs=template_kwargs,
        )

    def invalid_rows(self) -> Iterator[tuple[RmtoolError, Any]]:
        """Read the rows that were appended as invalid, in order."""
        for number in range(self._reader.num_record_batches):
            batch = self._reader.get_batch(number)
            for rest in batch.filter(batch.column("content").is_null()).column("rest").to_pylist():
                error, row = json.loads(rest)
                yield RmtoolError.from_dict(error), row


_ENCODER = json.JSONEncoder(default=as_json, check_circular=False)  # made once: json.dumps would make one for each call


def _json(*values: Any) -> bytes:
    """Values as JSON; what JSON lacks (dates in parquet files) as text, as `rejects.jsonl` has it."""
    return _ENCODER.encode(values).encode()


_labels_json = functools.lru_cache(1024)(_json)


def _messages(values: list[list[str]]) -> tuple[Message, ...]:
    return tuple(map(Message._make, values))


@functools.lru_cache(1024)
def _labels(text: bytes) -> tuple[tuple[tuple[int, int], ...], tuple[float | None, ...], str | None, float]:
    """Preferences, margins, subset and weight; the same objects for equal text."""
    preferences, margins, subset, weight = json.loads(text)
    return tuple((winner, loser) for winner, loser in preferences), tuple(margins), subset, weight


@functools.lru_cache(1024)
def _shared(file: bytes) -> str:
    """Decode a file's name; the same object for the same file."""
    return file.decode("utf-8", "surrogatepass")
