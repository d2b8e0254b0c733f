"""Messages, conversations and records: what a row means.

In: values of a `Row`: strings, lists of messages, transcripts. Out: `Record`s (prompt, responses, preferences), and
`PairMetadata`, a record without its text. Errors have the row's place and the path of the field.
Cost: string work only. A `PairMetadata` takes about 0.2 KB, however long the text is.
"""

from __future__ import annotations

import functools
import itertools
import json
import marshal
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

from rmtool.data.messages import REASONING, RESULT_ROLES, extra_json, invalid_row, is_text_part, message_of, shown_call
from rmtool.data.notations import extra_id_turns, looks_complete, read_turns, refuse_rendered
from rmtool.data.rows import FIX_ROW, Row, json_kind
from rmtool.errors import Place

MAX_PAIRS = 1000


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

    def is_empty(self) -> bool:
        """Return whether the message has neither text nor a tool call."""
        return not self.content.strip() and '"tool_calls"' not in self.extra

    def shown(self) -> str:
        """Return its text and tool calls, for tables."""
        calls = self.as_dict().get("tool_calls", [])
        return " ".join(filter(None, (self.content, *(shown_call(call.get("function") or call) for call in calls))))


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
    template_kwargs: JSON of the row's other arguments of the chat template; empty without any
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
    template_kwargs: str = ""

    def place_of(self, response: int) -> Place:
        """Return the place of a response."""
        return self.places[response] if self.places else self.place

    def continues(self, response: int) -> bool:
        """Return whether a response continues an assistant message at the end of the prompt (prefill).

        A message with tool calls is complete: what follows it is a message of its own.
        """
        first, last = self.responses[response][0], self.prompt[-1] if self.prompt else Message("", "")
        return first.role == last.role == "assistant" and "tool_calls" not in last.as_dict()

    def repeats_assistant(self, response: int) -> bool:
        """Return whether a response, or the prompt, has two assistant messages in a row that are not joined."""
        return ("assistant", "assistant") in itertools.pairwise(message.role for message in self.conversation(response))

    def conversation(self, response: int) -> Messages:
        """Return the prompt and a response; one that continues the prompt's last message is one message with it."""
        messages = self.responses[response]
        if not self.continues(response):
            return self.prompt + messages
        *before, begun = self.prompt
        return (*before, _continued(begun, messages[0]), *messages[1:])

    def metadata(self) -> PairMetadata:
        """Return the record without its text."""
        text = marshal.dumps(tuple(map(tuple, self.prompt)), 2)
        key = int.from_bytes(blake2b(text, digest_size=8).digest()) if self.prompt else 0
        shared = _shared(self.preferences), _shared(self.margins), _shared(self.subset)
        return PairMetadata(self.place, key, *shared, self.weight)


# ------------------------------------------------------------------------------------------------- conversations


def _continued(begun: Message, rest: Message) -> Message:
    """Join the two parts of a message."""
    extra = begun.as_dict() | rest.as_dict()
    for key in ("content", *REASONING):
        if key in begun.as_dict() and key in rest.as_dict():
            extra[key] = begun.as_dict()[key] + rest.as_dict()[key]
    role, content = extra.pop("role"), extra.pop("content")
    return Message(role, content, extra_json(extra))


def split_prompt(row: Row, prompt: Messages, values: Mapping[str, Any]) -> tuple[Messages, tuple[Messages, ...]]:
    """Return the common prompt of responses, in `values` by their path in the row, and the rest of each conversation.

    An assistant message ends the prompt only if it ends the `prompt` of the row: it is continued then. Otherwise it
    begins a response of several messages, and so do the tool calls and results after the row's `prompt`.

    Raises:
        RmtoolError: as `conversation`.
    """
    conversations = [conversation(row, prompt, value, name) for name, value in values.items()]
    turns = zip(*(messages[:-1] for messages in conversations), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda turn: turn.count(turn[0]) == len(turn), turns))
    spoken = ("assistant", *RESULT_ROLES) if prompt else ("assistant",)
    while common > len(prompt) and conversations[0][common - 1].role in spoken:
        common -= 1
    return conversations[0][:common], tuple(messages[common:] for messages in conversations)


def conversation(row: Row, prompt: Messages, value: Any, name: str) -> Messages:
    """Return `prompt` followed by the response `value` of the field `name`: a string, a list of messages, a
    transcript, or a complete conversation that repeats the prompt.

    Raises:
        RmtoolError: E0303 when it is anything else, or does not end with a response.
    """
    text = isinstance(value, str)
    turns = tuple(itertools.starmap(Message, read_turns(row, value, name))) if text else ()
    complete = bool(turns) and turns[0].role == "user"
    if complete and prompt and value.startswith("Human:") and not _repeats(turns, prompt):
        complete = False  # a response that is a dialogue
    messages = _with_prompt(row, prompt, turns, name) if complete else _join(row, prompt, value, name)
    if messages[-1].role != "assistant":
        hint = "add the response as an assistant message"
        raise invalid_row(row, f'"{name}" must end with an assistant message', f"a {messages[-1].role} message", hint)
    if text and has_no_prompt(messages) and looks_complete(value):
        what = f'"{name}" looks like a complete conversation in an unsupported notation'
        raise invalid_row(row, what, repr(value[:40]), "write it as a list of messages")
    return messages


