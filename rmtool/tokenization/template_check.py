"""What a chat template leaves out, or refuses: roles, messages, tool calls, tools, reasoning.

In: a tokenizer and conversations. Out: the part that is lost, and a hint. Templates skip what they do not know without
an error; the model would score a conversation without it.
What templates do with text is their own matter: some strip it, or drop the reasoning of earlier turns or in <think>.
Cost: one rendering for each distinct shape (roles, and which fields have values), with marks in place of the text; for
the other conversations, a hash of their shape.
"""

from __future__ import annotations

import json
from typing import Any

from rmtool.data.messages import INSTRUCTION_ROLES, REASONING, RESULT_ROLES
from rmtool.data.record import Message, Messages
from rmtool.tokenization.batch_tokenizer import Conversation, refusals

_FIXES = {"tools": "write the tools into a message", "tool_calls": "write the calls into content"}
_FIXES |= dict.fromkeys(REASONING, "write the reasoning into content, or remove it")
_MARK = "mark0mark"
_CALL = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}  # Mistral: 9 characters
_QUESTION: dict[str, Any] = {"role": "user", "content": "q"}
_ANSWER: dict[str, Any] = {"role": "assistant", "content": "a"}
_CALLING: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_OR = "or use a different chat template"
Problem = tuple[str, str]  # what is wrong, and a hint


class TemplateCheck:
    """Checks conversations against the chat template of a tokenizer."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._complete = set[int]()  # hashes of shapes that are rendered completely
        self._roles = {"user": True, "assistant": True}

    def loss(self, conversation: Conversation) -> Problem | None:
        """Return what the template leaves out of a conversation that it renders."""
        shape = hash((*map(_shape, conversation.messages), bool(conversation.tools), conversation.template_kwargs))
        if shape in self._complete:
            return None
        chat, arguments, marks = _marked(conversation)
        text = self._rendered(chat, arguments)
        lost = [lost for mark, lost in marks.items() if text is not None and mark not in text]
        if lost:
            name, role, place = lost[0]
            fix = self._instead(role) if name == "content" else _FIXES[name]
            return f'the chat template leaves out "{name}"{place}', f"{fix}, {_OR}"
        self._complete.add(shape)
        return None

    def unsupported_role(self, messages: Messages) -> Problem | None:
        """Return the role for which the template refuses a conversation, if it is one."""
        role = next((message.role for message in messages if not self._renders(message.role)), None)
        if role is None:
            return None
        return f"the chat template does not support the role {role}", f"{self._instead(role)}, {_OR}"

    def _instead(self, role: str) -> str:
        """Return what to do with a text that is not rendered."""
        if role in ("user", "assistant"):
            return "move the text to a message of its own"
        kin = ("system",) if role in INSTRUCTION_ROLES else RESULT_ROLES
        other = next((name for name in kin if not self._renders(role) and self._renders(name)), None)
        return f"rename the role to {other}" if other else "write the text into a user message"

    def _renders(self, role: str) -> bool:
        """Return whether the template renders a message of this role where it is usual."""
        if role not in self._roles:
            message = {"role": role, "content": _MARK, "tool_call_id": _CALL["id"], "name": "f"}
            after_call, after_text = ([_QUESTION, before, message, _ANSWER] for before in (_CALLING, _ANSWER))
            tries = [[message, _QUESTION, _ANSWER]] if role in INSTRUCTION_ROLES else [after_call, after_text]
            self._roles[role] = any(_MARK in (self._rendered(chat, {}) or "") for chat in tries)
        return self._roles[role]

    def _rendered(self, chat: list[dict[str, Any]], arguments: dict[str, Any]) -> str | None:
        try:
            return str(self._tokenizer.apply_chat_template(chat, tokenize=False, **arguments))
        except refusals():
            return None


def _shape(message: Message) -> tuple[Any, ...]:
    extra = json.loads(message.extra) if message.extra else {}
    sizes = ((key, len(value) if isinstance(value, list) else 1) for key, value in extra.items())
    return message.role, bool(message.content.strip()), *sizes


def _marked(
    conversation: Conversation,
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, tuple[str, str, str]]]:
    """Return messages and the template's arguments with marks in place of text and names; and, for each mark, the field
    that it stands for, the role of its message, and its place.
    """
    marks = dict[str, tuple[str, str, str]]()

    def put(fields: Any, key: str, name: str, role: str = "", place: str = "") -> None:
        if isinstance(fields, dict) and isinstance(fields.get(key), str) and fields[key].strip():
            fields[key] = f"mark{len(marks)}mark"
            marks[fields[key]] = name, role, place

    chat = [message.as_dict() for message in conversation.messages]
    arguments = conversation.template_arguments()
    for tool in arguments["tools"] or ():
        put(tool.get("function", tool), "name", "tools")
    for at, fields in enumerate(chat, 1):
        where = fields["role"], f" of message {at} of {len(chat)} (role {fields['role']})"
        put(fields, "content", "content", *where)
        calls = fields.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            put(call.get("function", call) if isinstance(call, dict) else None, "name", "tool_calls", *where)
        if at == len(chat) and (reasoning := next((key for key in REASONING if key in fields), None)):
            put(fields, reasoning, reasoning, *where)
    return chat, arguments, marks
