"""Rows of a file or a Hub dataset, each with its place.

In: a source: a JSONL, JSON or parquet file, plain or gzipped, or a Hub id, with `:split` if not the default.
Out: `Row`s, as they were written: nothing is cast, nothing is filled in.
Cost: JSONL and parquet are streamed; a JSON array is loaded into memory. JSONL has its own reader, because those of
libraries report no line numbers, turn dates into objects and fill missing fields with None.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rmtool.checkpoint import is_hub_id
from rmtool.data.json_errors import JsonError, parse_json
from rmtool.data.rejects import Rejects
from rmtool.errors import Place, RmtoolError, first_line

KNOWN_SPLITS = {"allenai/reward-bench": "filtered"}
MAX_LINE_BYTES = 16 * 2**20
FIX_ROW = "fix or remove this row, or pass --on-bad-row skip"
_TOO_LONG = f"longer than {MAX_LINE_BYTES >> 20} MiB"
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One object of the source. Lines (or items, where there are no lines) count from 1."""

    place: Place
    data: dict[str, Any]


@dataclass(frozen=True)
class InvalidRow:
    """A row that cannot be parsed: why, and its text where it can be shown."""

    error: RmtoolError
    text: str | None = None


def read_rows(source: str, rejects: Rejects | None = None) -> Iterator[Row]:
    """Read the rows of `source`, in order. Invalid rows go to `rejects`; without it, the first one raises.

    Raises:
        RmtoolError: E0201 when the file is not found or unsupported, E0203 when the split is unknown, E0301 when a row
            or the file is invalid, E0302 when there are no rows, E0501 when the file is not readable, E0701 when the
            dataset is not found on the Hub.
    """
    empty = True
    for item in _reader(source):
        empty = False
        if isinstance(item, Row):
            yield item
        elif rejects is None:
            raise item.error
        else:
            rejects.add(item.error, item.text)
    if empty:
        raise RmtoolError("E0302", "no rows found", "add at least one row", Place(source))


def _reader(source: str) -> Iterator[Row | InvalidRow]:
    path, suffixes = Path(source), ", ".join(SUFFIXES)
    if _is_invalid_name(path):
        raise RmtoolError("E0201", f"invalid file name: {source[:80]}...", "check the path")
    if path.is_dir():
        raise RmtoolError("E0201", f"{source} is a folder", f"pass a file in it ({suffixes})")
    if not path.exists():
        if not is_hub_source(source):
            raise RmtoolError("E0201", f"file not found: {source}", "check the path")
        return _hub(source)
    if not path.is_file():  # rows are read more than once
        raise RmtoolError("E0201", f"cannot read {source}: pipes and devices are not supported", "pass a file")
    for suffix, reader in _READERS.items():
        if path.name.lower().endswith((suffix, f"{suffix}.gz")):
            return reader(path)
    raise RmtoolError("E0201", f"unsupported file type: {source}", f"pass a file that ends in {suffixes}")


