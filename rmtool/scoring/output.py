"""Rows with rewards as a file of the form that its name says: JSON Lines, a JSON array, each gzipped or not, parquet.

In: rows. Out: a complete file, and the names of fields that JSON cannot hold (see `rmtool.data.json_values`). In a
parquet file, a column whose values Arrow has no common type for is JSON, with the logical type that says so.
Cost: one row in memory; for parquet, BATCH rows.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from rmtool.data.json_values import as_json, as_text
from rmtool.errors import RmtoolError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
BATCH = 256


def require_supported(path: Path) -> None:
    """Check that a file of this name can be written.

    Raises:
        RmtoolError: E0206 when its suffix is none of SUFFIXES.
    """
    if not path.name.lower().endswith(SUFFIXES):
        hint = f"pass a name that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise RmtoolError("E0206", f"invalid --output: {path}", hint)


class ColumnTypes:
    """The types of the columns of a parquet file: those that hold the values of all rows."""

    def __init__(self) -> None:
        self._types: dict[str, pa.DataType] = {}
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Note the values of a row."""
        self._rows.append(row)
        if len(self._rows) == BATCH:
            self._flush()

    def schema(self) -> pa.Schema:
        """Return the schema of all rows."""
        import pyarrow as pa

        self._flush()
        return pa.schema([(name, kind if _can_write(kind) else pa.json_()) for name, kind in self._types.items()])

    def _flush(self) -> None:
        import pyarrow as pa

        for name in dict.fromkeys(itertools.chain.from_iterable(self._rows)):
            values = [row.get(name) for row in self._rows]
            try:
                schemas = [pa.schema([(name, kind)]) for kind in (self._types.get(name, pa.null()), _type_of(values))]
                self._types[name] = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
            except (pa.ArrowException, OverflowError):  # values of different types, or large integers
                self._types[name] = pa.json_()
        self._rows.clear()


def _type_of(values: list[Any]) -> pa.DataType:
    import pyarrow as pa

    kind = pa.array(values).type
    exact = pa.types.is_timestamp(kind) and any(getattr(value, "nanosecond", 0) for value in values)
    return pa.timestamp("ns", kind.tz) if exact else kind  # Arrow takes microseconds


def _can_write(kind: pa.DataType) -> bool:
    """Return whether parquet has this type: it has no objects without keys."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        pyarrow.parquet.write_table(pa.schema([("x", kind)]).empty_table(), io.BytesIO())
    except pa.ArrowException:
        return False
    return True


def write_rows(path: Path, name: str, rows: Iterable[dict[str, Any]], schema: pa.Schema | None) -> list[str]:
    """Write rows to `path`, in the form of a file called `name`; `schema` is that of a parquet file, None
    for others. Return the names of fields that JSON cannot hold.

    Raises:
        OSError: it cannot be written.
        RmtoolError: E0502 when a parquet column cannot hold a value.
    """
    changed = dict[str, None]()
    with open(path, "wb") as file:
        if schema is not None:
            _write_parquet(file, rows, schema)
        elif name.lower().endswith(".gz"):
            with gzip.GzipFile("", "wb", 6, file, 0) as packed:  # without name and time: equal rows, equal files
                _write_json(cast(IO[bytes], packed), name.lower().removesuffix(".gz"), rows, changed)
        else:
            _write_json(file, name.lower(), rows, changed)
        file.flush()
        os.fsync(file.fileno())
    return list(changed)


def _write_json(file: IO[bytes], name: str, rows: Iterable[dict[str, Any]], changed: dict[str, None]) -> None:
    array = name.endswith(".json")
    start, between, end = (b"[\n", b",\n", b"\n]\n") if array else (b"", b"", b"")
    for row in rows:
        file.write(start + _line(row, changed).encode() + (b"" if array else b"\n"))
        start = between
    file.write(end)


def _line(row: dict[str, Any], changed: dict[str, None]) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        plain = {name: as_json(value) for name, value in row.items()}
        changed.update(dict.fromkeys(name for name, value in row.items() if plain[name] != value))
        return json.dumps(plain, ensure_ascii=False)


def _write_parquet(file: IO[bytes], rows: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    source: Iterator[dict[str, Any]] = iter(rows)
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        while batch := list(itertools.islice(source, BATCH)):
            arrays = [_array([row.get(field.name) for row in batch], field) for field in schema]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def _array(values: list[Any], field: pa.Field) -> pa.Array:
    import pyarrow as pa

    if isinstance(field.type, pa.JsonType):
        text = [None if value is None else as_text(value) for value in values]
        return pa.ExtensionArray.from_storage(field.type, pa.array(text, pa.string()))
    try:
        return pa.array(values, field.type)
    except (pa.ArrowException, OverflowError) as error:  # integers beyond 2^53 in a column with floats
        what = f"cannot write {field.name} as {field.type}: {first_line(error)}"
        raise RmtoolError("E0502", what, "pass an --output that ends in .jsonl") from error
