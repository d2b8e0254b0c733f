"""Rows of a file or a Hub dataset, each with its place.

In: a source: a JSONL, JSON, parquet or Arrow file, plain or gzipped, or a Hub id, with `:split` if not the default.
Out: `Row`s, as they were written: nothing is cast, nothing is filled in.
Cost: all but a JSON array, which is loaded into memory, are streamed. JSONL has its own reader, because those of
libraries report no line numbers, turn dates into objects and fill missing fields with None.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rmtool.checkpoint import is_hub_id
from rmtool.data.arrow_rows import dataset_rows, file_rows, load_hub_dataset
from rmtool.data.file_kinds import BOM, MAX_LINE_BYTES, SUFFIXES, open_file, unpacked
from rmtool.data.json_errors import JsonError, parse_json
from rmtool.data.json_values import as_text
from rmtool.data.rejects import Rejects
from rmtool.errors import Place, RmtoolError

FIX_ROW = "fix or remove this row, or pass --on-bad-row skip"
_TOO_LONG = f"longer than {MAX_LINE_BYTES >> 20} MiB"
_FIX_FILE = "fix the file: it must be one array of objects, or have one object per line"


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
    if not _is_invalid_name(Path(source)) and is_hub_source(source):
        return _numbered(source, dataset_rows(load_hub_dataset(source)))
    require_file(source)
    return _file(Path(source))


def require_file(source: str) -> None:
    """Check that a file exists and is of a supported type, by its name and its first lines.

    Raises:
        RmtoolError: E0201 when it is not, E0301 when its gzip data is corrupted, E0501 when it is not readable.
    """
    path = Path(source)
    if _is_invalid_name(path):
        raise RmtoolError("E0201", f"invalid file name: {source[:80]}...", "check the path")
    if path.is_dir():
        raise _folder(path)
    if not path.exists():
        raise RmtoolError("E0201", f"file not found: {source}", "check the path")
    if not path.is_file():  # rows are read more than once
        raise RmtoolError("E0201", f"cannot read {source}: pipes and devices are not supported", "pass a file")
    with open_file(path):
        pass


def _folder(path: Path) -> RmtoolError:
    hint = f"pass a file in it ({', '.join(SUFFIXES)})"
    splits = (path / "dataset_dict.json").is_file()
    if splits or (path / "state.json").is_file():  # as Dataset.save_to_disk writes it
        split = "['train']" if splits else ""
        hint = f"write a file in Python: datasets.load_from_disk({str(path)!r}){split}.to_parquet('rows.parquet')"
    return RmtoolError("E0201", f"{path} is a folder", hint)


def _file(path: Path) -> Iterator[Row | InvalidRow]:
    with open_file(path) as (file, kind):
        yield from _READERS[kind](path, file)


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


def _invalid(place: Place, what: str, hint: str = FIX_ROW, found: str | None = None) -> RmtoolError:
    return RmtoolError("E0301", what, hint, place, found)


# ------------------------------------------------------------------------------------------------- JSONL, JSON


def _jsonl(path: Path, file: IO[bytes]) -> Iterator[Row | InvalidRow]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        place = Place(str(path), number)
        if len(line) > MAX_LINE_BYTES:
            _skip_line(file, line)
            yield InvalidRow(_invalid(place, f"line {_TOO_LONG}"))
            continue
        if number == 1:
            line = line.removeprefix(BOM)
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


def _json(path: Path, file: IO[bytes]) -> Iterator[Row | InvalidRow]:
    items = _parse(file.read().removeprefix(BOM), Place(str(path), 1), _FIX_FILE)
    if not isinstance(items, list):
        hint = "rename it to .jsonl if each line is an object"
        if isinstance(items, dict) and (inner := [name for name, value in items.items() if isinstance(value, list)]):
            hint = f"write a file of the list in it, e.g. with jq '.[\"{inner[0]}\"]'"
        raise _invalid(Place(str(path), 1), "a .json file must contain one array of objects", hint, json_kind(items))
    for number, item in enumerate(items, 1):
        place = Place(f"{path}[{number}]")
        try:
            yield _checked(_object(item, place), place)
        except RmtoolError as error:
            yield InvalidRow(error, json.dumps(item))


def _parse(content: bytes, place: Place, hint: str = FIX_ROW) -> Any:
    """Parse the JSON of a line, or of a file that begins in that line."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8")
        found = " ".join(f"{byte:02x}" for byte in content[error.start : error.end])
        raise _invalid(_at(place, before, len(before)), "invalid UTF-8", hint, f"bytes {found}") from error
    try:
        return parse_json(text)
    except JsonError as error:
        raise _invalid(_at(place, text, error.column - 1), error.what, hint, error.found) from None


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
                return InvalidRow(_invalid(place, "NUL character"), as_text(row))
            total += len(item)
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    if total > MAX_LINE_BYTES:
        return InvalidRow(_invalid(place, f"row {_TOO_LONG}"), as_text(row))
    return Row(place, row)


# --------------------------------------------------------------------------------------- parquet, Arrow, Hub


def _arrow(path: Path, file: IO[bytes]) -> Iterator[Row | InvalidRow]:
    import pyarrow

    try:
        with unpacked(file) as seekable:
            yield from _numbered(str(path), file_rows(seekable, str(path)))
    except (pyarrow.ArrowException, OSError) as error:
        raise _invalid(
            Place(str(path)), f"cannot read parquet or Arrow data: {error}", "create the file again"
        ) from error


def _numbered(source: str, rows: Iterable[dict[str, Any] | Exception]) -> Iterator[Row | InvalidRow]:
    for number, row in enumerate(rows, 1):
        place = Place(f"{source}[{number}]")
        if isinstance(row, Exception):
            yield InvalidRow(_invalid(place, f"cannot read a value: {row}"))
        else:
            yield _checked(row, place)


_READERS = {"lines": _jsonl, "array": _json, "arrow": _arrow}
