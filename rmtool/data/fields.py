"""Fields of a row under our names, and those that nobody reads.

In: a row, the user's mapping of columns, and the fields that a format reads. Out: the row under our names; an error
where an unread field could be part of the conversation, by the rule in `field_names.py`.
Cost: 0.7 us per row without suspicious fields: which names to look at is remembered.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Collection
from typing import Any

from rmtool.data.field_names import (
    Kind,
    begins_response,
    by_likelihood,
    conversation_part,
    has_content,
    holds_media,
    is_message,
    is_messages,
    kind_of,
    target_of,
    texts,
)
from rmtool.data.messages import invalid_row, role_of
from rmtool.data.notations import JSON_OPENINGS, unpacked_messages
from rmtool.data.record import Record, RowOptions, has_no_prompt
from rmtool.data.rows import Row
from rmtool.errors import RmtoolError

_EQUAL_ONLY = 20  # characters; shorter text can be inside other text by chance
IGNORE = "ignore"  # maps the columns that are not to be read, separated by commas


def require_known_columns(options: RowOptions, known: Collection[str]) -> None:
    """Check that only fields that some format reads are mapped: others would be ignored without notice.

    Raises:
        RmtoolError: E0204 when no format reads such a field.
    """
    for ours, theirs in options.columns:
        if ours not in known and ours != IGNORE:
            near = difflib.get_close_matches(ours, known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(sorted(known))}"
            raise RmtoolError("E0204", f"unknown field {ours} in data.columns.{ours}={theirs}", hint)


def renamed(row: Row, options: RowOptions) -> Row:
    """Return the row with our field names in place of the source's, without the columns that are ignored, and messages
    that are written in another way as messages.

    Raises:
        RmtoolError: E0303 when the row has no such column, or also one of our name.
    """
    looked_at = [name for name, each in row.data.items() if not isinstance(each, str) or each[:1] in JSON_OPENINGS]
    if changed := _unpacked(row, looked_at):
        row = Row(row.place, row.data | changed)
    if not options.columns:
        return row
    data = dict(row.data)
    for ours, theirs in sorted(options.columns, key=lambda column: column[0] != IGNORE):
        for name in theirs.split(",") if ours == IGNORE else [theirs]:
            data = _without(data, name.strip())
    for ours, theirs in options.columns:
        if ours != IGNORE:
            _refuse_replaced(row, data.get(ours), ours, theirs)
            data[ours] = unpacked_messages(_column(row, ours, theirs))
    return Row(row.place, data)


def _without(data: dict[str, Any], path: str) -> dict[str, Any]:
    """Return an object without the field at a path; the rest of what is around it, by paths, is still checked."""
    root, _, rest = path.partition(".")
    others, inner = {name: value for name, value in data.items() if name not in (path, root)}, data.get(root)
    if path in data or not rest or not isinstance(inner, dict):
        return {name: value for name, value in data.items() if name != path}
    return others | {f"{root}.{name}": value for name, value in _without(inner, rest).items()}


def _unpacked(row: Row, names: list[str]) -> dict[str, Any]:
    values = ((name, row.data[name]) for name in names)
    return {name: new for name, each in values if (new := unpacked_messages(each)) is not each}


def _refuse_replaced(row: Row, value: Any, ours: str, theirs: str) -> None:
    """Refuse a mapping that would leave out text under our name, unless the mapped field is a part of it."""
    if any(texts(value)) and theirs.partition(".")[0] != ours:
        hint = f"set data.columns.{IGNORE}={ours} to leave the row's own out, or rename one of the two"
        raise invalid_row(row, f'"{ours}" is mapped to "{theirs}", but the row has a "{ours}", too', hint=hint)


def _column(row: Row, ours: str, theirs: str) -> Any:
    if theirs in row.data:
        return row.data[theirs]
    value: Any = row.data
    for part in theirs.split("."):
        if not isinstance(value, dict) or part not in value:
            hint = f"set data.columns.{ours}=COLUMN to a field of this row"
            raise invalid_row(row, f'"{theirs}" is missing (data.columns.{ours})', shown_fields(row), hint)
        value = value[part]
    return value


def shown_fields(row: Row) -> str:
    """Return the names of a row's fields, for errors."""
    return f"fields {', '.join(map(repr, row.data)) or 'none'}"


