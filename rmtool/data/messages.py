"""Conversations as rows write them: message lists, plain strings, transcripts.

In: values of a `Row`. Out: tuples of `Message`, or an error with the row's place and the path to the value.
Cost: string work only.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from rmtool.data.rows import Row, json_kind
from rmtool.errors import RmtoolError

ROLES = ("system", "user", "assistant", "tool")
_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatbot": "assistant"}
# What a message may have beside role and content, and chat templates render.
_RENDERED = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
_LOST = ("images", "image", "audio", "video", "function_call", "parts")  # content that would not be read
_TURN = re.compile(r"\n\n(Human|Assistant):")
_EXTRA_ID = re.compile(r"\n?<extra_id_1>(Assistant|User)\n")
_SPEAKERS = {"Human": "user", "User": "user", "Assistant": "assistant"}


class Message(NamedTuple):
    """`extra` is JSON: the other fields that a chat template reads (tool_calls, name, ...); empty without any."""

    role: str
    content: str
    extra: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As a chat template takes it, and as rows write it."""
        plain: dict[str, Any] = {"role": self.role, "content": self.content}
        return plain | json.loads(self.extra) if self.extra else plain


Messages = tuple[Message, ...]


def conversation(row: Row, prompt: Messages, value: Any, name: str) -> Messages:
    """`prompt` and the response `value`, which may be a string, a list of messages, a transcript, or a whole
    conversation that repeats the prompt.

    Raises:
        RmtoolError: E0303 it is of another kind, or does not end with a response.
    """
    turns = _transcript(value) if isinstance(value, str) and _TURN.match(value) else ()
    whole = bool(turns) and turns[0].role == "user"
    messages = _with_prompt(row, prompt, turns, name) if whole else _join(row, prompt, value, name)
    if messages[-1].role != "assistant":
        last = f"a {messages[-1].role} message"
        raise wrong(
            row, f'"{name}": the conversation ends without a response', last, "end it with an assistant message"
        )
    if row.data.get("prompt", "") is None and has_no_prompt(messages):
        hint = f'give the row a "prompt", or write "{name}" as a whole conversation'
        raise wrong(row, f'"prompt" is null, and "{name}" is a response alone', hint=hint)
    return messages


def has_no_prompt(messages: Messages) -> bool:
    """Whether there is nothing but a response."""
    return all(message.role == "assistant" for message in messages)


def prompt_of(row: Row, name: str = "prompt") -> Messages:
    """The field `name`: nothing, a string (one user message, or a transcript up to the response), or messages."""
    value = row.data.get(name)
    if value is None:
        return ()
    if not isinstance(value, str):
        return messages_of(row, value, name)
    if _TURN.match(value):
        turns = _transcript(value)
        return turns[:-1] if turns[-1] == Message("assistant", "") else turns  # it ended in "\n\nAssistant:"
    return _steerlm(value) if "<extra_id_1>" in value else (Message("user", value),)


def messages_of(row: Row, value: Any, name: str) -> Messages:
    """A string, which is what a user says, or a list of messages."""
    if isinstance(value, str):
        return (Message("user", value),)
    if not isinstance(value, list) or not value:
        found = json_kind(value) if value or not isinstance(value, list) else "an empty list"
        raise wrong(row, f'"{name}" is a string or a list of messages', found)
    return tuple(_message(row, item, f"{name}[{index}]") for index, item in enumerate(value))


def _message(row: Row, item: Any, name: str) -> Message:
    if not isinstance(item, dict):
        raise wrong(row, f'{name} is an object with "role" and "content"', json_kind(item))
    spoken = "from" in item and "role" not in item  # ShareGPT's names
    role, content = item.get("from" if spoken else "role"), item.get("value" if spoken else "content")
    role = _ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise wrong(row, f"{name}.role is one of {', '.join(ROLES)}", repr(role))
    lost = [key for key in _LOST if item.get(key)]
    if lost:
        hint = "remove it, or render it into content"
        raise wrong(row, f"{name} has {', '.join(lost)}, which would not be read", hint=hint)
    extra = {key: item[key] for key in _RENDERED if item.get(key)}
    if content is None and "tool_calls" in extra:
        content = ""
    if not isinstance(content, str):
        raise wrong(row, f"{name}.content is a string", json_kind(content))
    return Message(role, content, json.dumps(extra, ensure_ascii=False, sort_keys=True) if extra else "")


def _transcript(text: str) -> Messages:
    """An hh-rlhf transcript: "\\n\\nHuman: ...\\n\\nAssistant: ..." (Bai et al., arXiv 2204.05862)."""
    return _turns(_TURN.split(text)[1:])


def _steerlm(text: str) -> Messages:
    """A prompt of several turns as HelpSteer2 writes it: "...\\n<extra_id_1>Assistant\\n...\\n<extra_id_1>User\\n"."""
    return _turns(["User", *_EXTRA_ID.split(text)])


def _turns(parts: list[str]) -> Messages:
    return tuple(
        Message(_SPEAKERS[speaker], content.strip()) for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    )


def _join(row: Row, prompt: Messages, value: Any, name: str) -> Messages:
    """`prompt` followed by `value`: a response, or a whole conversation that repeats the prompt."""
    if isinstance(value, str):
        return (*prompt, Message("assistant", value))
    messages = (_message(row, value, name),) if isinstance(value, dict) else messages_of(row, value, name)
    return (*prompt, *messages) if messages[0].role == "assistant" else _with_prompt(row, prompt, messages, name)


def _with_prompt(row: Row, prompt: Messages, messages: Messages, name: str) -> Messages:
    """A whole conversation, which repeats the prompt: from its beginning on, or just before the response. A system
    prompt may stand in only one of the two.
    """
    system, asked = _split_system(prompt)
    own, said = _split_system(messages)
    if system and own and system != own:
        raise wrong(row, f'"{name}" has another system prompt than the row', hint="keep one of the two")
    before = len(said) - 1 - len(asked)  # where the prompt begins if it stands just before the response
    if before < 0 or _bare(asked) not in (_bare(said[: len(asked)]), _bare(said[before:-1])):
        raise wrong(row, f'"{name}" is a whole conversation, but it does not contain the "prompt"')
    return (*(own or system), *said)


def _split_system(messages: Messages) -> tuple[Messages, Messages]:
    """The system prompt, if there is one, and what follows it."""
    count = int(bool(messages) and messages[0].role == "system")
    return messages[:count], messages[count:]


def _bare(messages: Messages) -> list[Message]:
    """Without the blanks around what is said: transcripts have none."""
    return [message._replace(content=message.content.strip()) for message in messages]


def wrong(row: Row, what: str, found: str | None = None, hint: str = "mend or remove this row") -> RmtoolError:
    """The error of a row that is JSON and not what it should be."""
    return RmtoolError("E0303", what, hint, row.place, found)
