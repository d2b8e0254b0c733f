"""One message of a row: its role, its text, and the fields that a chat template renders.

In: an object with role and content (or from and value), as OpenAI, LLaMA-Factory, ms-swift and others write it. Out:
role, content, extra fields; an error for what is not text.
Cost: string work only.
"""

from __future__ import annotations

import json
from typing import Any

from rmtool.data.field_names import Kind, has_content, is_message, kind_of
from rmtool.data.rows import FIX_ROW, Row, json_kind
from rmtool.errors import RmtoolError

# A chat template renders the roles that it knows.
INSTRUCTION_ROLES, RESULT_ROLES = ("system", "developer"), ("tool", "function", "ipython", "observation", "environment")
ROLES = (*INSTRUCTION_ROLES, "user", "assistant", *RESULT_ROLES)
REASONING = ("reasoning_content", "thinking", "reasoning")  # one text; the first that a message has is rendered
_ALIASES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "model", "ai", "agent"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool_response", "tool_result"), "tool"),
}
_CALL_ROLES = ("function_call", "tool_call")  # LLaMA-Factory, ms-swift: a call as JSON in the content
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_EXTRA_FIELDS = ("tool_calls", "tool_call_id", "name", *REASONING)  # chat templates render these
_MESSAGE_FIELDS = frozenset({"role", "content", "from", "value", "refusal", "function_call", *_EXTRA_FIELDS})


def invalid_row(row: Row, what: str, found: str | None = None, hint: str = FIX_ROW) -> RmtoolError:
    """Return the error of a row that is valid JSON, but not a valid row."""
    return RmtoolError("E0303", what, hint, row.place, found)


def inner_json(text: str) -> Any:
    """Parse JSON inside a field; None if it is not valid, or has an unpaired surrogate."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        return None
    return value


def message_of(row: Row, item: Any, name: str) -> tuple[str, str, str]:
    """Return the role, the content and the extra fields (as JSON) of a message.

    Raises:
        RmtoolError: E0303 when it is not a message, or has parts that are not text.
    """
    if not isinstance(item, dict):
        raise invalid_row(row, f'{name} must be an object with "role" and "content"', json_kind(item))
    role, content = item.get("role"), item.get("content")
    if len(item) == 2 and role in ROLES and isinstance(content, str):
        return role, content, ""
    share_gpt = role is None and "from" in item
    said, content = item.get("from" if share_gpt else "role"), item.get("value" if share_gpt else "content")
    role = role_of(item)
    if said is None and not share_gpt:
        texts = {key: len(each) for key, each in item.items() if isinstance(each, str) and name.isidentifier()}
        hint = f"set data.columns.{name}={name}.{max(texts, key=lambda key: texts[key])}" if texts else FIX_ROW
        raise invalid_row(row, f'{name} must be an object with "role" and "content"', ", ".join(item), hint)
    if role not in ROLES:
        raise invalid_row(row, f"{name}.role must be one of {', '.join(ROLES)}", repr(said))
    if len(item) > 2:
        _refuse_lost(row, item, name)
    extra = {key: item[key] for key in _EXTRA_FIELDS if item.get(key)}
    if "tool_calls" in extra:
        extra["tool_calls"] = _objects(row, extra["tool_calls"], f"{name}.tool_calls")
    if item.get("function_call"):
        extra["tool_calls"] = _calls(row, item["function_call"], f"{name}.function_call")
    elif said in _CALL_ROLES and isinstance(content, str):
        extra["tool_calls"], content = _calls(row, content, f"{name}.content"), None
    if content is None and "tool_calls" not in extra:
        content = item.get("refusal")
    content = [content] if isinstance(content, dict) else content
    if isinstance(content, list):
        content = "".join(_text_of(row, part, f"{name}.content[{at}]") for at, part in enumerate(content))
    if content is None and "tool_calls" in extra:
        content = ""
    if not isinstance(content, str):
        raise invalid_row(row, f"{name}.content must be a string", json_kind(content))
    return role, content, extra_json(extra)


def extra_json(extra: dict[str, Any]) -> str:
    """Return the extra fields of a message as JSON; empty without any."""
    return json.dumps(extra, ensure_ascii=False, sort_keys=True) if extra else ""


def shown_call(call: dict[str, Any]) -> str:
    """Return a tool call as name({"argument": "value"})."""
    arguments = call.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f"{call.get('name')}({text})"


def role_of(item: Any) -> Any:
    """Return the role of a message under the name that chat templates use."""
    said = item.get("from") if item.get("role") is None else item["role"]
    folded = said.strip().lower() if isinstance(said, str) else said
    return _ALIASES.get(folded, folded) if isinstance(folded, str) else folded


def _refuse_lost(row: Row, item: dict[str, Any], name: str) -> None:
    """Refuse a message with other fields that are part of what it says."""
    rest = (key for key in item if key not in _MESSAGE_FIELDS and kind_of(key) in (Kind.MEDIA, Kind.CONVERSATION))
    rest = (key for key in rest if item[key] != item.get("content"))
    if lost := [key for key in rest if not isinstance(item[key], bool | int | float) and has_content(item[key])]:
        hint = "remove them, or render them into content"
        raise invalid_row(row, f"{name} has unsupported fields: {', '.join(lost)}", hint=hint)


def _text_of(row: Row, part: Any, name: str) -> str:
    """Return the text of a content part; images and others are not text."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise invalid_row(row, f'{name} must be an object with "type" and "text"', json_kind(part))
    kind = part.get("type") or "text"
    others = [key for key, value in part.items() if kind_of(key) is Kind.MEDIA and has_content(value)]
    if kind not in _TEXT_PARTS or others:
        found = ", ".join(map(str, others or [kind]))
        hint = "remove this part or the row: only text is supported"
        raise invalid_row(row, f"{name} is a part that is not text", found, hint)
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise invalid_row(row, f"{name}.text must be a string", json_kind(text))
    return text


def is_text_part(value: Any) -> bool:
    """Return whether a value is a content part with text, not a message."""
    return isinstance(value, dict) and value.get("type") in _TEXT_PARTS and not is_message(value)


def _calls(row: Row, value: Any, name: str) -> list[dict[str, Any]]:
    """Return the tool calls in one object with name and arguments, or several."""
    calls = _objects(row, value, name)
    if not all(isinstance(call.get("name"), str) for call in calls):
        raise invalid_row(row, f"{name} must be a tool call with name and arguments")
    return [{"type": "function", "function": call} for call in calls]


def _objects(row: Row, value: Any, name: str) -> list[dict[str, Any]]:
    """Return a list of objects, which may be JSON, as Hub datasets store it, or a single one."""
    value = inner_json(value) if isinstance(value, str) else value
    objects = value if isinstance(value, list) else [value]
    if not objects or not all(isinstance(each, dict) for each in objects):
        raise invalid_row(row, f"{name} must be a list of objects, or JSON of one", json_kind(value))
    return objects
