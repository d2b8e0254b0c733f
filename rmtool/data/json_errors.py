"""Strict JSON: a row may have no duplicate keys, NaN, NUL or unpaired surrogates, which the standard library accepts.

In: the text of a line or file. Out: its value, or a `JsonError` with the column.
Cost: the standard library's parser. Only text that may have an error is tokenized in Python, at 1.5 to 60 MB/s.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DEPTH = 64
_SHOWN = 20  # characters of what was found
# Possessive (`*+`), because backtracking takes memory for each escape. In valid JSON, only strings have backslashes.
_TOKEN = re.compile(
    r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?(?P<key>[ \t\n\r]*+:)?|[][{}]|-?(?:\d[\d.eE+-]*+|Infinity)|NaN', re.DOTALL
)
_SURROGATE_PAIR = r"[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_ALLOWED_ESCAPES = re.compile(rf"(?:[^\\]++|\\(?:[^u]|u(?:{_SURROGATE_PAIR}|(?!0000|[dD][89a-fA-F]))))*+")


class JsonError(Exception):
    """Where text is not valid JSON, or not allowed in a row. `column` counts characters from 1."""

    def __init__(self, column: int, what: str, found: str):
        super().__init__(what)
        self.column, self.what, self.found = column, what, found


def parse_json(text: str) -> Any:
    """Parse one JSON value.

    Raises:
        JsonError: when it is not valid, has a duplicate key, NaN, infinity, NUL or an unpaired surrogate, or is nested
            more than MAX_DEPTH deep.
    """
    try:
        value = _STRICT.decode(text)
    except (ValueError, RecursionError):  # ValueError: JSONDecodeError, or an integer of thousands of digits
        error = locate_json_error(text)
        assert error, "the parser failed, but no error was found"
        raise error from None
    # Brackets in strings count, too, but in most rows there are fewer.
    deep = text.count("[") + text.count("{") > MAX_DEPTH
    if (deep or _allowed(text) < len(text)) and (error := locate_json_error(text)):
        raise error
    return value


def locate_json_error(text: str) -> JsonError | None:
    """Return the first error of text that is not one JSON value, or is not allowed in a row."""
    at, what = len(text), ""
    try:
        _LENIENT.decode(text)
    except json.JSONDecodeError as error:
        at, what = error.pos, f"invalid JSON: {error.msg[0].lower()}{error.msg[1:]}".removesuffix(" at")
        what = "extra data after the JSON value" if error.msg == "Extra data" else what.removesuffix(" starting")
    except RecursionError:
        pass  # nested too deep, which is found below
    if (escape := _allowed(text)) < at:
        at, what = escape, "NUL character" if text.startswith("\\u0000", escape) else "unpaired surrogate"
    keys: list[set[str]] = []  # of the objects and arrays that are open
    for token in _TOKEN.finditer(text, 0, at):
        if problem := _problem(token, keys):
            at, what = token.start(), problem
            break
    if not what:
        return None
    rest = text[at : at + _SHOWN]
    return JsonError(at + 1, what, repr(rest) if rest else "the end of the line")


def _problem(token: re.Match[str], keys: list[set[str]]) -> str | None:
    """Return what is not allowed about a token of text that is valid up to here."""
    first = token.string[token.start()]
    if first in "[{":
        keys.append(set())
        return f"nested more than {MAX_DEPTH} deep" if len(keys) > MAX_DEPTH else None
    if first in "]}":
        keys.pop()
    elif first != '"':
        return _number_problem(token[0])
    elif token["key"]:
        key = json.loads(token[0].rstrip(": \t\n\r"))
        if key in keys[-1]:
            return "duplicate key"
        keys[-1].add(key)
    return None


def _number_problem(number: str) -> str | None:
    if number.lstrip("-").startswith(("N", "I")):
        return "NaN and Infinity are not valid JSON"
    try:
        too_large = json.loads(number) in (math.inf, -math.inf)
    except ValueError:  # an integer of thousands of digits
        too_large = True
    return "number too large" if too_large else None


def _allowed(text: str) -> int:
    """Return where the first NUL or unpaired surrogate is, or the length of the text."""
    if "\\u" not in text:
        return len(text)
    match = _ALLOWED_ESCAPES.match(text)
    assert match
    return match.end()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("duplicate key")
    return fields


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(number)
    return value


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
_LENIENT = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=len)
