"""What a chat template leaves out or refuses is the row's error, with the role or field and what to do."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from chat_templates import END, LOOP, published

from rmtool.data.record import Message, Record
from rmtool.errors import Place, RmtoolError
from rmtool.tokenization.encoder import Encoder
from rmtool.tokenization.tokenizer import TULU_TEMPLATE

U, A = Message("user", "How many?"), Message("assistant", "Four.")
TOOLS = json.dumps([{"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}])
CALL = json.dumps(
    {"tool_calls": [{"id": "a1b2c3d4e", "type": "function", "function": {"name": "add", "arguments": {}}}]}
)
RESULT = json.dumps({"name": "add", "tool_call_id": "a1b2c3d4e"})
# Mistral Nemo writes the system message before a question that nothing follows, and nowhere else.
LATE_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set system, messages = messages[0].content, messages[1:] %}{% endif %}"
    + LOOP + "[INST]{% if loop.last and m.role == 'user' %}{{ system }}{% endif %}{{ m.content }}" + END
)  # fmt: skip
FIRST_SYSTEM = "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}" + (
    LOOP + "{% if m.role != 'system' %}{{ m.role + m.content }}{% endif %}" + END
)


def template(tokenizer: Any, name: str) -> Any:
    own = {"tulu": TULU_TEMPLATE, "late system": LATE_SYSTEM, "first system": FIRST_SYSTEM}
    if name not in own:
        return published(tokenizer, name)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = own[name]
    return tokenizer


def encode(tokenizer: Any, name: str, *messages: Message, tools: str = "") -> RmtoolError | None:
    record = Record(Place("f.jsonl", 3), messages[:-1], (messages[-1:],), tools=tools)
    (result,) = Encoder(template(tokenizer, name), 999).encode_many([record])
    return result.error


@pytest.mark.parametrize(
    ("name", "messages", "tools", "what", "hint"),
    [
        ("gemma", (Message("system", "s"), U, A), "", "not support the role system: System", "a user message"),
        ("gemma3", (Message("developer", "d"), U, A), "", "not support the role developer: ", "the role to system"),
        ("gemma3", (U, Message("assistant", "", CALL), Message("tool", "4"), A), "", "role tool: ", "a user message"),
        ("qwen2_5", (Message("developer", "d"), U, A), "", "content.* 1 of 3 .role developer", "the role to system"),
        ("qwen3", (U, A, Message("function", "4"), A), "", "content.* 3 of 4 .role function", "the role to tool"),
        ("phi3", (U, A, Message("observation", "4"), A), "", "content.* 3 of 4 .role observation", "a user message"),
        ("late system", (Message("system", "s"), U, A), "", "content.* 1 of 3 .role system", "a user message"),
        ("first system", (U, A, Message("system", "s"), A), "", "content.* 3 of 4 .role system", "a user message"),
        ("tulu", (U, Message("assistant", "", CALL)), "", 'leaves out "tool_calls" of message 2', "calls into content"),
        ("tulu", (U, A), TOOLS, 'leaves out "tools"', "write the tools into a message"),
        ("llama3_2", (U, Message("assistant", "I add.", CALL)), "", "content.* 2 of 2", "a message of its own"),
        ("tulu", (U, A._replace(extra='{"reasoning_content": "Hm."}')), "", '"reasoning_content" of', "into content"),
    ],
)  # fmt: skip
def test_what_a_template_cannot_render_is_an_error(
    tokenizer: Any, name: str, messages: tuple[Message, ...], tools: str, what: str, hint: str
) -> None:
    error = encode(tokenizer, name, *messages, tools=tools)
    assert error
    assert (error.id, str(error.place)) == ("E0307", "f.jsonl:3")
    with pytest.raises(RmtoolError, match=what):
        raise error
    assert hint in error.hint
    assert encode(tokenizer, name, U, A, U, A) is None


@pytest.mark.parametrize(
    ("name", "messages", "tools"),
    [
        ("llama3", (Message("developer", " d "), U, A, Message("ipython", "4"), A), ""),
        ("llama3_2", (U, Message("assistant", "", CALL), Message("tool", "4", RESULT), A), TOOLS),
        ("qwen2_5", (U, Message("assistant", "I add.", CALL), Message("tool", "4", RESULT), A), TOOLS),
        ("gptoss", (Message("developer", "d"), U, A), ""),
        ("glm4moe", (U, Message("assistant", "", CALL), Message("tool", "4", RESULT), A), TOOLS),
        ("qwen3", (U, A._replace(extra='{"reasoning_content": "Hm."}')), ""),
        ("qwen3", (U, A._replace(extra='{"reasoning_content": "Hm."}'), U, A), ""),  # of an earlier turn: not rendered
        ("deepseekv3", (U, Message("assistant", "<think>Hm.</think>Four.")), ""),  # nor text in <think>
        ("gemma3", (Message("system", " s "), U, A), ""),
        ("qwen2_5", (U, Message("assistant", "", CALL)), TOOLS),  # not an empty response
    ],
)
def test_what_a_template_renders_has_the_ids_of_transformers(
    tokenizer: Any, name: str, messages: tuple[Message, ...], tools: str
) -> None:
    reader = template(tokenizer, name)
    record = Record(Place("f.jsonl", 3), messages[:-1], (messages[-1:],), tools=tools)
    group, _ = Encoder(reader, 999).encode(record)
    assert group
    assert group.sequence(0).tolist() == reader.apply_chat_template(
        [message.as_dict() for message in messages], tools=json.loads(tools) if tools else None, return_dict=False
    )


def test_a_shape_is_rendered_once_more_whatever_the_number_of_rows(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, marked = copy.deepcopy(tokenizer), []
    render = tokenizer.apply_chat_template

    def count(chat: Any, **options: Any) -> Any:
        marked.extend([chat] if isinstance(chat[0], dict) and "mark0mark" in chat[0]["content"] else [])
        return render(chat, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", count)
    records = [Record(Place("f.jsonl", at), (U,) * (1 + at % 2), ((A,), (U, A))) for at in range(100)]
    assert not [result for result in Encoder(tokenizer, 999).encode_many(records) if result.error]
    assert len(marked) == 3  # u a; u u a; u u u a


def test_rows_that_differ_in_what_they_have_are_checked_apart(tokenizer: Any) -> None:
    encoder = Encoder(template(tokenizer, "llama3_2"), 999)
    calls = [Record(Place("f.jsonl", 1), (U,), ((Message("assistant", text, CALL),),)) for text in ("", "I add.")]
    assert [result.error is None for result in encoder.encode_many(calls)] == [True, False]
    encoder = Encoder(template(tokenizer, "tulu"), 999)
    tools = [Record(Place("f.jsonl", 1), (U,), ((A,),), tools=tools) for tools in ("", TOOLS)]
    assert [result.error is None for result in encoder.encode_many(tools)] == [True, False]
