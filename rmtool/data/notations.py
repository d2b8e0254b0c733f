"""Other notations of a conversation: transcripts, JSON text, objects of two lists, and text of a chat template.

In: a value of a row. Out: the turns or messages that it means; an error for a notation that is not supported.
Cost: string work only; a value that is plain text costs a look at its first and last characters.
"""

from __future__ import annotations

import re
from typing import Any

from rmtool.data.field_names import is_message, is_messages
from rmtool.data.messages import ROLES, inner_json, invalid_row, role_of
from rmtool.data.rows import Row

# First characters of values that are worth a closer look: most text has others.
_SPACE = " \n\r\t"
JSON_OPENINGS = frozenset(f"[{{{_SPACE}")
OPENINGS = ("[", "{", "(", "array(", "Human:", *_SPACE)  # of text that is messages or a transcript
_RENDERED_OPENINGS, _RENDERED_ENDS = frozenset(f"<[Bb{_SPACE}"), frozenset(f":：]>{_SPACE}")
_TAIL = 64  # characters in which a rendered prompt's last marker is
_TURN = re.compile(r"\n\r?\n(Human|Assistant):")
_MARKER = (
    r"\s*(?:(?:<s>|<bos>|<\|begin_of_text\|>)\s*)?"
    r"(?:\[INST\]|<start_of_turn>|<\|(?:im_start|start_header_id|begin_of_text|user|system|prompter)\b"
    r"|<\|(?:START_OF_TURN_TOKEN|start_of_role|header_start|start)\|>|<｜(?:begin▁of▁sentence|User)｜>)"
)
# Other notations of a whole conversation in one text, at its beginning.
_NOTATION = re.compile(
    r"\W*(?:human|user|h|question|q|prompter|instruction|system|用户|人类|问)\W{0,3}[:：].*?"
    r"(?:\s\W{0,4}(?:assistant|ai|bot|gpt|chatgpt|answer|a|response)|助手|助理|答)\W{0,3}[:：]"
    rf"|(?:A chat between|A conversation between|BEGINNING OF CONVERSATION:).*?\bUSER:.*?\bASSISTANT:|{_MARKER}",
    re.DOTALL | re.IGNORECASE,
)
_BEGINS_RENDERED = re.compile(rf"BEGINNING OF CONVERSATION:|{_MARKER}", re.IGNORECASE)
_ENDS_RENDERED = re.compile(
    r"(?:(?:^|\s)\W{0,4}(?:assistant|chatgpt|gpt|ai|bot|助手)\W{0,3}[:：]|###\W{0,4}response\W{0,3}:|\[/INST\]"
    r"|<\|im_start\|>assistant|<\|assistant\|>|<start_of_turn>model|assistant<\|end_header_id\|>)\s*$",
    re.IGNORECASE,
)
_JSON_MESSAGE = re.compile(r'\s*\[?\s*\{\s*"(?:.{,200}?")??(?:role|content|from|value)"\s*:', re.DOTALL)
_PYTHON_MESSAGE = re.compile(r"\s*(?:array\(|\()?\[?\s*\{\s*'(?:role|content|from|value)'\s*:")
_EXTRA_ID = re.compile(r"\n?<extra_id_1>(Assistant|User)\n")
_SPEAKERS = {"Human": "user", "User": "user", "Assistant": "assistant"}


# Placeholders of media in text. HTML has <video> and <audio>, too: inside a line, or with an end.
_MEDIA_TOKEN = re.compile(
    r"(?<!`)<(image)>(?!`)|^[ \t]*<(video|audio)>|<(video|audio)>[ \t]*$|<\|(?:image|video|audio|vision)\w*\|>",
    re.MULTILINE,
)

Turns = list[tuple[str, str]]  # role and content


def unpacked_messages(value: Any) -> Any:
    """Return messages that are written as JSON text, or as an object of two lists, as messages; other values as they
    are.
    """
    if isinstance(value, str):
        if _JSON_MESSAGE.match(value):
            parsed = inner_json(value)
            first = parsed[0] if is_messages(parsed) else parsed
            return parsed if is_message(first) and role_of(first) in ROLES else value
    elif isinstance(value, dict):
        for names in (("role", "content"), ("from", "value")):
            columns = [value.get(name) for name in names]
            if all(isinstance(column, list) for column in columns):
                count = len(value[names[0]])
                same = {key: each for key, each in value.items() if isinstance(each, list) and len(each) == count}
                if same.keys() >= set(names):
                    return [dict(zip(same, each, strict=True)) for each in zip(*same.values(), strict=True)]
    elif isinstance(value, list) and value and isinstance(value[0], str):
        items = list(map(unpacked_messages, value))
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value


def refuse_python_text(row: Row, value: str, name: str) -> None:
    """Refuse a list of messages that Python wrote as text.

    Raises:
        RmtoolError: E0303 when the value is one.
    """
    if _PYTHON_MESSAGE.match(value):
        hint = "write it as a list of messages, or as JSON: json.dumps in place of str"
        raise invalid_row(row, f'"{name}" is the Python notation of messages, as text', repr(value[:40]), hint)


def refuse_rendered(row: Row, value: str, name: str) -> None:
    """Refuse a prompt that begins with the text of a chat template, or ends in the marker before a response.

    Raises:
        RmtoolError: E0303 when the value is one.
    """
    begins = value[:1] in _RENDERED_OPENINGS and _BEGINS_RENDERED.match(value)
    if begins or (value[-1:] in _RENDERED_ENDS and _ENDS_RENDERED.search(value[-_TAIL:])):
        what = f'"{name}" is text of a chat template, or in another unsupported notation of a conversation'
        raise invalid_row(row, what, repr(value[:40]), "write it as plain text, or as a list of messages")


def has_media_token(value: str) -> bool:
    """Return whether a text has the placeholder of an image, video or audio, as LLaVA, LLaMA-Factory and ms-swift write
    it; its file is not beside it where such data was exported as text.
    """
    found = _MEDIA_TOKEN.finditer(value) if "<" in value else ()
    return any(f"</{match[match.lastindex or 0]}>" not in value for match in found)


def looks_complete(value: str) -> bool:
    """Return whether a text without a prompt has both sides of a conversation."""
    return _NOTATION.match(value) is not None or len(_TURN.findall(value)) > 1


def read_turns(row: Row, value: str, name: str) -> Turns:
    """Return the turns of a transcript; other text has none.

    Raises:
        RmtoolError: as `refuse_python_text`.
    """
    if not value.startswith(OPENINGS):
        return []
    refuse_python_text(row, value, name)
    return _transcript(value)


def _transcript(text: str) -> Turns:
    """Split an hh-rlhf transcript: "\\n\\nHuman: ...\\n\\nAssistant: ..." (Bai et al., arXiv 2204.05862). Without the
    blank lines at the beginning, a text needs both speakers to be one. Other text has no turns.
    """
    begin = text.lstrip()
    marked = text.count("\n", 0, len(text) - len(begin)) > 1
    if not begin.startswith(("Human:", "Assistant:") if marked else "Human:"):
        return []
    parts = _TURN.split(f"\n\n{begin}")[1:]
    return _turns(parts) if marked or "Assistant" in parts[::2] else []


def _turns(parts: list[str]) -> Turns:
    """Pair up speakers and what they say."""
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [(_SPEAKERS[speaker], content.strip()) for speaker, content in turns]


def extra_id_turns(text: str) -> Turns:
    """Split what HelpSteer2 writes: "...\n<extra_id_1>Assistant\n...\n<extra_id_1>User\n"."""
    return _turns(["User", *_EXTRA_ID.split(text)])
