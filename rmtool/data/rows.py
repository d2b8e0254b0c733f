"""Rows of a file or a Hub dataset, each with its place.

In: a source: a JSONL, JSON or parquet file, plain or gzipped, or a Hub id, with `:split` if not the default.
Out: `Row`s, as they were written: nothing is cast, nothing is filled in.
Cost: JSONL and parquet are streamed; a JSON array is read whole. An own JSONL reader, because the libraries' readers
name no line, turn dates into objects and fill missing fields with None.
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rmtool.checkpoint import is_hub_id
from rmtool.data.json_errors import MAX_DEPTH, find_fault
from rmtool.data.rejects import Rejects
from rmtool.errors import Place, RmtoolError

SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz", ".parquet.gz")
KNOWN_SPLITS = {"allenai/reward-bench": "filtered"}
MAX_LINE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Row:
    """One object of the source. Lines (or items, where there are no lines) count from 1."""

    place: Place
    data: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that is none: why, and what of its text can be shown."""

    error: RmtoolError
    text: str | None = None


def read_rows(source: str, rejects: Rejects | None = None) -> Iterator[Row]:
    """The rows of `source`, in order. Malformed rows go to `rejects`; without it, the first one raises.

    Raises:
        RmtoolError: E0201 no such file, E0301 a malformed row or file, E0302 no rows at all, E0701 the Hub is not
            reachable.
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
        raise RmtoolError("E0302", "there are no rows", "give a file with at least one row", Place(source))


def _reader(source: str) -> Iterator[Row | BadRow]:
    path = Path(source)
    if _is_no_path(path):
        raise RmtoolError("E0201", f"{source[:80]}... is no name of a file", "check the path")
    if path.is_dir():
        raise RmtoolError("E0201", f"{source} is a folder", f"name a file in it ({', '.join(SUFFIXES)})")
    if not path.exists():
        if not is_hub_source(source):
            raise RmtoolError("E0201", f"there is no file {source}", "check the path")
        return _hub(source)
    if not path.is_file():
        raise RmtoolError("E0201", f"{source} is a pipe or device, and rows are read more than once", "give a file")
    name = path.name.lower()
    if name.endswith((".parquet", ".parquet.gz")):
        return _parquet(path)
    if name.endswith((".json", ".json.gz")):
        return _json(path)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _jsonl(path)
    raise RmtoolError("E0201", f"{source} is of no known kind", f"name a file that ends in {', '.join(SUFFIXES)}")


def _is_no_path(path: Path) -> bool:
    """Whether the system refuses to look for such a name: it is too long, or has a NUL in it."""
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


def _open(path: Path) -> IO[bytes]:
    try:
        with open(path, "rb") as probe:
            packed = probe.read(2) == b"\x1f\x8b"
        return gzip.open(path, "rb") if packed else open(path, "rb")  # type: ignore[return-value]
    except PermissionError as error:
        raise RmtoolError("E0501", f"{path} may not be read", "change its permissions", Place(str(path))) from error


def _jsonl(path: Path) -> Iterator[Row | BadRow]:
    try:
        with _open(path) as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                place = Place(str(path), number)
                if len(line) > MAX_LINE_BYTES:
                    _skip_line(file, line)
                    yield BadRow(_bad(place, f"the line is longer than {MAX_LINE_BYTES >> 20} MiB"))
                    continue
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield _row(line.rstrip(b"\r\n"), place)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _bad(Place(str(path)), f"the gzip data is damaged ({error})") from error


def _skip_line(file: IO[bytes], line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE_BYTES)


def _row(line: bytes, place: Place) -> Row | BadRow:
    try:
        return Row(place, _object(_parse(line, place), place))
    except RmtoolError as error:
        return BadRow(error, line.decode("utf-8", errors="backslashreplace"))


def _json(path: Path) -> Iterator[Row | BadRow]:
    try:
        with _open(path) as file:
            content = file.read().removeprefix(b"\xef\xbb\xbf")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _bad(Place(str(path)), f"the gzip data is damaged ({error})") from error
    items = _parse(content, Place(str(path), 1))
    if not isinstance(items, list):
        raise _bad(
            Place(str(path), 1), "a .json file holds one array of objects", "rename it to .jsonl if each line is one"
        )
    for number, item in enumerate(items, 1):
        place = Place(f"{path}[{number}]")
        try:
            row = Row(place, _object(item, place))
            if fault := _text_fault(item):
                raise _bad(place, fault)
            yield row
        except RmtoolError as error:
            yield BadRow(error, json.dumps(item))


def _parse(content: bytes, place: Place) -> Any:
    """The JSON value of a line, or of a whole file that begins in that line."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8")
        found = " ".join(f"{byte:02x}" for byte in content[error.start : error.end])
        raise _bad(_at(place, before, len(before)), "this is not UTF-8", found=f"bytes {found}") from error
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError):  # JSONDecodeError is a ValueError, and so is a number of thousands of digits
        raise _fault(text, place) from None
    if "\\u" in text and _has_no_character(value, text):
        raise _fault(text, place)
    if text.count("[") + text.count("{") > MAX_DEPTH and find_fault(text):
        raise _fault(text, place)
    return value


