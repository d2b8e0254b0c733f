"""Messages, conversations and records: what a row means.

In: values of a `Row`: strings, lists of messages, transcripts. Out: `Record`s (prompt, responses, preferences), and
`PairMetadata`, a record without its text. Errors have the row's place and the path of the field.
Cost: string work only. A `PairMetadata` takes about 0.2 KB, however long the text is.
"""

from __future__ import annotations

import functools
import json
import marshal
import re
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

from rmtool.data.rows import FIX_ROW, Row, json_kind
from rmtool.errors import Place, RmtoolError

MAX_PAIRS = 1000
ROLES = ("system", "user", "assistant", "tool")
_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatbot": "assistant"}
_EXTRA_FIELDS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")  # chat templates render these
_UNSUPPORTED = ("images", "image", "audio", "video", "function_call", "parts")  # content that would be lost
_TURN = re.compile(r"\n\n(Human|Assistant):")
_EXTRA_ID = re.compile(r"\n?<extra_id_1>(Assistant|User)\n")
_SPEAKERS = {"Human": "user", "User": "user", "Assistant": "assistant"}


class Message(NamedTuple):
    """One turn of a conversation.

    extra: the other fields that a chat template renders (tool_calls, name, ...) as JSON; empty without any.
    """

    role: str
    content: str
    extra: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the message as chat templates and rows have it."""
        plain: dict[str, Any] = {"role": self.role, "content": self.content}
        return plain | json.loads(self.extra) if self.extra else plain


Messages = tuple[Message, ...]
Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class RowOptions:
    """How the rows of a source are read.

    columns:        our field names and, for each, the source's: {"chosen": "better", "rejected": "worse"}; dots lead
                    into objects
    rating_margins: whether the difference of two ratings is the pair's margin
    max_pairs:      the most pairs of a prompt: more are drawn from
    """

    columns: tuple[tuple[str, str], ...] = ()
    rating_margins: bool = False
    max_pairs: int = MAX_PAIRS


PLAIN = RowOptions()


@dataclass(frozen=True, slots=True)
class PairMetadata:
    """A `Record` without its text. `prompt_hash` is a hash of the prompt's text, 0 without a prompt."""

    place: Place
    prompt_hash: int
    preferences: Pairs
    margins: tuple[float | None, ...]
    subset: str | None
    weight: float


@functools.lru_cache(1024)
def _shared(value: Any) -> Any:
    """Return one object for equal values: most records have the same preferences."""
    return value


@dataclass(frozen=True)
class Record:
    """A prompt, its responses, and the preferences between them.

    preferences: (chosen, rejected) by index; empty for rows to score, and where all responses are tied
    margins:     one per preference, None where the row has none
    weight:      weight of each preference in the loss
    tools:       JSON of the tools for the chat template; empty without any
    row:         the row as it was written
    places:      place of each response, where each comes from its own row
    dropped_pairs: how many were not drawn (see RowOptions.max_pairs)
    """

    place: Place
    prompt: Messages
    responses: tuple[Messages, ...]
    preferences: Pairs = ()
    margins: tuple[float | None, ...] = ()
    subset: str | None = None
    weight: float = 1.0
    tools: str = ""
    row: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    places: tuple[Place, ...] = ()
    dropped_pairs: int = field(default=0, compare=False)

    def place_of(self, response: int) -> Place:
        """Return the place of a response."""
        return self.places[response] if self.places else self.place

    def metadata(self) -> PairMetadata:
        """Return the record without its text."""
        text = marshal.dumps(tuple(map(tuple, self.prompt)), 2)
        key = int.from_bytes(blake2b(text, digest_size=8).digest()) if self.prompt else 0
        shared = _shared(self.preferences), _shared(self.margins), _shared(self.subset)
        return PairMetadata(self.place, key, *shared, self.weight)


# ------------------------------------------------------------------------------------------------- conversations


def invalid_row(row: Row, what: str, found: str | None = None, hint: str = FIX_ROW) -> RmtoolError:
    """Return the error of a row that is valid JSON, but not a valid row."""
    return RmtoolError("E0303", what, hint, row.place, found)


def conversation(row: Row, prompt: Messages, value: Any, name: str) -> Messages:
    """Return `prompt` followed by the response `value` of the field `name`: a string, a list of messages, a
    transcript, or a complete conversation that repeats the prompt.

    Raises:
        RmtoolError: E0303 when it is anything else, or does not end with a response.
    """
    turns = _transcript(value) if isinstance(value, str) and _TURN.match(value) else ()
    complete = bool(turns) and turns[0].role == "user"
    messages = _with_prompt(row, prompt, turns, name) if complete else _join(row, prompt, value, name)
    if messages[-1].role != "assistant":
        hint = "add the response as an assistant message"
        raise invalid_row(row, f'"{name}" must end with an assistant message', f"a {messages[-1].role} message", hint)
    if row.data.get("prompt", "") is None and has_no_prompt(messages):
        hint = f'add a "prompt" to the row, or write "{name}" as a complete conversation'
        raise invalid_row(row, f'"prompt" is null, but "{name}" contains only a response', hint=hint)
    return messages


