"""Where a line of JSON is wrong: column, path inside the row, and what stood there.

In: text that a fast parser has refused, or that may hold what JSON allows and we do not (half a surrogate pair, NUL).
Out: the first `Fault`, or None.
Cost: a walk in Python, about 2 MB/s; only lines that are suspect pay it.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # the standard library's own scanner of strings

MAX_DEPTH = 64
_BLANK = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?")
_CONSTANTS = ("true", "false", "null")
_HALF = re.compile(r"[\ud800-\udfff]")
# One backslash before all of them, so that the text between escapes is passed over quickly.
_ESCAPE = re.compile(
    r"\\(?:(?P<pair>u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    r"|(?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2})|(?P<nul>u0000)|(?P<other>.))"
)
_SHOWN = 20  # characters of what was found


@dataclass(frozen=True)
class Fault:
    """`column` counts characters from 1; `path` is like messages[2].content, empty at the top."""

    column: int
    path: str
    what: str
    found: str


class _FoundError(Exception):
    def __init__(self, at: int, path: str, what: str):
        self.at, self.path, self.what = at, path, what


def find_fault(text: str) -> Fault | None:
    """The first thing in `text` that is not one JSON value, or not allowed in one."""
    try:
        end = _blank(text, _value(text, _blank(text, 0), "", 0))
        if end < len(text):
            raise _FoundError(end, "", "the line goes on after its value")
    except _FoundError as found:
        rest = text[found.at : found.at + _SHOWN]
        return Fault(found.at + 1, found.path, found.what, repr(rest) if rest else "the end of the line")
    return None


def _blank(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    assert match
    return match.end()


def _value(text: str, at: int, path: str, depth: int) -> int:
    """The end of the value that begins at `at`."""
    first = text[at : at + 1]
    if first == '"':
        return _string(text, at, path)[1]
    if first in ("{", "["):
        if depth == MAX_DEPTH:
            raise _FoundError(at, "", f"this is nested more than {MAX_DEPTH} deep")
        return (_object if first == "{" else _array)(text, at + 1, path, depth + 1)
    for constant in _CONSTANTS:
        if text.startswith(constant, at):
            return at + len(constant)
    match = _NUMBER.match(text, at)
    if not match:
        raise _FoundError(at, path, "a value was expected")
    _refuse_huge(match.group(), at, path)
    return match.end()


def _refuse_huge(number: str, at: int, path: str) -> None:
    try:
        value = json.loads(number)
    except ValueError:  # thousands of digits
        raise _FoundError(at, path, "this number is too large") from None
    if isinstance(value, float) and math.isinf(value):
        raise _FoundError(at, path, "this number is too large")


def _string(text: str, at: int, path: str) -> tuple[str, int]:
    try:
        content, end = scanstring(text, at + 1, True)
    except json.JSONDecodeError as error:
        what = error.msg.partition(" at")[0].removesuffix(" starting").lower()
        raise _FoundError(error.pos, path, f"this is no JSON string ({what})") from None
    half = _HALF.search(content)
    if half or "\0" in content:
        what = "there is half a surrogate pair, which is no character" if half else "there is a NUL character"
        raise _FoundError(_escape_at(text, at + 1, half is None), path, what)
    return content, end


def _escape_at(text: str, at: int, nul: bool) -> int:
    """Where the escape stands that makes a NUL, or half a surrogate pair."""
    for match in _ESCAPE.finditer(text, at):
        if match.lastgroup == ("nul" if nul else "half"):
            return match.start()
    raise AssertionError("no such escape")


def _object(text: str, at: int, path: str, depth: int) -> int:
    seen = set[str]()
    at = _blank(text, at)
    if text[at : at + 1] == "}":
        return at + 1
    while True:
        if text[at : at + 1] != '"':
            raise _FoundError(at, path, "a field's name in quotes was expected")
        name, end = _string(text, at, path)
        inner = f"{path}.{name}" if path else name
        if name in seen:
            raise _FoundError(at, inner, "this field stands there twice")
        seen.add(name)
        at = _blank(text, end)
        if text[at : at + 1] != ":":
            raise _FoundError(at, inner, "a colon was expected")
        at = _blank(text, _value(text, _blank(text, at + 1), inner, depth))
        if text[at : at + 1] == "}":
            return at + 1
        if text[at : at + 1] != ",":
            raise _FoundError(at, path, "a comma or } was expected")
        at = _blank(text, at + 1)


def _array(text: str, at: int, path: str, depth: int) -> int:
    at = _blank(text, at)
    if text[at : at + 1] == "]":
        return at + 1
    count = 0
    while True:
        at = _blank(text, _value(text, at, f"{path}[{count}]", depth))
        count += 1
        if text[at : at + 1] == "]":
            return at + 1
        if text[at : at + 1] != ",":
            raise _FoundError(at, path, "a comma or ] was expected")
        at = _blank(text, at + 1)
