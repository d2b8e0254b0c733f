"""A prompt that is too long loses its oldest turns, then the first words of the last question; nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from chat_templates import published

from rmtool.data.formats import preference_record
from rmtool.data.record import Message, Messages, Record
from rmtool.data.responses import score_record
from rmtool.data.rows import Row
from rmtool.dataset.split import describe_counts
from rmtool.errors import Place, RmtoolError
from rmtool.tokenization.encoder import Encoder
from rmtool.tokenization.tokenized_dataset import tokenize_records
from rmtool.tokenization.truncation import shorten

SYSTEM, CALL = Message("system", "Be brief."), '{"tool_calls": []}'
ROUNDS = (
    Message("user", "u1"), Message("assistant", "a1"), Message("user", "u2"), Message("assistant", "", CALL),
    Message("tool", "t2"), Message("tool", "t3"), Message("assistant", "a2"), Message("user", "u3 and more words"),
)  # fmt: skip


def texts(prompt: Messages | None) -> list[str] | None:
    return prompt and [message.content for message in prompt]


@pytest.mark.parametrize(
    ("prompt", "messages", "words", "left"),
    [
        (ROUNDS, 7, 99, ["u2", "", "t2", "t3", "a2", "u3 and more words"]),  # a question goes with its answer
        (ROUNDS, 5, 99, ["u3 and more words"]),  # a tool result is not left without its call
        ((SYSTEM, *ROUNDS), 8, 99, ["Be brief.", "u2", "", "t2", "t3", "a2", "u3 and more words"]),
        ((SYSTEM, *ROUNDS), 3, 99, ["Be brief.", "u3 and more words"]),
        ((SYSTEM, *ROUNDS), 2, 2, ["Be brief.", "more words"]),
        ((SYSTEM, *ROUNDS), 1, 99, None),
        ((SYSTEM, *ROUNDS), 2, 0, None),
        ((Message("developer", "d"), SYSTEM, *ROUNDS), 3, 99, ["d", "Be brief.", "u3 and more words"]),
        (
            (Message("assistant", "hello"), *ROUNDS),
            8,
            99,
            ["u1", "a1", "u2", "", "t2", "t3", "a2", "u3 and more words"],
        ),
        ((SYSTEM, *ROUNDS[2:6]), 4, 99, ["Be brief.", "u2"]),  # a round goes before the question is touched
        ((SYSTEM, *ROUNDS[2:6], *ROUNDS[3:5]), 4, 99, ["Be brief.", "u2", "", "t2"]),
        ((*ROUNDS, Message("assistant", "begun")), 2, 99, ["u3 and more words", "begun"]),
        ((*ROUNDS, Message("assistant", "begun")), 1, 99, None),
        ((*ROUNDS[:2], SYSTEM, *ROUNDS[7:]), 3, 99, ["Be brief.", "u3 and more words"]),  # a rule in the middle
        ((*ROUNDS[:2], SYSTEM, *ROUNDS[7:]), 2, 2, ["Be brief.", "more words"]),
        (
            (*ROUNDS[:1], Message("developer", "d"), *ROUNDS[1:2], SYSTEM, *ROUNDS[2:]),
            4,
            99,
            ["d", "Be brief.", "u3 and more words"],
        ),
        ((ROUNDS[7], SYSTEM), 2, 2, ["more words", "Be brief."]),  # after the question
        ((SYSTEM,), 0, 99, None),
        ((), 0, 99, None),
    ],
)
def test_the_oldest_turns_go_first(prompt: Messages, messages: int, words: int, left: list[str] | None) -> None:
    def fits(each: Messages) -> bool:
        return len(each) <= messages and all(len(m.content.split()) <= words for m in each if m.content[:2] != "Be")

    assert texts(shorten(prompt, fits)) == left


def test_text_is_cut_at_words_and_inside_one_that_is_very_long() -> None:
    for text, size, left in (
        ("one two three", 9, "two three"), ("one two three", 8, "three"), ("one  two", 4, "two"), ("one", 2, None),
        ("x" * 100, 40, "x" * 36), ("你" * 100, 40, "你" * 36), ("word " + "y" * 100, 50, "y" * 36),
    ):  # fmt: skip
        short = shorten((Message("user", text),), lambda each, size=size: len(each[0].content) <= size)  # type: ignore[misc]
        assert texts(short) == (None if left is None else [left])


TURNS = [{"role": role, "content": f"{role} {at} " * 4} for at in (1, 2, 3) for role in ("user", "assistant")]
BE_BRIEF = {"role": "system", "content": "Be brief."}


def record_of(**fields: Any) -> Record:
    parse = preference_record if "chosen" in fields else score_record
    return parse(Row(Place("f.jsonl", 1), fields))


@pytest.mark.parametrize("name", ["llama3", "llama3_2", "qwen2_5", "qwen3", "gemma3", "phi3"])
@pytest.mark.parametrize("system", [[], [BE_BRIEF]], ids=["no system", "system"])
@pytest.mark.parametrize("kept", [0, 2, 4])
def test_what_is_left_is_the_conversation_without_its_oldest_turns(
    tokenizer: Any, name: str, system: list[Any], kept: int
) -> None:
    """Its opening (BOS, headers, default system text) is what the template writes for it."""
    tokenizer = published(tokenizer, name)
    expected = [
        tokenizer.apply_chat_template(
            [*system, *TURNS[kept:5], {"role": "assistant", "content": text}], return_dict=False
        )
        for text in ("yes", "no, never")
    ]
    encoder = Encoder(tokenizer, max(map(len, expected)), "truncate_prompt")
    record = record_of(prompt=[*system, *TURNS[:5]], chosen="yes", rejected="no, never")
    (result,) = encoder.encode_many([record])
    assert result.group
    assert [ids.tolist() for ids in result.group.sequences()] == expected
    assert result.changes.get("truncated_messages", 0) == kept
    single = record_of(messages=[*system, *TURNS[:5], {"role": "assistant", "content": "no, never"}])
    alone, event = encoder.encode(single)
    assert alone
    assert event == ("truncated" if kept else None)
    assert alone.sequence(0).tolist() == expected[1]


@pytest.mark.parametrize("name", ["llama3_2", "qwen2_5", "gemma3"])
def test_the_last_question_is_cut_at_a_word_and_the_template_writes_the_rest(tokenizer: Any, name: str) -> None:
    tokenizer = published(tokenizer, name)
    words = [f"word{at}" for at in range(100)]
    answer = {"role": "assistant", "content": "yes"}

    def ids(count: int) -> list[int]:
        chat = [BE_BRIEF, {"role": "user", "content": " ".join(words[-count:])}, answer]
        return list(tokenizer.apply_chat_template(chat, return_dict=False))

    record = record_of(prompt=[BE_BRIEF, *TURNS[:4], {"role": "user", "content": " ".join(words)}], response="yes")
    for count in (1, 7, 99):
        for spare in (0, 1):
            group, event = Encoder(tokenizer, len(ids(count)) + spare, "truncate_prompt").encode(record)
            assert group
            assert (group.sequence(0).tolist(), event) == (ids(count), "truncated")
    with pytest.raises(RmtoolError, match="the prompt cannot be truncated enough") as caught:
        Encoder(tokenizer, len(ids(1)) - 1, "truncate_prompt").encode(record)
    assert caught.value.id == "E0305"


def test_truncated_rows_are_counted_with_what_they_lost(tokenizer: Any) -> None:
    records = [record_of(prompt=TURNS[:count], chosen="yes", rejected="no") for count in (1, 3, 5)]
    last = record_of(prompt=TURNS[2:5], chosen="yes", rejected="no")
    limit = Encoder(tokenizer, 999).encode(last)[0]
    assert limit
    encoder = Encoder(tokenizer, limit.longest, "truncate_prompt")
    counts = tokenize_records(encoder, records, "error", lambda: None).counts
    whole, _ = replace(encoder, max_length=999).encode(records[2])
    assert whole
    assert counts == {"truncated": 1, "truncated_messages": 2, "truncated_tokens": whole.longest - limit.longest}
    shown = [("with truncated prompt", f"1 of 3 (2 messages, {counts['truncated_tokens']} tokens removed)")]
    assert describe_counts(counts, " of 3") == shown