def check_unread(row: Row, record: Record, read: frozenset[str], unread: set[str] | None) -> None:
    """Refuse a row with an unread field that could be part of the conversation, and is not already in it; add the names
    of its other unread fields to `unread`.

    Raises:
        RmtoolError: E0303 with the mapping that would read the field.
    """
    names, suspicious, labels = _unread(tuple(row.data), read)
    suspicious += tuple(name for name in labels if isinstance(row.data[name], dict))  # data.image
    bare = [] if record.prompt else [has_no_prompt(response) for response in record.responses]
    no_prompt = _has_no_prompt(record)
    if looked_at := names if no_prompt else suspicious:
        same = [row.data[name] for name in read if isinstance(row.data.get(name), list)]  # messages that repeat chosen
        values = ((name, row.data[name]) for name in looked_at)
        lost = (_lost_part(name, value, record, no_prompt) for name, value in values if value and value not in same)
        if parts := [part for part in lost if part]:
            raise _refusal(row, parts, record, no_prompt)
    if any(bare) and (not all(bare) or row.data.get("prompt", "") is None):
        what = '"prompt" is null, and a response has none' if all(bare) else "only some responses have a prompt"
        raise invalid_row(
            row, what, hint='add a "prompt" to the row, or write each response as a complete conversation'
        )
    if unread is not None and not unread.issuperset(names):
        unread.update(name for name in names if has_content(row.data[name]))


@functools.lru_cache(1024)
def _unread(fields: tuple[str, ...], read: frozenset[str]) -> tuple[tuple[str, ...], ...]:
    """Return the unread fields, and those of which a row that has a prompt is checked: all values, and objects."""
    names = tuple(name for name in fields if name not in read)
    others = tuple(name for name in names if kind_of(name) not in (Kind.LABEL, Kind.METADATA))
    return names, others, tuple(name for name in names if kind_of(name) is Kind.LABEL)


def _has_no_prompt(record: Record) -> bool:
    """Return whether there is nothing but a system prompt before the response."""
    if record.prompt and record.prompt[-1].role == "user" and record.prompt[-1].content:
        return False
    messages = record.prompt + record.responses[0]
    return all(message.role in ("system", "assistant") or message.is_empty() for message in messages)


def _lost_part(name: str, value: Any, record: Record, no_prompt: bool) -> tuple[str, Any] | None:
    """Return the path and value of what would be lost with an unread field."""
    kind = kind_of(name)
    if kind is Kind.MEDIA:
        return (name, value) if holds_media(value) else None
    part = conversation_part(name, value, kind, no_prompt)
    return part if part and not _is_in(record, part[1]) else None


def _is_in(record: Record, value: Any) -> bool:
    """Return whether all text of a value is in the conversation: as a message, or inside its prompt. Text inside a
    response does not count, since it may quote the prompt; a response once more does, next to its prompt.
    """
    messages = [*record.prompt, *(message for response in record.responses for message in response[:-1])]
    if not isinstance(value, str):  # a conversation, perhaps
        messages += [response[-1] for response in record.responses]
    extra = (texts(json.loads(message.extra)) for message in messages if message.extra)
    known = {message.content.strip() for message in messages}.union(*extra)
    context = "\n".join(known)
    asked = record.prompt[-1].content.strip() if record.prompt else ""
    said = [response[-1].content.strip() for response in record.responses]
    return all(
        text in known
        or (asked and text in said)
        or (len(text) >= _EQUAL_ONLY and text in context)
        or (asked and asked in text and any(each and each in text for each in said))  # a rendered conversation
        for text in texts(value)
    )


def _refusal(row: Row, parts: list[tuple[str, Any]], record: Record, no_prompt: bool) -> RmtoolError:
    paths = sorted((path for path, _ in parts), key=by_likelihood)
    values, named, one = dict(parts), ", ".join(f'"{path}"' for path in paths), len(paths) == 1
    tops = ",".join(path if path in row.data else path.partition(".")[0] for path in paths)
    ignore = f"data.columns.{IGNORE}={tops}"
    if all(kind_of(path.rpartition(".")[2]) is Kind.MEDIA for path in paths):
        what = f"{named} cannot be read: only text is supported"
        return invalid_row(row, what, shown_fields(row), f"set {ignore} to use the text alone, or remove the row")
    what = f"{named} {'is' if one else 'are'} not read, but could be part of the conversation"
    hint = f"{_mapping(paths[0], values[paths[0]], record, no_prompt)}{ignore} to leave {'it' if one else 'them'} out"
    return invalid_row(row, what, shown_fields(row), hint)


def _mapping(path: str, value: Any, record: Record, no_prompt: bool) -> str:
    """Return the beginning of a hint: what reads the field, if something does."""
    if path == "prompt":
        return "set "
    if begins_response(path):
        return 'add it to the end of "prompt" as an assistant message, or set '
    target = target_of(path)
    free = {"prompt": no_prompt, "tools": not record.tools, "system": not _has_system(record)}[target]
    readable = isinstance(value, str) or is_message(value) or is_messages(value) or target == "tools"
    if free and readable and target != path:
        complete = is_messages(value) and role_of(value[-1]) == "assistant"
        condition = " if a response continues its last message" if complete else ""
        return f"set data.columns.{target}={path}{condition}, or "
    if free:
        return f'write it as "{target}", a string or a list of messages, or set '
    return f'add it to "{target}", or set '


def _has_system(record: Record) -> bool:
    return bool(record.prompt) and record.prompt[0].role == "system"
