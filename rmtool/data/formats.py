"""The shapes in which preference data and responses come, recognised by their fields.

In: a `Row`. Out: a `Record`: prompt messages, response messages, which response is preferred to which.
Read without configuration: TRL's preference formats (standard and conversational, explicit and implicit prompt),
message lists, hh-rlhf transcripts, prompt + chosen/rejected strings; to score: prompt + response(s), messages.
Cost: string work only; nothing is tokenised here.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from rmtool.data.rows import Row, json_kind
from rmtool.errors import Place, RmtoolError

ROLES = ("system", "user", "assistant", "tool")
_TURN = re.compile(r"\n\n(Human|Assistant):")


class Message(NamedTuple):
    role: str
    content: str


Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Record:
    """A prompt, its responses, and preferences (winner, loser) between them by index; none when only to be scored.

    `margins` holds one number per preference, or None where the row gave none.
    """

    place: Place
    prompt: Messages
    responses: tuple[Messages, ...]
    preferences: tuple[tuple[int, int], ...] = ()
    margins: tuple[float | None, ...] = ()
    subset: str | None = None


def preference_record(row: Row) -> Record:
    """The record of a row with `chosen` and `rejected`.

    Raises:
        RmtoolError: E0303 a field is missing or of the wrong kind.
    """
    data = row.data
    _nothing_lost(row)
    for name in ("chosen", "rejected"):
        if name not in data:
            raise _wrong(row, f'"{name}" is missing', f"fields {', '.join(map(repr, data)) or 'none'}")
    chosen, rejected = (_conversation(row, name) for name in ("chosen", "rejected"))
    prompt, responses = _split(chosen, rejected)
    return Record(row.place, prompt, responses, ((0, 1),), (_margin(row),), _subset(row))


def score_record(row: Row) -> Record:
    """The record of a row with `response`, `responses` or `messages`.

    Raises:
        RmtoolError: E0303 a field is missing or of the wrong kind.
    """
    data = row.data
    _nothing_lost(row)
    taken = [name for name in ("reward", "rewards", "best") if name in data]
    if taken:
        raise _wrong(
            row, f'the row already has "{taken[0]}"', hint="rename or remove that field; it would be overwritten"
        )
    if "responses" in data:
        values = data["responses"]
        if not isinstance(values, list) or not values:
            raise _wrong(row, '"responses" is a list with at least one response', json_kind(values))
        conversations = [_join(row, _prompt(row), value, f"responses[{n}]") for n, value in enumerate(values)]
    elif "response" in data:
        conversations = [_join(row, _prompt(row), data["response"], "response")]
    elif "messages" in data:
        conversations = [_messages(row, data["messages"], "messages")]
    else:
        raise _wrong(
            row, 'there is no "response", "responses" or "messages"', f"fields {', '.join(map(repr, data)) or 'none'}"
        )
    for conversation in conversations:
        _ends_with_response(row, conversation)
    return Record(row.place, *_split(*conversations), subset=_subset(row))


def _nothing_lost(row: Row) -> None:
    """Refuse fields that change what a template renders and that are not read."""
    for name in ("tools", "system"):
        if row.data.get(name):
            raise _wrong(row, f'"{name}" would not be read', hint="put it into the messages, or remove it")


def _split(*conversations: Messages) -> tuple[Messages, tuple[Messages, ...]]:
    """The longest common run of messages, and what follows it in each; every response keeps its last message."""
    limit = min(len(conversation) for conversation in conversations) - 1
    shared = 0
    while shared < limit and len({conversation[shared] for conversation in conversations}) == 1:
        shared += 1
    return conversations[0][:shared], tuple(conversation[shared:] for conversation in conversations)


def _conversation(row: Row, name: str) -> Messages:
    """Prompt and response `name` of a preference row, as one list of messages."""
    value = row.data[name]
    if isinstance(value, str) and _TURN.match(value) and _opens_with(_transcript(value), _prompt(row)):
        conversation = _transcript(value)
    else:
        conversation = _join(row, _prompt(row), value, name)
    _ends_with_response(row, conversation)
    return conversation


def _opens_with(conversation: Messages, prompt: Messages) -> bool:
    """Whether a transcript is a whole conversation: there is no prompt beside it, or it repeats the prompt."""
    return conversation[: len(prompt)] == prompt


def _transcript(text: str) -> Messages:
    """An hh-rlhf transcript: "\\n\\nHuman: ...\\n\\nAssistant: ..." (Bai et al., arXiv 2204.05862)."""
    parts = _TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[role], content.strip()) for role, content in zip(parts[::2], parts[1::2], strict=True))


def _prompt(row: Row) -> Messages:
    value = row.data.get("prompt")
    if value is None:
        return ()
    if isinstance(value, str):
        # A prompt may itself be a transcript that ends where the response starts.
        if not _TURN.match(value):
            return (Message("user", value),)
        turns = _transcript(value)
        return turns[:-1] if turns[-1] == Message("assistant", "") else turns  # it ended in "\n\nAssistant:"
    return _messages(row, value, "prompt")


def _join(row: Row, prompt: Messages, value: Any, name: str) -> Messages:
    """`prompt` followed by `value`: a response, or a whole conversation that repeats the prompt."""
    if isinstance(value, str):
        return (*prompt, Message("assistant", value))
    messages = _messages(row, value, name)
    if not prompt or messages[0].role == "assistant":
        return (*prompt, *messages)
    if messages[: len(prompt)] == prompt or messages[-2:-1] == prompt[-1:]:
        return messages
    raise _wrong(row, f'"{name}" is a whole conversation, but it does not contain the "prompt"')


def _messages(row: Row, value: Any, name: str) -> Messages:
    if isinstance(value, str):
        return (Message("user", value),)
    if not isinstance(value, list) or not value:
        raise _wrong(row, f'"{name}" is a string or a list of messages', json_kind(value) if value else "an empty list")
    return tuple(_message(row, item, f"{name}[{index}]") for index, item in enumerate(value))


def _message(row: Row, item: Any, name: str) -> Message:
    if not isinstance(item, dict):
        raise _wrong(row, f'{name} is an object with "role" and "content"', json_kind(item))
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise _wrong(row, f"{name}.role is one of {', '.join(ROLES)}", repr(role))
    if not isinstance(content, str):
        raise _wrong(row, f"{name}.content is a string", json_kind(content))
    lost = sorted(key for key, part in item.items() if key not in ("role", "content") and part)
    if lost:
        raise _wrong(
            row, f"{name} has {', '.join(lost)}, which would not be read", hint="remove it, or render it into content"
        )
    return Message(role, content)


def _ends_with_response(row: Row, conversation: Messages) -> None:
    if conversation[-1].role != "assistant":
        raise _wrong(
            row,
            "the conversation ends without a response",
            f"a {conversation[-1].role} message",
            "end it with an assistant message",
        )


def _margin(row: Row) -> float | None:
    value = row.data.get("margin")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise _wrong(row, '"margin" is a finite number', repr(value))
    return float(value)


def _subset(row: Row) -> str | None:
    value = row.data.get("subset")
    if value is not None and not isinstance(value, str):
        raise _wrong(row, '"subset" is a string', json_kind(value))
    return value


def _wrong(row: Row, what: str, found: str | None = None, hint: str = "mend or remove this row") -> RmtoolError:
    return RmtoolError("E0303", what, hint, row.place, found)