def _is_invalid_name(path: Path) -> bool:
    """Return whether the system refuses such a name: it is too long, or contains NUL."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        return not isinstance(error, PermissionError | NotADirectoryError)
    return False


def is_hub_source(source: str) -> bool:
    """Decide whether `source` is a Hub dataset, `owner/name` or `owner/name:split`, and not a file."""
    return not Path(source).exists() and is_hub_id(source.partition(":")[0])


@contextlib.contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, gzipped or not."""
    try:
        with open(path, "rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            yield gzip.GzipFile(fileobj=file) if gzipped else file  # type: ignore[misc]
    except PermissionError as error:
        raise RmtoolError(
            "E0501", f"cannot read {path}: {error.strerror}", "change its permissions", Place(str(path))
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        hint = "check the file with gzip -t, and create it again"
        raise _invalid(Place(str(path)), f"corrupted gzip data: {error}", hint) from error


def _invalid(place: Place, what: str, hint: str = FIX_ROW, found: str | None = None) -> RmtoolError:
    return RmtoolError("E0301", what, hint, place, found)


# ------------------------------------------------------------------------------------------------- JSONL, JSON


def _jsonl(path: Path) -> Iterator[Row | InvalidRow]:
    with _open(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            place = Place(str(path), number)
            if len(line) > MAX_LINE_BYTES:
                _skip_line(file, line)
                yield InvalidRow(_invalid(place, f"line {_TOO_LONG}"))
                continue
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield _row(line.rstrip(b"\r\n"), place)


def _skip_line(file: IO[bytes], line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE_BYTES)


def _row(line: bytes, place: Place) -> Row | InvalidRow:
    try:
        return Row(place, _object(_parse(line, place), place))
    except RmtoolError as error:
        return InvalidRow(error, line.decode("utf-8", errors="backslashreplace"))


def _json(path: Path) -> Iterator[Row | InvalidRow]:
    with _open(path) as file:
        content = file.read().removeprefix(_BOM)
    items = _parse(content, Place(str(path), 1))
    if not isinstance(items, list):
        hint = "rename it to .jsonl if each line is an object"
        raise _invalid(Place(str(path), 1), "a .json file must contain one array of objects", hint, json_kind(items))
    for number, item in enumerate(items, 1):
        place = Place(f"{path}[{number}]")
        try:
            yield _checked(_object(item, place), place)
        except RmtoolError as error:
            yield InvalidRow(error, json.dumps(item))


def _parse(content: bytes, place: Place) -> Any:
    """Parse the JSON of a line, or of a file that begins in that line."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8")
        found = " ".join(f"{byte:02x}" for byte in content[error.start : error.end])
        raise _invalid(_at(place, before, len(before)), "invalid UTF-8", found=f"bytes {found}") from error
    try:
        return parse_json(text)
    except JsonError as error:
        raise _invalid(_at(place, text, error.column - 1), error.what, found=error.found) from None


def _at(place: Place, text: str, offset: int) -> Place:
    """Return the place of a character of `text`, which begins at `place`."""
    line = text.count("\n", 0, offset)
    return Place(place.file, (place.line or 1) + line, offset - text.rfind("\n", 0, offset))


def _object(value: Any, place: Place) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _invalid(place, "a row must be an object {...}", found=json_kind(value))
    return value


def json_kind(value: Any) -> str:
    """Return the name of a value's type for errors."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _checked(row: dict[str, Any], place: Place) -> Row | InvalidRow:
    """Refuse what a line of JSONL may not have either: NUL characters, or more text than the longest line."""
    total = 0
    waiting: list[Any] = [row]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if "\0" in item:
                return InvalidRow(_invalid(place, "NUL character"), json.dumps(row, default=str))
            total += len(item)
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    if total > MAX_LINE_BYTES:
        return InvalidRow(_invalid(place, f"row {_TOO_LONG}"), json.dumps(row, default=str))
    return Row(place, row)


# ------------------------------------------------------------------------------------------------- parquet, Hub


def _parquet(path: Path) -> Iterator[Row | InvalidRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with _open(path) as file, tempfile.TemporaryFile() as unpacked:
            if isinstance(file, gzip.GzipFile):
                shutil.copyfileobj(file, unpacked)  # parquet is read in random order
            table = pyarrow.parquet.ParquetFile(unpacked if isinstance(file, gzip.GzipFile) else file)
            names = table.schema_arrow.names
            if duplicates := sorted({name for name in names if names.count(name) > 1}):
                hint = "rename or remove one of the two"
                raise _invalid(Place(str(path)), f"duplicate column {', '.join(duplicates)}", hint)
            rows = (row for batch in table.iter_batches() for row in _batch_rows(batch))
            for number, row in enumerate(rows, 1):
                place = Place(f"{path}[{number}]")
                if isinstance(row, Exception):
                    yield InvalidRow(_invalid(place, f"cannot read a value: {row}"))
                else:
                    yield _checked(row, place)
    except (pyarrow.ArrowException, OSError) as error:
        raise _invalid(Place(str(path)), f"cannot read parquet: {error}", "create the file again") from error


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    """Return the rows of a record batch; for one that is not text or not a date, the error."""
    try:
        yield from batch.to_pylist()
    except (UnicodeDecodeError, OverflowError, ValueError):
        for at in range(len(batch)):
            try:
                yield batch.slice(at, 1).to_pylist()[0]
            except (UnicodeDecodeError, OverflowError, ValueError) as error:
                yield error


@functools.lru_cache(8)  # a dataset that was identified is the one that is read
def load_hub_dataset(source: str) -> Any:
    """Load a Hub dataset.

    Raises:
        RmtoolError: E0203 when the split is unknown; E0701 when the Hub is not reachable, or has no such dataset.
    """
    import datasets
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    name, _, split = source.partition(":")
    split = split or KNOWN_SPLITS.get(name, "train")
    try:
        return datasets.load_dataset(name, split=split)
    except ValueError as error:  # an unknown split or configuration
        raise RmtoolError("E0203", f"{source}: {first_line(error)}", "set the split as owner/name:split") from error
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled, httpx2.HTTPError) as error:
        hint = "check the name and the network, or pass a local file"
        what = f"cannot find the dataset {name} locally or on the Hub"
        raise RmtoolError("E0701", what, hint, found=first_line(error)) from error


def _hub(source: str) -> Iterator[Row]:
    for number, item in enumerate(load_hub_dataset(source), 1):
        yield Row(Place(f"{source}[{number}]"), dict(item))


_READERS = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
SUFFIXES = (*_READERS, *(f"{suffix}.gz" for suffix in _READERS))
