"""Rows to score: a prompt and responses, or a complete conversation.

In: `Row`s. Out: `Record`s without preferences.
Cost: string work only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rmtool.data import parsers
from rmtool.data.field_names import has_content, is_messages
from rmtool.data.fields import check_unread, renamed, shown_fields
from rmtool.data.layouts import alpaca_prompt, ends_before_response, orca_prompt, prompt_in, swift_query
from rmtool.data.messages import invalid_row
from rmtool.data.record import PLAIN, Messages, Record, RowOptions
from rmtool.data.rows import Row
from rmtool.errors import RmtoolError

# The first that a row has.
_RESPONSES = ("responses", "response", "output", "messages", "conversations")
_CONVERSATIONS = ("messages", "conversations")
SCORE_FIELDS = parsers.COMMON_FIELDS | {*_RESPONSES, "prompt", "instruction", "input", "history", "question", "query"}
_LIKELY = ("answer", "answers", "completion", "completions", "output", "outputs", "reply", "generations", "text")
_OUTPUT = ("reward", "rewards", "best")


def score_record(row: Row, options: RowOptions = PLAIN, unread: set[str] | None = None) -> Record:
    """Return the record of a row to score; `unread` gets the names of fields that are not read.

    Raises:
        RmtoolError: E0303 when a field is missing or invalid, or an unread one could be part of the conversation.
    """
    if taken := [name for name in _OUTPUT if name in row.data]:
        hint = "rename or remove this field; the output has its own"
        raise invalid_row(row, f'the row already has "{taken[0]}"', hint=hint)
    row = renamed(row, options)
    name = _response_field(row.data)
    if name is None:
        raise _missing(row)
    prompt, read = _prompt(row, name)
    values = parsers.items_of(row, name) if name == "responses" else {name: row.data[name]}
    if name in _CONVERSATIONS:
        parsers.items_of(row, name)  # a list
    record = parsers.record_of(row, prompt, values)
    check_unread(row, record, parsers.COMMON_FIELDS.union((name, *read)), unread)
    return record


def has_list(row: Row, options: RowOptions) -> bool:
    """Return whether a row that was read has a list of responses."""
    return _response_field(renamed(row, options).data) == "responses"


def _response_field(data: dict[str, Any]) -> str | None:
    """Return the field with the response; `output` is one in the alpaca layout only."""
    for name in _RESPONSES:
        held = has_content(data.get(name)) if name in _CONVERSATIONS else data.get(name) is not None
        if held and (name != "output" or "instruction" in data):
            return name
    return None


def _prompt(row: Row, response: str) -> tuple[Messages, tuple[str, ...]]:
    """Return the prompt and the fields that it is read from."""
    data = row.data
    if response in _CONVERSATIONS:
        return parsers.with_system(row, ()), ()
    layouts: list[tuple[Any, tuple[str, ...], Callable[[Row], Messages]]] = [
        (data.get("prompt"), ("prompt",), parsers.full_prompt),
        (data.get("instruction"), ("instruction", "input", "history"), alpaca_prompt),
        (data.get("query"), ("query", "history"), swift_query),
        ("system" in data and data.get("question"), ("question",), orca_prompt),
        ("system" in data and data.get("input"), ("input",), orca_prompt),
        *((ends_before_response(data.get(name)), (name,), prompt_in(name)) for name in _CONVERSATIONS),
    ]
    for fits, fields, read in layouts:
        if fits:
            return read(row), fields
    return parsers.full_prompt(row), ("prompt",)


def _missing(row: Row) -> RmtoolError:
    """Return the error of a row without responses, with the mapping of the field that probably has them."""
    chats = [name for name, value in row.data.items() if is_messages(value)]
    likely = [name for name in row.data if name in _LIKELY] + ["COLUMN"]
    target = "responses" if isinstance(row.data.get(likely[0]), list) else "response"
    mapping = f"messages={chats[0]}" if chats else f"{target}={likely[0]}"
    what, hint = '"response", "responses" or "messages" is missing', f"set data.columns.{mapping}"
    return invalid_row(row, what, shown_fields(row), hint)