def _fault(text: str, place: Place) -> RmtoolError:
    """What is wrong with text that the fast parser refused."""
    fault = find_fault(text)
    assert fault, "two parsers that disagree"
    inside = f"{fault.path}: " if fault.path else ""
    return _bad(_at(place, text, fault.column - 1), inside + fault.what, found=fault.found)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError
    return fields


def _suspicious(name: str) -> Any:
    raise ValueError(name)  # NaN and Infinity are not JSON


def _finite_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(digits)
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_suspicious, parse_float=_finite_float)


def _has_no_character(value: Any, text: str) -> bool:
    """Whether an escape stands for NUL or for half a surrogate pair."""
    if "\\u0000" in text:
        return find_fault(text) is not None  # the backslash may itself be escaped
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    except RecursionError:  # deeper than it could be written: the slow parser says so
        return find_fault(text) is not None
    return False


def _object(value: Any, place: Place) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(place, f"a row is an object {{...}}, this is {json_kind(value)}")
    return value


def json_kind(value: Any) -> str:
    """What to call a value in an error."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _at(place: Place, text: str, offset: int) -> Place:
    """The place of a character of `text`, which begins at `place`."""
    line = text.count("\n", 0, offset)
    return Place(place.file, (place.line or 1) + line, offset - text.rfind("\n", 0, offset))


def _bad(place: Place, what: str, hint: str = "mend or remove this row", found: str | None = None) -> RmtoolError:
    return RmtoolError("E0301", what, hint, place, found)


def _text_fault(value: Any) -> str | None:
    """What a line of JSONL may not have either: NUL characters, or more text than a line may be long."""
    total = 0
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if "\0" in item:
                return "a text has the character NUL in it"
            total += len(item)
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return f"the row is longer than {MAX_LINE_BYTES >> 20} MiB" if total > MAX_LINE_BYTES else None


def _rows_of(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    """The rows of a record batch; for one that is no text or no date, the error."""
    try:
        yield from batch.to_pylist()
    except (UnicodeDecodeError, OverflowError, ValueError):
        for at in range(len(batch)):
            try:
                yield batch.slice(at, 1).to_pylist()[0]
            except (UnicodeDecodeError, OverflowError, ValueError) as error:
                yield error


def _parquet(path: Path) -> Iterator[Row | BadRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with _open(path) as file, tempfile.TemporaryFile() as unpacked:
            if isinstance(file, gzip.GzipFile):
                shutil.copyfileobj(file, unpacked)  # its reader jumps about
            table = pyarrow.parquet.ParquetFile(unpacked if isinstance(file, gzip.GzipFile) else file)
            names = table.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise _bad(Place(str(path)), f"column {', '.join(twice)} stands there twice", "keep one of the two")
            items = (item for batch in table.iter_batches() for item in _rows_of(batch))
            for number, item in enumerate(items, 1):
                place = Place(f"{path}[{number}]")
                if isinstance(item, Exception):
                    yield BadRow(_bad(place, f"a value cannot be read: {item}"))
                elif fault := _text_fault(item):
                    yield BadRow(_bad(place, fault), repr(item))
                else:
                    yield Row(place, item)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _bad(Place(str(path)), f"the gzip data is damaged ({error})") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise _bad(Place(str(path)), f"this is no readable parquet file ({error})", "write it again") from error


def _hub(source: str) -> Iterator[Row]:
    import datasets
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    name, _, split = source.partition(":")
    split = split or KNOWN_SPLITS.get(name, "train")
    try:
        rows = datasets.load_dataset(name, split=split)
    except ValueError as error:  # an unknown split or configuration
        raise RmtoolError(
            "E0203", f"{source}: {str(error).splitlines()[0]}", "write the split as owner/name:split"
        ) from error
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled, httpx2.HTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RmtoolError(
            "E0701",
            f"the dataset {name} is neither a file here nor to be had from the Hub",
            "check the name and the network, or give a local file",
            found=reason,
        ) from error
    for number, item in enumerate(rows, 1):
        yield Row(Place(f"{source}[{number}]"), dict(item))
