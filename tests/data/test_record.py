"""Where the prompt of a conversation ends, and which responses continue its last message."""

from __future__ import annotations

from typing import Any

import pytest

from rmtool.data.formats import preference_record, preference_records
from rmtool.data.record import PLAIN, Message, Record
from rmtool.data.rejects import Rejects
from rmtool.data.responses import score_record
from rmtool.data.rows import Row
from rmtool.errors import Place

CALL = [{"type": "function", "function": {"name": "add", "arguments": {}}}]
TOOL, CALLING = {"role": "tool", "content": "4"}, {"role": "assistant", "content": "", "tool_calls": CALL}
Q = {"role": "user", "content": "q"}


def a(text: str, **extra: str) -> dict[str, str]:
    return {"role": "assistant", "content": text, **extra}


def record_of(**fields: Any) -> Record:
    parse = preference_record if "chosen" in fields else score_record
    return parse(Row(Place("f.jsonl", 1), fields))


@pytest.mark.parametrize(
    ("fields", "prompt", "messages"),
    [
        ({"prompt": [Q, a("It is")], "response": " 4."}, 2, [Q, a("It is 4.")]),
        ({"prompt": [Q, a("It is")], "response": [a(" 4."), a("Sure.")]}, 2, [Q, a("It is 4."), a("Sure.")]),
        ({"prompt": [Q, a("It is")], "chosen": " 4.", "rejected": " 5."}, 2, [Q, a("It is 4.")]),
        ({"prompt": [Q, a("It is")], "chosen": [Q, a("It is"), a(" 4.")], "rejected": " 5."}, 2, [Q, a("It is 4.")]),
        ({"prompt": [Q, a("")], "response": "4."}, 2, [Q, a("4.")]),
        ({"prompt": [Q, a("I", reasoning_content="a")], "response": [a("t", reasoning_content="b")]}, 2,
         [Q, a("It", reasoning_content="ab")]),
        ({"prompt": [Q, a("I add.")], "response": [CALLING, TOOL, a("4.")]}, 2,
         [Q, {**CALLING, "content": "I add."}, TOOL, a("4.")]),
        # Several messages of a response, and complete conversations, are as they are written.
        ({"prompt": [Q], "response": [a("It is"), a(" 4.")]}, 1, [Q, a("It is"), a(" 4.")]),
        ({"messages": [Q, a("It is"), a(" 4.")]}, 1, [Q, a("It is"), a(" 4.")]),
        ({"chosen": [Q, a("It is"), a(" 4.")], "rejected": [Q, a("It is"), a(" 5.")]}, 1, [Q, a("It is"), a(" 4.")]),
        ({"prompt": [Q], "response": [CALLING, TOOL, a("4.")]}, 1, [Q, CALLING, TOOL, a("4.")]),
        ({"messages": [Q, CALLING, TOOL, a("4.")]}, 3, [Q, CALLING, TOOL, a("4.")]),
        ({"prompt": [Q, CALLING], "response": "4."}, 2, [Q, CALLING, a("4.")]),  # a call is complete
    ],
)  # fmt: skip
def test_a_response_continues_the_assistant_message_that_ends_the_prompt(
    fields: dict[str, Any], prompt: int, messages: list[Any]
) -> None:
    record = record_of(**fields)
    assert [message.as_dict() for message in record.conversation(0)] == messages
    assert len(record.prompt) == prompt


def test_rated_rows_with_the_same_prompt_keep_what_they_continue() -> None:
    rows = [
        Row(Place("f.jsonl", at), {"prompt": [Q, a("It is")], "response": text, "rating": at})
        for at, text in enumerate((" 4.", " 5."))
    ]
    (record,) = preference_records(rows, PLAIN, Rejects(), lambda format: None)
    assert [record.conversation(at)[1] for at in (0, 1)] == [Message("assistant", f"It is {n}.") for n in (4, 5)]
    assert record.preferences == ((1, 0),)
