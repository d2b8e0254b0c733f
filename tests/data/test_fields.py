"""Unread fields: those that could be part of the conversation stop a row, metadata does not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers import ROOT

from rmtool.data.field_names import Kind, kind_of
from rmtool.data.formats import preference_record, preference_records
from rmtool.data.record import PLAIN, Record, RowOptions
from rmtool.data.rejects import Rejects
from rmtool.data.responses import score_record
from rmtool.data.rows import Row
from rmtool.errors import Place, RmtoolError

Q, GOOD, BAD = "What is 2 + 2?", "It is 4.", "It is 5."
U, A = (lambda text: {"role": "user", "content": text}), (lambda text: {"role": "assistant", "content": text})
PAIR = {"chosen": GOOD, "rejected": BAD}
ASKED = {"prompt": Q, **PAIR}


def row(data: dict[str, Any]) -> Row:
    return Row(Place("f.jsonl", 3), data)


def refused(data: dict[str, Any], options: RowOptions = PLAIN) -> RmtoolError:
    with pytest.raises(RmtoolError) as caught:
        preference_record(row(data), options)
    assert caught.value.id == "E0303"
    return caught.value


def contents(record: Record) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in record.prompt + record.responses[0]]


@pytest.mark.parametrize(
    "field",
    ["question", "query", "input", "Prompt", "PROMPT", "userPrompt", "user_prompt", "prompt_text", "system_and_query",
     "conversation", "dialogue", "dialog_history", "context", "history", "post", "problem", "request", "user", "human",
     "text", "source_text", "task", "title", "x", "问题", "question.text", "queries", "last_user_message"],
)  # fmt: skip
def test_text_under_any_name_stops_a_row_without_a_prompt(field: str) -> None:
    error = refused({field: Q, **PAIR})
    target = "system" if field.startswith("system") else "prompt"
    assert f"set data.columns.{target}={field}, or data.columns.ignore=" in error.hint
    mapped = preference_record(row({field: Q, **PAIR}), RowOptions(((target, field),)))
    assert mapped.prompt[0].content == Q
    assert preference_record(row({field: Q, **PAIR}), RowOptions((("ignore", field),))).prompt == ()


@pytest.mark.parametrize(
    "field",
    [
        {"question": "Why?"},
        {"input": "the text"},
        {"query": "x"},
        {"instruction": "Be brief."},
        {"context": "The sky is blue."},
        {"history": [["a", "b"]]},
        {"turns": ["hi", "bye"]},
        {"documents": [{"title": "t", "text": "The sky is blue."}]},
        {"conversation": "Human: hi"},
        {"messages": [U("hi")]},
        {"anything": [U("hi"), A("hello")]},
        {"anything": [{"from": "human", "value": "hi"}]},
        {"anything": U("hi")},
        {"question": {"id": "7", "full_text": "Why?"}},
        {"system_message": "Be brief."},
        {"functions": [{"name": "add"}]},
        {"images": ["dog.png"]},
        {"image": {"bytes": b"x", "path": None}},
        {"audio": "a.wav"},
        {"video_path": "v.mp4"},
        {"rejected_images": ["dog.png"]},
    ],
    ids=str,
)
def test_a_part_of_the_conversation_stops_a_row_with_a_prompt(field: dict[str, Any]) -> None:
    (name,) = field
    assert f"ignore={name}" in refused(ASKED | field).hint
    assert preference_record(row(ASKED | field), RowOptions((("ignore", name),)))


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ({"system_message": "Be brief."}, "set data.columns.system=system_message, or"),
        ({"functions": [{"name": "add"}]}, "set data.columns.tools=functions, or"),
        ({"input": "the text"}, 'add it to "prompt", or set data.columns.ignore=input'),
    ],
)
def test_the_hint_of_a_row_with_a_prompt_reads_the_rest(field: dict[str, Any], hint: str) -> None:
    assert hint in refused(ASKED | field).hint


@pytest.mark.parametrize("field", ["source", "data", "value", "note", "notes", "rubric", "info", "bytes", "category"])
@pytest.mark.parametrize("text", ["Das ist ein Test, oder nicht?", "Add two and two.", "in which year was it built"])
def test_a_sentence_under_the_name_of_a_label_stops_only_a_row_without_a_prompt(field: str, text: str) -> None:
    for data in ({field: text}, {field: [text]}, {"extra": {field: text}}, {field: {"x": text}}):
        assert "could be part of the conversation" in refused(PAIR | data).what
        with pytest.raises(RmtoolError, match="could be part"):
            score_record(row({"response": GOOD} | data))
        assert preference_record(row(ASKED | data))


GROUNDING = (
    "evidence knowledge facts retrieved retrieved_snippets code table schema story transcript constraints few_shot "
    "few_shot_examples examples preamble text content body docs task_description passage retrieved_docs"
)


@pytest.mark.parametrize("field", GROUNDING.split())
def test_what_a_prompt_is_about_stops_a_row_that_has_one(field: str) -> None:
    assert (
        f'add it to "prompt", or set data.columns.ignore={field} ' in refused(ASKED | {field: "The sky is blue."}).hint
    )
    assert preference_record(row(ASKED | {field: "blue_1"}))


@pytest.mark.parametrize(
    "field",
    ["partial_response", "response_prefix", "response_start", "solution_prefix", "prefill", "assistant_prefix",
     "prefix", "initial_steps", "assistantPrefill"],
)  # fmt: skip
def test_the_beginning_of_a_response_stops_a_row(field: str) -> None:
    for data in (ASKED, PAIR):
        assert 'to the end of "prompt" as an assistant message' in refused(data | {field: "Sure,"}).hint


@pytest.mark.parametrize(
    "field",
    [{"mm_data": {"image": "a.png"}}, {"extra": {"images": ["a.png"]}}, {"files": ["a.pdf"]}, {"pdf": "a.pdf"},
     {"frames": ["1.jpg"]}, {"figure": "a.png"}],
    ids=str,
)  # fmt: skip
def test_media_under_other_names_stop_a_row(field: dict[str, Any]) -> None:
    (name,) = field
    error = refused(ASKED | field)
    assert "only text is supported" in error.what
    assert f"set data.columns.ignore={name} to use the text alone" in error.hint


METADATA: dict[str, Any] = {
    "id": "a b", "prompt_id": "7f", "question_id": "What 7", "user_id": "u 1", "source": "the web", "dataset": "a set",
    "chosen_model": "gpt 4", "rejected-model": "b c", "score_chosen": 1.0, "rating": "5 of 5", "ratings": [1, 2],
    "length": 7, "prompt_length": "7 tokens", "input_tokens": 9, "num_turns": 3, "turns": 2, "input_ids": [1, 2],
    "language": "English", "category": "open question", "labels": ["good one"], "label": "a b",
    "timestamp": "2024-01-01 10:00", "created_at": "Mon Jan 1", "url": "https://x.y/a b", "license": "CC BY 4.0",
    "is_question": True, "metadata": {"source": "the web", "note": "some words"}, "margin_source": "a b",
    "labelling_prompt": [U("Which is better?")], "generation_prompt": ["Help."], "rationale": "It is better.",
    "feedback": "Well done.", "original_response": "Some text.", "completions": ["A text."], "reference_answer": "4 .",
    "chosen_rating": 4.0, "prompt_source": "a b", "message_count": "3 of 4", "conversation_hash": "x y",
    "image_id": "a b", "num_images": 3, "has_audio": False, "image_count": "3 of 4", "annotator": "Jane Doe",
    "task_type": "question answering", "context_length": "4k tokens", "version": "v 1", "split": "train set",
    "response_0_source": "a b", "criteria": "be good", "subreddit": "r / a", "user_name": "Jane Doe",
    "prompt_topic": "open science", "prompt_topics": ["a b"], "prompt_intent": "to ask", "query_intent": "to ask",
    "conversation_topic": "a b", "question_topic": "a b", "question_concept": "a b", "problem_subject": "a b",
    "prompt_classification": "a b", "dialogue_act": "a b", "article_title": "The sky", "document_title": "The sky",
    "thread_title": "The sky", "post_flair": "a b", "input_modality": "some text", "images_included": "not yet",
    "audio_available": "not yet", "voice": "calm one", "image_credit": "Jane Doe", "tool": "gpt-4 api",
    "tool_use": "no use", "context_window": "8k tokens", "retrieved_at": "Mon Jan 1", "knowledge_cutoff": "May 2023",
    "num_examples": 3, "language_code": "en", "file": "a b.jsonl", "critique": "It is short. It could be longer.",
    "empty": None, "question": None, "context": "", "history": [], "images": [], "audio": {"bytes": None, "path": None},
    "conversations": [{"role": None, "content": None}], "input": " ",
}  # fmt: skip


@pytest.mark.parametrize("name", METADATA)
def test_metadata_and_empty_fields_stop_nothing(name: str) -> None:
    for data in (ASKED, PAIR):
        assert preference_record(row(data | {name: METADATA[name]}))
    assert score_record(row({"response": GOOD, name: METADATA[name]}))


@pytest.mark.parametrize(
    "field",
    [
        {"messages": [U(Q), A(GOOD)]},
        {"question": Q},
        {"conversation": [{"input": Q, "output": BAD}]},
        {"question_text": f" {Q}\n"},
        {"text": GOOD},
        {"full_conversation": [{"user": {"role": "user", "content": [{"type": "text", "text": Q}]}}]},
        {"task": "question answering", "user": "Jane Doe", "text": f"User: {Q} Assistant: {GOOD}"},
    ],
    ids=str,
)
def test_a_field_that_repeats_what_is_read_stops_nothing(field: dict[str, Any]) -> None:
    chats = {"chosen": [U(Q), A(GOOD)], "rejected": [U(Q), A(BAD)]}
    assert contents(preference_record(row(chats | field))) == [("user", Q), ("assistant", GOOD)]


def test_a_prompt_that_the_response_quotes_is_not_read() -> None:
    question = "What is the sum of two and two?"
    assert "prompt=question" in refused({"question": question, "chosen": f"{question} It is 4.", "rejected": BAD}).hint
    assert "ignore=input" in refused({"prompt": "Add 15 to it.", "input": "5", **PAIR}).hint


def test_several_unread_fields_are_named_together() -> None:
    error = refused({"context": "It is a sum.", "question": Q, "id": 1, **PAIR}, RowOptions())
    assert error.what == '"question", "context" are not read, but could be part of the conversation'
    assert error.hint == ("set data.columns.prompt=question, or data.columns.ignore=question,context to leave them out")


def test_hints_never_advise_the_prompt_where_it_is_missing_or_meant() -> None:
    chat = {"messages": [U(Q), A(GOOD)], "prompt": "Something else."}
    with pytest.raises(RmtoolError) as caught:
        score_record(row(chat))
    assert caught.value.hint == "set data.columns.ignore=prompt to leave it out"
    assert 'write it as "prompt"' in refused({"questions": [Q], **PAIR}).hint


def test_a_refused_field_is_not_listed_as_unread() -> None:
    unread = set[str]()
    with pytest.raises(RmtoolError):
        score_record(row({"id": 1, "ask": Q, "response": GOOD}), PLAIN, unread)
    assert not unread


def test_the_names_of_unread_fields_are_collected_over_all_rows() -> None:
    rows = [row(ASKED | {"id": 1, "note": None}), row(ASKED | {"source": "x"})]
    unread, rejects = set[str](), Rejects()
    assert len(list(preference_records(rows, RowOptions(), rejects, lambda _: None, unread))) == 2
    assert (unread, rejects.count) == ({"id", "source"}, 0)


def test_a_later_row_is_checked_too() -> None:
    rejects = Rejects()
    rows = [row(ASKED), row(ASKED | {"images": ["dog.png"]}), row(ASKED | {"input": "x"})]
    assert len(list(preference_records(rows, PLAIN, rejects, lambda _: None))) == 1
    assert rejects.count == 2


def test_a_column_may_have_dots_or_be_inside_an_object() -> None:
    assert preference_record(row({"a.b": Q, **PAIR}), RowOptions((("prompt", "a.b"),))).prompt[0].content == Q
    inside = {"data": {"question": Q, "topic": "Some words"}, **PAIR}
    assert "prompt=data.question" in refused(inside).hint
    assert preference_record(row(inside), RowOptions((("prompt", "data.question"),))).prompt[0].content == Q


SCORED = [
    ({"prompt": Q, "response": GOOD}, Q),
    ({"instruction": "Add.", "input": "2 + 2", "output": GOOD}, "Add.\n2 + 2"),
    ({"instruction": Q, "input": "", "response": GOOD}, Q),
    ({"system": "", "question": Q, "response": GOOD}, Q),
    ({"system": "", "input": Q, "responses": [GOOD]}, Q),
    ({"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": GOOD}]}, Q),
    ({"conversations": [{"from": "human", "value": Q}], "response": GOOD}, Q),
    ({"messages": [U(Q)], "response": GOOD}, Q),
    ({"messages": [U(Q)], "responses": [GOOD], "response": None}, Q),
    ({"response": f"Human: {Q}\n\nAssistant: {GOOD}"}, Q),
]


@pytest.mark.parametrize(("data", "prompt"), SCORED, ids=str)
def test_layouts_of_rows_to_score(data: dict[str, Any], prompt: str) -> None:
    assert contents(score_record(row(data))) == [("user", prompt), ("assistant", GOOD)]


def test_rows_to_score_are_mapped_and_checked() -> None:
    data = {"ask": Q, "answer": GOOD, "sys": "Be brief."}
    columns = (("prompt", "ask"), ("response", "answer"), ("system", "sys"))
    assert contents(score_record(row(data), RowOptions(columns))) == [
        ("system", "Be brief."), ("user", Q), ("assistant", GOOD)
    ]  # fmt: skip
    hints = {"prompt=ask": columns[1:], "response=answer": columns[:1], "system=sys": columns[:2]}
    for hint, wrong in hints.items():
        with pytest.raises(RmtoolError) as caught:
            score_record(row(data), RowOptions(wrong))
        assert f"data.columns.{hint}" in caught.value.hint


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        ({"conversation": [U(Q), A(GOOD)]}, "set data.columns.messages=conversation"),
        ({"prompt": Q, "completions": [GOOD]}, "set data.columns.responses=completions"),
        ({"prompt": Q, "said": GOOD}, "set data.columns.response=COLUMN"),
    ],
)
def test_the_hint_without_a_response_names_the_field_that_has_it(data: dict[str, Any], hint: str) -> None:
    with pytest.raises(RmtoolError) as caught:
        score_record(row(data), PLAIN)
    assert caught.value.hint == hint


@pytest.mark.parametrize("prompt", [{"prompt": None}, {"prompt": ""}, {}])
def test_an_empty_prompt_is_no_prompt(prompt: dict[str, Any]) -> None:
    assert "prompt=question" in refused({**prompt, "question": Q, **PAIR}).hint


def test_a_prompt_in_only_some_responses_is_refused() -> None:
    assert "only some" in refused({"chosen": [U(Q), A(GOOD)], "rejected": BAD}).what


def test_a_system_prompt_beside_messages_is_read() -> None:
    data = {"system": "Be brief.", "messages": [U(Q), A(GOOD)]}
    assert contents(score_record(row(data)))[0] == ("system", "Be brief.")


def test_two_different_system_prompts_are_refused() -> None:
    assert "differ" in refused(ASKED | {"system": "Be brief.", "system_prompt": "Be long."}).what
    assert preference_record(row(ASKED | {"system": "a", "system_prompt": "a"})).prompt[0].content == "a"


def test_the_rule_is_described_where_it_is() -> None:
    text = (ROOT / "rmtool" / "data" / "field_names.py").read_text()
    assert all(kind.name in text.partition('"""')[2].partition('"""')[0] for kind in Kind)
    assert kind_of("prompt_id") is Kind.METADATA


CHAT = [U(Q), A(GOOD)]


@pytest.mark.parametrize(
    "data",
    [
        {"messages": json.dumps(CHAT)},
        {"messages": json.dumps([{"loss": True} | message for message in CHAT])},
        {"prompt": json.dumps(CHAT[:1]), "response": json.dumps(CHAT[1:])},
        {"response": json.dumps([{"from": "human", "value": Q}, {"from": "gpt", "value": GOOD}])},
        {"messages": {"role": ["user", "assistant"], "content": [Q, GOOD]}},
        {"messages": [{"role": "user", "content": [Q]}, {"role": "AI", "content": {"type": "text", "text": GOOD}}]},
        {"prompt": [{"type": "text", "text": Q}], "response": GOOD},
        {"messages": [U(Q), {"role": "ChatGPT", "content": None, "refusal": GOOD}]},
    ],
    ids=str,
)
def test_messages_written_in_other_ways_are_read(data: dict[str, Any]) -> None:
    assert contents(score_record(row(data))) == [("user", Q), ("assistant", GOOD)]


@pytest.mark.parametrize("answer", ['[{"a": 1}]', '{"from": "Rome", "value": "x"}', '["x"]', "[{"])
def test_an_answer_in_json_stays_text(answer: str) -> None:
    assert score_record(row({"prompt": Q, "response": answer})).responses[0][0].content == answer


@pytest.mark.parametrize("data", [{"messages": str(CHAT)}, {"prompt": str(CHAT[:1]), "response": GOOD},
                                  {"prompt": Q, "response": str(CHAT)}], ids=str)  # fmt: skip
def test_messages_in_the_notation_of_python_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(RmtoolError, match="Python notation"):
        score_record(row(data))


@pytest.mark.parametrize(
    "prompt",
    ["<|im_start|>user\nHi<|im_end|>\n", "[INST] Hi [/INST]", "### Human: Hi\n### Assistant:", "User: Hi\nAssistant:",
     "BEGINNING OF CONVERSATION: USER: Hi ASSISTANT:", "A chat between two. USER: Hi ASSISTANT: ",
     "### Instruction:\nHi\n\n### Response:\n", "<｜User｜>Hi<｜Assistant｜>",
     "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>",
     "<|start|>user<|message|>Hi<|end|>", "<|header_start|>user<|header_end|>\n\nHi<|eot|>",
     "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi", "<|start_of_role|>user<|end_of_role|>Hi"],
)  # fmt: skip
def test_a_prompt_of_another_template_is_refused(prompt: str) -> None:
    assert "unsupported notation" in refused({"prompt": prompt, **PAIR}).what


@pytest.mark.parametrize("prompt", ["Q: 1 + 1?\nA:", "Human: Hi", "Write to my assistant: be brief.", "[x] <b>"])
def test_a_prompt_that_only_resembles_a_template_is_text(prompt: str) -> None:
    assert preference_record(row({"prompt": prompt, **PAIR})).prompt[0].content == prompt


def test_the_white_space_before_a_continuation_stays() -> None:
    record = score_record(row({"prompt": "\n\nHuman: q\n\nAssistant: Sure, ", "response": "here"}))
    assert record.conversation(0)[-1].content == "Sure, here"


@pytest.mark.parametrize("response", [[A("Sure, a")], [U("q"), A("Sure, a")], "a", "Sure, a"], ids=str)
def test_a_response_that_repeats_the_beginning_is_the_complete_message(response: Any) -> None:
    record = score_record(row({"prompt": [U("q"), A("Sure, ")], "response": response}))
    assert [message.content for message in record.conversation(0)] == ["q", "Sure, a"]
    assert not record.repeats_assistant(0)
    assert score_record(row({"messages": [U("q"), A("a"), A("b")]})).repeats_assistant(0)


VICUNA = "A chat between a curious user and an artificial intelligence assistant. "


@pytest.mark.parametrize(
    "text",
    [f"{VICUNA}USER: {Q} ASSISTANT: {GOOD}", f"BEGINNING OF CONVERSATION: USER: {Q} ASSISTANT:{GOOD}",
     f"用户：{Q}\n助手：{GOOD}", f"问：{Q}\n答：{GOOD}", f"User：{Q}\nAssistant：{GOOD}",
     f"### Human: {Q}\n### Assistant: {GOOD}", f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n{GOOD}"],
)  # fmt: skip
def test_a_conversation_in_another_notation_is_refused_only_without_a_prompt(text: str) -> None:
    with pytest.raises(RmtoolError, match="complete conversation in an unsupported notation"):
        score_record(row({"response": text}))
    assert score_record(row({"prompt": Q, "response": text})).responses[0][0].content == text


@pytest.mark.parametrize("prompt", [f"{VICUNA}USER: Hi ASSISTANT:", "用户：你好\n助手：", "User：Hi\nAssistant： "])
def test_a_prompt_that_ends_before_the_response_of_another_notation_is_refused(prompt: str) -> None:
    assert "unsupported notation" in refused({"prompt": prompt, **PAIR}).what


@pytest.mark.parametrize("text", [f"{VICUNA}It was long.", "用户说：你好", "A conversation between USER: Hi"])
def test_text_about_conversations_stays_text(text: str) -> None:
    assert score_record(row({"response": text})).responses[0][0].content == text


@pytest.mark.parametrize(
    ("field", "stops"),
    [
        ({"model_name_query": "Qwen/Qwen2-72B"}, False),
        ({"source_question": "Why is it so?"}, True),
        ({"choice": "Response 1"}, False),
        ({"choices": ["Rome is it.", "Paris"]}, True),
        ({"options": "A) Rome\nB) Paris"}, True),
        ({"option": 2}, False),
        ({"source_text": "The sky is blue."}, True),
        ({"email_body": "Dear Sir, it is blue."}, True),
        ({"caption": "A dog runs."}, True),
        ({"answer_text": "It is 4."}, False),
        ({"score1_description": "It is bad."}, False),
    ],
    ids=str,
)
def test_names_with_words_of_both_kinds(field: dict[str, Any], stops: bool) -> None:
    if stops:
        assert "could be part" in refused(ASKED | field).what
    else:
        assert preference_record(row(ASKED | field))


def test_the_rest_of_an_object_is_still_checked_when_a_part_is_mapped() -> None:
    inside = {"data": {"question": Q, "id": 7, "context": "Some words."}, **PAIR}
    prompt = (("prompt", "data.question"),)
    error = refused(inside, RowOptions(prompt))
    assert '"data.context" is not read' in error.what
    assert "data.columns.ignore=data.context " in error.hint
    record = preference_record(row(inside), RowOptions((*prompt, ("ignore", "data"))))
    assert (record.prompt[0].content, inside["data"]["question"]) == (Q, Q)
    assert preference_record(row({"data": {"question": Q, "id": "a b"}, **PAIR}), RowOptions(prompt))
    assert preference_record(row(inside), RowOptions((*prompt, ("ignore", "data.context"))))


def test_the_only_field_that_a_format_lacks_is_named() -> None:
    shp = {"history": Q, "human_ref_A": GOOD, "human_ref_B": BAD, "score_A": 3}
    assert refused(shp).hint.endswith("or set data.columns.labels=COLUMN")
    assert refused({"prompt": Q, "answer": GOOD}).hint.endswith("chosen=COLUMN and data.columns.rejected=COLUMN")


def test_the_steps_of_step_dpo_are_text_or_missing() -> None:
    steps = ASKED | {"initial_reason_steps": "Sure,"}
    assert preference_record(row(steps)).conversation(0)[-1].content == f"Sure,{GOOD}"
    assert len(preference_record(row(steps | {"initial_reason_steps": None})).prompt) == 1
    assert "must be a string" in refused(steps | {"initial_reason_steps": ["Sure,"]}).what


@pytest.mark.parametrize(
    ("columns", "fine"),
    [
        ({"prompt": "question"}, False),  # the row's own prompt would be lost
        ({"prompt": "question", "ignore": "prompt"}, True),
        ({"prompt": "question", "system": "prompt"}, True),  # it is read under another name
        ({"prompt": "prompt"}, True),
    ],
)
def test_a_mapping_does_not_replace_a_field_of_the_row(columns: dict[str, str], fine: bool) -> None:
    row = Row(Place("a", 1), {"prompt": "Be brief.", "question": "Be brief.", "chosen": "So.", "rejected": "No."})
    options = RowOptions(columns=tuple(columns.items()))
    if fine:
        assert preference_record(row, options).prompt[-1].content == "Be brief."
    else:
        with pytest.raises(RmtoolError, match='"prompt" is mapped to "question", but the row has a "prompt", too'):
            preference_record(row, options)
    empty = Row(row.place, row.data | {"prompt": ""})
    assert preference_record(empty, RowOptions(columns=(("prompt", "question"),))).prompt[0].content == "Be brief."
