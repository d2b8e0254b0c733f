"""Rows with rewards as a file of the form that its name says: JSON Lines, a JSON array, each gzipped or not, parquet.

In: rows, which are read twice for parquet. Out: a complete file, and the names of fields that JSON cannot hold (see
`rmtool.data.json_values`). A parquet column whose values Arrow has no common type for has the logical type JSON.
Cost: one row in memory; for parquet, BATCH rows.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from rmtool.data.json_values import as_json, as_text
from rmtool.errors import RmtoolError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
BATCH = 256
Rows = Callable[[Callable[[], None]], Iterator[dict[str, Any]]]  # makes an iterator that calls the argument per row


def require_supported(path: Path) -> None:
    """Check that a file of this name can be written.

    Raises:
        RmtoolError: E0206 when its suffix is none of SUFFIXES.
    """
    if not path.name.lower().endswith(SUFFIXES):
        hint = f"pass a name that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise RmtoolError("E0206", f"invalid --output: {path}", hint)


def write_rows(path: Path, name: str, rows: Rows, advance: Callable[[], None] = lambda: None) -> list[str]:
    """Write rows to `path`, in the form of a file called `name`. Return the names of fields that JSON cannot hold.

    Raises:
        OSError: it cannot be written.
        RmtoolError: E0502 when a parquet column cannot hold a value.
    """
    changed, name = dict[str, None](), name.lower()
    with open(path, "wb") as file:
        if name.endswith(".parquet"):
            _write_parquet(file, rows(advance), _schema(rows(lambda: None)))
        elif name.endswith(".gz"):
            with gzip.GzipFile("", "wb", 6, file, 0) as packed:  # without name and time: equal rows, equal files
                _write_json(cast(IO[bytes], packed), name.removesuffix(".gz"), rows(advance), changed)
        else:
            _write_json(file, name, rows(advance), changed)
        file.flush()
        os.fsync(file.fileno())
    return list(changed)


def _write_json(file: IO[bytes], name: str, rows: Iterator[dict[str, Any]], changed: dict[str, None]) -> None:
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


def _schema(rows: Iterator[dict[str, Any]]) -> pa.Schema:
    """Return the columns of a parquet file, each of the type that holds the values of all rows."""
    import pyarrow as pa

    types: dict[str, pa.DataType] = {}
    while batch := list(itertools.islice(rows, BATCH)):
        for name in dict.fromkeys(itertools.chain.from_iterable(batch)):
            try:
                kinds = (types.get(name, pa.null()), _type_of([row.get(name) for row in batch]))
                schemas = [pa.schema([(name, kind)]) for kind in kinds]
                types[name] = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
            except (pa.ArrowException, OverflowError):  # values of different types, or large integers
                types[name] = pa.json_()
    return pa.schema([(name, kind if _can_write(kind) else pa.json_()) for name, kind in types.items()])


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


def _write_parquet(file: IO[bytes], rows: Iterator[dict[str, Any]], schema: pa.Schema) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        while batch := list(itertools.islice(rows, BATCH)):
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
