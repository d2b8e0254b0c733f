"""What a file contains, by its first bytes; its name may say something else.

In: a path. Out: the open file, decompressed, and its kind: lines, array or arrow (parquet, too).
Cost: its first two lines are read.
"""

from __future__ import annotations

import contextlib
import gzip
import re
import shlex
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from rmtool.errors import Place, RmtoolError

MAX_LINE_BYTES = 16 * 2**20
BOM = b"\xef\xbb\xbf"
_KINDS = {".jsonl": "lines", ".json": "array", ".parquet": "arrow", ".arrow": "arrow"}
SUFFIXES = (*_KINDS, *(f"{suffix}.gz" for suffix in _KINDS))
_ARROW = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")  # the last: a stream, as `datasets` writes it
# First bytes of what is not read: what it is, and what to do. {} is the file.
_UTF16 = ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 {}")
_UNSUPPORTED = {
    b"\x28\xb5\x2f\xfd": ("zstd data", "decompress it: zstd -d {}"),
    b"BZh": ("bzip2 data", "decompress it: bzip2 -d {}"),
    b"\xfd7zXZ\0": ("xz data", "decompress it: xz -d {}"),
    b"\x04\x22\x4d\x18": ("lz4 data", "decompress it: lz4 -d {}"),
    b"PK\x03\x04": ("a zip archive", "extract it: unzip {}"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "extract it: 7z x {}"),
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
    b"{\0": _UTF16,
    b"[\0": _UTF16,
    b"\0{": _UTF16,
    b"\0[": _UTF16,
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "download the file: git lfs pull"),
    **dict.fromkeys((b"<!DOCTYPE", b"<!doctype", b"<html", b"<?xml"), ("a web page", "download the file itself")),
}
_CSV = re.compile(rb'"?[A-Za-z_][\w .-]*"?(?:(?P<separator>[,;\t])"?[A-Za-z_][\w .-]*"?)+')  # a header


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[tuple[IO[bytes], str]]:
    """Open a file, gzipped or not, and recognize its kind: lines (of JSON), array or arrow.

    Raises:
        RmtoolError: E0201 when it is unsupported, E0301 when its gzip data is corrupted, E0501 when it is not readable.
    """
    try:
        with open(path, "rb") as raw:
            gzipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            file = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if gzipped else raw
            yield file, _recognize(path, file)
    except PermissionError as error:
        raise RmtoolError(
            "E0501", f"cannot read {path}: {error.strerror}", "change its permissions", Place(str(path))
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        hint = "check the file with gzip -t, and create it again"
        raise RmtoolError("E0301", f"corrupted gzip data: {error}", hint, Place(str(path))) from error


@contextlib.contextmanager
def unpacked(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """A file that can be read in random order: itself, or a temporary one with what gzip has."""
    if not isinstance(file, gzip.GzipFile):
        yield file
        return
    with tempfile.TemporaryFile() as temporary:
        shutil.copyfileobj(file, temporary)
        temporary.seek(0)
        yield temporary


def _recognize(path: Path, file: IO[bytes]) -> str:
    head, lines = file.read(512), _first_lines(file)
    kinds = (kind for suffix, kind in _KINDS.items() if path.name.lower().endswith((suffix, f"{suffix}.gz")))
    named = next(kinds, None)
    for what, hint in _unsupported(head, lines, named):
        raise RmtoolError("E0201", f"{path} contains {what}", hint.format(shlex.quote(str(path)), path))
    if not named:
        raise RmtoolError("E0201", f"unsupported file type: {path}", f"pass a file that ends in {', '.join(SUFFIXES)}")
    if head.startswith(_ARROW):
        return "arrow"
    first, second = (*lines, b"", b"")[:2]
    if first.startswith(b"[") and not (first.endswith(b"]") and second):  # else lines, of which the first is invalid
        return "array"
    lines_of_json = first.startswith(b"{") and (second.startswith(b"{") or named == "arrow")
    return "lines" if lines_of_json else named


def _unsupported(head: bytes, lines: list[bytes], named: str | None) -> Iterator[tuple[str, str]]:
    """Yield what the file contains that is not read, and what to do."""
    yield from (
        found for start, found in _UNSUPPORTED.items() if head.startswith(start) and not head.startswith(_ARROW)
    )
    if head[257:262] == b"ustar":
        yield "a tar archive", "extract it: tar -xf {}"
    if lines and (header := _CSV.fullmatch(lines[0])):
        separator = {b",": "", b";": ", sep=';'", b"\t": r", sep='\t'"}[header["separator"]]
        read = f"pandas.read_csv('{{1}}'{separator})"
        yield "CSV", f"convert it in Python: {read}.to_json('rows.jsonl', orient='records', lines=True)"
    if lines[:1] == [b"{"] and named == "lines" and lines[1:] and lines[1].startswith(b'"'):
        yield "an object over several lines", "write each object in one line: jq -c . {}"


def _first_lines(file: IO[bytes]) -> list[bytes]:
    """Return the first two lines that are not blank, stripped, and go back to the beginning."""
    file.seek(0)
    lines = list[bytes]()
    while len(lines) < 2 and (line := file.readline(MAX_LINE_BYTES)):
        if line := line.removeprefix(BOM).strip():
            lines.append(line)
    file.seek(0)
    return lines