def has_no_prompt(messages: Messages) -> bool:
    """Return whether a conversation consists of a response only."""
    return all(message.role == "assistant" for message in messages)


def prompt_of(row: Row, name: str) -> Messages:
    """Return the field `name`: nothing, a string (a user message, or a transcript up to the response), or messages.

    Raises:
        RmtoolError: E0303 when it is anything else.
    """
    value = row.data.get(name)
    if value is None:
        return ()
    if not isinstance(value, str):
        return _messages(row, value, name)
    if _TURN.match(value):
        turns = _transcript(value)
        return turns[:-1] if turns[-1] == Message("assistant", "") else turns  # it ended in "\n\nAssistant:"
    # HelpSteer2 writes several turns as "...\n<extra_id_1>Assistant\n...\n<extra_id_1>User\n".
    return _turns(["User", *_EXTRA_ID.split(value)]) if "<extra_id_1>" in value else (Message("user", value),)


def _messages(row: Row, value: Any, name: str) -> Messages:
    if not isinstance(value, list) or not value:
        found = json_kind(value) if value != [] else "[]"
        raise invalid_row(row, f'"{name}" must be a string or a list of messages', found)
    return tuple(_message(row, item, f"{name}[{index}]") for index, item in enumerate(value))


def _message(row: Row, item: Any, name: str) -> Message:
    if not isinstance(item, dict):
        raise invalid_row(row, f'{name} must be an object with "role" and "content"', json_kind(item))
    share_gpt = "from" in item and "role" not in item
    role, content = item.get("from" if share_gpt else "role"), item.get("value" if share_gpt else "content")
    role = _ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise invalid_row(row, f"{name}.role must be one of {', '.join(ROLES)}", repr(role))
    if unsupported := [key for key in _UNSUPPORTED if item.get(key)]:
        hint = "remove them, or render them into content"
        raise invalid_row(row, f"{name} has unsupported fields: {', '.join(unsupported)}", hint=hint)
    extra = {key: item[key] for key in _EXTRA_FIELDS if item.get(key)}
    if content is None and "tool_calls" in extra:
        content = ""
    if not isinstance(content, str):
        raise invalid_row(row, f"{name}.content must be a string", json_kind(content))
    return Message(role, content, json.dumps(extra, ensure_ascii=False, sort_keys=True) if extra else "")


def _transcript(text: str) -> Messages:
    """Split an hh-rlhf transcript: "\\n\\nHuman: ...\\n\\nAssistant: ..." (Bai et al., arXiv 2204.05862)."""
    return _turns(_TURN.split(text)[1:])


def _turns(parts: list[str]) -> Messages:
    """Pair up speakers and what they say."""
    turns = zip(parts[::2], parts[1::2], strict=True)
    return tuple(Message(_SPEAKERS[speaker], content.strip()) for speaker, content in turns)


def _join(row: Row, prompt: Messages, value: Any, name: str) -> Messages:
    if isinstance(value, str):
        return (*prompt, Message("assistant", value))
    messages = (_message(row, value, name),) if isinstance(value, dict) else _messages(row, value, name)
    return (*prompt, *messages) if messages[0].role == "assistant" else _with_prompt(row, prompt, messages, name)


def _with_prompt(row: Row, prompt: Messages, messages: Messages, name: str) -> Messages:
    """Check a complete conversation against the prompt, which it begins with, or has just before the response. Only
    one of the two needs the system prompt.
    """
    system, prompt = _split_system(prompt)
    own_system, messages = _split_system(messages)
    if system and own_system and system != own_system:
        raise invalid_row(row, f'the system prompt in "{name}" differs from the row\'s', hint="keep one of the two")
    before = len(messages) - 1 - len(prompt)  # where the prompt begins if it is just before the response
    if before < 0 or _stripped(prompt) not in (_stripped(messages[: len(prompt)]), _stripped(messages[before:-1])):
        raise invalid_row(row, f'"{name}" is a complete conversation, but does not contain the "prompt"')
    return (*(own_system or system), *messages)


def _split_system(messages: Messages) -> tuple[Messages, Messages]:
    """Split off the system prompt, if there is one."""
    count = int(bool(messages) and messages[0].role == "system")
    return messages[:count], messages[count:]


def _stripped(messages: Messages) -> list[Message]:
    """Strip the contents, as transcripts are."""
    return [message._replace(content=message.content.strip()) for message in messages]