def has_no_prompt(messages: Messages) -> bool:
    """Return whether a conversation consists of a response only."""
    return messages[0].role == "assistant" and all(message.role == "assistant" for message in messages)


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
    if turns := list(itertools.starmap(Message, read_turns(row, value, name))):
        last = turns.pop()
        if last == Message("assistant", ""):  # it ended in "\n\nAssistant:"
            return tuple(turns)
        space = value[len(value.rstrip()) :] if last.role == "assistant" else ""  # before what continues it
        return (*turns, last._replace(content=last.content + space))
    refuse_rendered(row, value, name)
    if "<extra_id_1>" in value:
        return tuple(itertools.starmap(Message, extra_id_turns(value)))
    return (Message("user", value),)


def _messages(row: Row, value: Any, name: str) -> Messages:
    if not isinstance(value, list) or not value:
        found = json_kind(value) if value != [] else "[]"
        raise invalid_row(row, f'"{name}" must be a string or a list of messages', found)
    if all(map(is_text_part, value)):
        value = [{"role": "user", "content": value}]
    return tuple(Message(*message_of(row, item, f"{name}[{index}]")) for index, item in enumerate(value))


def _join(row: Row, prompt: Messages, value: Any, name: str) -> Messages:
    value = {"role": "assistant", "content": value} if isinstance(value, str) else value
    messages = (Message(*message_of(row, value, name)),) if isinstance(value, dict) else _messages(row, value, name)
    messages = _split_continued(prompt, messages)
    if messages == prompt[-1:] and messages[0].content:
        raise invalid_row(row, f'"{name}" repeats the last message of the prompt', hint="remove it from the prompt")
    return (*prompt, *messages) if messages[0].role == "assistant" else _with_prompt(row, prompt, messages, name)


def _split_continued(prompt: Messages, messages: Messages) -> Messages:
    """Split a message that begins with the assistant message at the end of the prompt into that one, where the prompt
    is repeated before it, and the rest.
    """
    if not prompt or prompt[-1].role != "assistant":
        return messages
    system, said = _split_system(messages)
    _, prompt = _split_system(prompt)
    begun = prompt[-1]
    at = 0 if said and said[0].role == "assistant" else len(prompt) - 1
    if not begun.content.strip() or at >= len(said):
        return messages
    whole = said[at]
    longer = whole.role == begun.role and len(whole.content) > len(begun.content)
    if not longer or not whole.content.startswith(begun.content) or (at and not _equal(said[:at], prompt[:-1])):
        return messages
    rest = whole._replace(content=whole.content[len(begun.content) :])
    return (*system, *said[:at], *([begun] if at else []), rest, *said[at + 1 :])


def _with_prompt(row: Row, prompt: Messages, messages: Messages, name: str) -> Messages:
    """Check a complete conversation against the prompt, which it begins with, or has just before the response. Only
    one of the two needs the system prompt.
    """
    messages = _split_continued(prompt, messages)
    system, prompt = _split_system(prompt)
    own_system, messages = _split_system(messages)
    if system and own_system and system != own_system:
        raise invalid_row(row, f'the system prompt in "{name}" differs from the row\'s', hint="keep one of the two")
    if not _repeats(messages, prompt):
        hint = f"set data.columns.ignore=prompt to use the conversation alone, or {FIX_ROW}"
        raise invalid_row(row, f'"{name}" is a complete conversation, but does not contain the "prompt"', hint=hint)
    return (*(own_system or system), *messages)


def _repeats(messages: Messages, prompt: Messages) -> bool:
    """Return whether a conversation begins with the prompt, or has it just before the response."""
    _, prompt = _split_system(prompt)
    before = len(messages) - 1 - len(prompt)
    return before >= 0 and (_equal(messages[: len(prompt)], prompt) or _equal(messages[before:-1], prompt))


def _split_system(messages: Messages) -> tuple[Messages, Messages]:
    """Split off the system prompt, if there is one."""
    return (messages[:1], messages[1:]) if messages and messages[0].role == "system" else ((), messages)


def _equal(messages: Messages, others: Messages) -> bool:
    """Return whether as many messages are the same when stripped, as transcripts are."""
    stripped = ((each.role, each.content.strip(), each.extra) for each in others)
    return messages == others or [(each.role, each.content.strip(), each.extra) for each in messages] == list(stripped)
