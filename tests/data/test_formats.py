"""Formats of preference data as their authors publish them, and the pairs they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, SHARED, pair_rows, write_jsonl

from rmtool.config import Source
from rmtool.data.formats import FORMATS, preference_record, preference_records, recognize
from rmtool.data.record import Message, Record, RowOptions
from rmtool.data.rejects import Rejects
from rmtool.data.rows import Row, read_rows
from rmtool.data.sources import draw_share, select
from rmtool.errors import Place, RmtoolError

Q, GOOD, BAD, WORSE = "What is 2 + 2?", "It is 4.", "It is 5.", "It is blue."
U, A = (lambda text: {"role": "user", "content": text}), (lambda text: {"role": "assistant", "content": text})


def row(data: dict[str, Any], line: int = 1) -> Row:
    return Row(Place("f.jsonl", line), data)


def texts(record: Record) -> set[tuple[str, str, str]]:
    """(last message of the prompt, winner, loser) of every preference."""
    prompt = record.prompt[-1].content
    return {(prompt, record.responses[w][-1].content, record.responses[x][-1].content) for w, x in record.preferences}


ONE = {(Q, GOOD, BAD)}
EXAMPLES: dict[str, tuple[str, dict[str, Any], set[tuple[str, str, str]]]] = {
    "RewardBench": (
        "pairs of chosen and rejected",
        {"prompt": Q, "chosen": GOOD, "chosen_model": "a", "rejected": BAD, "rejected_model": "b", "subset": "x"},
        ONE,
    ),
    "Tulu 3 mixture": (
        "pairs of chosen and rejected",
        {"id": "1", "prompt": Q, "chosen": [U(Q), A(GOOD)], "rejected": [U(Q), A(BAD)], "chosen_model": "a"},
        ONE,
    ),
    "UltraFeedback binarized": (
        "pairs of chosen and rejected",
        {"prompt": Q, "chosen": [U(Q), A(GOOD)], "rejected": [U(Q), A(BAD)], "messages": [U(Q), A(GOOD)],
         "score_chosen": 9.0, "score_rejected": 4.0},
        ONE,
    ),
    "ShareGPT messages": (
        "pairs of chosen and rejected",
        {"prompt": [{"from": "human", "value": Q}], "chosen": {"from": "gpt", "value": GOOD},
         "rejected": {"from": "gpt", "value": BAD}},
        ONE,
    ),
    "RewardBench 2": (
        "lists of chosen and rejected responses",
        {"prompt": Q, "chosen": [GOOD], "rejected": [BAD, WORSE], "num_correct": 1, "subset": "Math"},
        {(Q, GOOD, BAD), (Q, GOOD, WORSE)},
    ),
    "RMB pair": (
        "RMB, pairs",
        {"conversation_input": [U(Q) | {"language": "English"}], "chosen": {"answer": GOOD, "llm_name": "a"},
         "reject": {"answer": BAD, "llm_name": "b"}, "category_path": "Pairwise_set/x"},
        ONE,
    ),
    "RMB best of N": (
        "RMB, best of N",
        {"conversation_input": [U(Q)], "bon_best": {"answer": GOOD},
         "loser_list": [{"answer": BAD}, {"answer": WORSE}]},
        {(Q, GOOD, BAD), (Q, GOOD, WORSE)},
    ),
    "HelpSteer3": (
        "HelpSteer3 preference",
        {"context": [U(Q)], "response1": BAD, "response2": GOOD, "overall_preference": 2, "domain": "stem"},
        ONE,
    ),
    "HelpSteer2 preference": (
        "HelpSteer2 preference",
        {"prompt": Q, "response_1": GOOD, "response_2": BAD, "preference_strength": -3, "split": "train"},
        ONE,
    ),
    "PKU-SafeRLHF": (
        "PKU-SafeRLHF",
        {"prompt": Q, "response_0": BAD, "response_1": GOOD, "better_response_id": 1, "safer_response_id": 0},
        ONE,
    ),
    "Chatbot Arena": (
        "Chatbot Arena, conversations",
        {"conversation_a": [U(Q), A(BAD)], "conversation_b": [U(Q), A(GOOD)], "winner": "model_b", "turn": 1},
        ONE,
    ),
    "LMSYS arena, 55k": (
        "Chatbot Arena, responses",
        {"prompt": json.dumps(["a", Q]), "response_a": json.dumps(["b", GOOD]), "response_b": json.dumps(["b", BAD]),
         "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
        ONE,
    ),
    "JudgeBench": (
        "JudgeBench",
        {"pair_id": "1", "question": Q, "response_A": BAD, "response_B": GOOD, "label": "B>A", "source": "mmlu"},
        ONE,
    ),
    "Nectar": (
        "Nectar",
        {"prompt": f"\n\nHuman: {Q}\n\nAssistant: ", "answers": [
            {"answer": BAD, "rank": 2.0}, {"answer": GOOD, "rank": 1.0}, {"answer": WORSE, "rank": 2.0}]},
        {(Q, GOOD, BAD), (Q, GOOD, WORSE)},
    ),
    "UltraFeedback": (
        "UltraFeedback, completions",
        {"instruction": Q, "completions": [
            {"response": WORSE, "overall_score": 1.0}, {"response": GOOD, "overall_score": 8.5},
            {"response": BAD, "overall_score": 4.0}]},
        {(Q, GOOD, BAD), (Q, GOOD, WORSE), (Q, BAD, WORSE)},
    ),
    "LLaMA-Factory alpaca": (
        "LLaMA-Factory, alpaca",
        {"instruction": "Add.", "input": "2 + 2", "chosen": GOOD, "rejected": BAD, "history": [], "system": None},
        {("Add.\n2 + 2", GOOD, BAD)},
    ),
    "LLaMA-Factory sharegpt": (
        "LLaMA-Factory, sharegpt",
        {"conversations": [{"from": "human", "value": Q}], "chosen": {"from": "gpt", "value": GOOD},
         "rejected": {"from": "gpt", "value": BAD}, "system": ""},
        ONE,
    ),
    "Axolotl chat_template": (
        "messages before chosen and rejected",
        {"messages": [U(Q)], "chosen": A(GOOD), "rejected": A(BAD)},
        ONE,
    ),
    "orca_dpo_pairs": ("Orca pairs", {"system": "", "question": Q, "chosen": GOOD, "rejected": BAD}, ONE),
    "distilabel-intel-orca-dpo-pairs": (
        "Orca pairs",
        {"system": "", "input": Q, "chosen": GOOD, "rejected": BAD, "generations": [GOOD, BAD], "rating": [9.0, 2.0],
         "labelling_prompt": [U("Which is better?")], "labelling_model": "gpt-4", "raw_labelling_response": "9 and 2"},
        ONE,
    ),
    "ultrafeedback-binarized-preferences": (
        "UltraFeedback, Argilla",
        {"source": "x", "instruction": Q, "chosen_response": GOOD, "rejected_response": BAD, "chosen_avg_rating": 5.0},
        ONE,
    ),
    "ms-swift": ("ms-swift", {"messages": [U(Q), A(GOOD)], "rejected_response": BAD, "margin": 1.0}, ONE),
    "ms-swift, rejected_messages": (
        "ms-swift, two conversations", {"messages": [U(Q), A(GOOD)], "rejected_messages": [U(Q), A(BAD)]}, ONE
    ),
    "ms-swift 1": (
        "ms-swift, query", {"query": Q, "response": GOOD, "rejected_response": BAD, "history": [["a", "b"]]}, ONE
    ),
    "OpenAI": (
        "OpenAI preferences",
        {"input": {"messages": [U(Q)], "tools": [], "parallel_tool_calls": True}, "preferred_output": [A(GOOD)],
         "non_preferred_output": [A(BAD)]},
        ONE,
    ),
    "Math-Step-DPO-10K": (
        "Step-DPO",
        {"dataset": "gsm8k", "prompt": Q, "initial_reason_steps": "Step 1:", "chosen": GOOD, "rejected": BAD,
         "full_chosen": f"{GOOD} Done.", "full_rejected": f"{BAD} Done.", "answer": "4"},
        {("Step 1:", GOOD, BAD)},
    ),
    "SHP": (
        "Stanford SHP",
        {"post_id": "p", "history": Q, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0, "score_A": 1},
        ONE,
    ),
    "stack-exchange-paired": (
        "Stack Exchange, paired",
        {"qid": 1, "question": Q, "response_j": GOOD, "response_k": BAD, "metadata": ["https://x.y/q/1"]},
        ONE,
    ),
    "stack-exchange-preferences": (
        "Stack Exchange preferences",
        {"qid": 1, "question": Q, "answers": [
            {"text": BAD, "pm_score": 0, "author": "x"}, {"text": GOOD, "pm_score": 3, "selected": True}]},
        ONE,
    ),
    "webgpt_comparisons": (
        "WebGPT comparisons",
        {"question": {"dataset": "eli5", "id": "7", "full_text": Q}, "quotes_0": {"title": ["a"], "extract": ["b c"]},
         "answer_0": BAD, "answer_1": GOOD, "score_0": -0.5, "score_1": 0.5, "tokens_0": {"prefix": [1]}},
        ONE,
    ),
    "ranked": ("ranked responses", {"prompt": Q, "responses": [BAD, GOOD], "ranks": [2, 1]}, ONE),
    "rated": ("rated responses", {"prompt": Q, "responses": [BAD, GOOD], "ratings": [0.1, 0.9]}, ONE),
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_format_is_recognized_and_gives_its_pairs(name: str) -> None:
    format, data, expected = EXAMPLES[name]
    assert recognize(row(data)).name == format
    assert texts(preference_record(row(data))) == expected


def test_records_have_their_row_as_written_and_its_subset() -> None:
    for name, subset in (("LMSYS arena, 55k", None), ("RMB pair", "Pairwise_set/x"), ("RewardBench", "x")):
        record = preference_record(row(EXAMPLES[name][1]))
        assert (record.row, record.subset) == (EXAMPLES[name][1], subset)


def test_every_format_has_an_example() -> None:
    assert {format.name for format in FORMATS} == {name for name, *_ in EXAMPLES.values()} | {
        "rated rows, grouped by prompt"
    }


def test_readme_lists_every_format_with_its_fields() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("| format | fields | preferences |\n|---|---|---|\n")[2].partition("\n\n")[0]
    listed = dict(line.removeprefix("| ").split(" | ")[:2] for line in table.splitlines())
    expected = {}
    for format in FORMATS:
        required = [f"`{name}`" for name in format.fields]
        required += [" or ".join(f"`{name}`" for name in format.any_of)] if format.any_of else []
        expected[format.name] = ", ".join(required)
    assert listed == expected


def test_rm_bench_prefers_each_chosen_style_to_each_rejected_one() -> None:
    record = preference_record(row({"prompt": Q, "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}))
    assert len(record.responses) == 6
    assert record.preferences == tuple((w, x) for w in range(3) for x in range(3, 6))


TIES = {
    "HelpSteer3": EXAMPLES["HelpSteer3"][1] | {"overall_preference": 0},
    "Chatbot Arena": EXAMPLES["Chatbot Arena"][1] | {"winner": "tie (bothbad)"},
    "LMSYS": EXAMPLES["LMSYS arena, 55k"][1] | {"winner_model_a": 0, "winner_tie": 1},
    "rated": {"prompt": Q, "responses": [BAD, GOOD], "ratings": [1, 1.0]},
}


@pytest.mark.parametrize("name", TIES)
def test_ties_give_no_pair(name: str) -> None:
    assert preference_record(row(TIES[name])).preferences == ()


def test_margins_come_from_ratings_when_asked() -> None:
    rating = RowOptions(rating_margins=True)
    record = preference_record(row(EXAMPLES["UltraFeedback"][1]), rating)
    found = dict(zip(record.preferences, record.margins, strict=True))
    assert found == {(1, 0): 7.5, (2, 0): 3.0, (1, 2): 4.5}
    assert preference_record(row(EXAMPLES["HelpSteer2 preference"][1]), rating).margins == (3.0,)
    assert preference_record(row(EXAMPLES["UltraFeedback"][1])).margins == (None,) * 3


def test_margins_of_pairs_come_from_their_scores_when_asked() -> None:
    rating, pair = RowOptions(rating_margins=True), {"prompt": Q, "chosen": GOOD, "rejected": BAD}
    scores = {"score_chosen": 8.5, "score_rejected": 6}
    assert preference_record(row(pair | scores), rating).margins == (2.5,)
    assert preference_record(row(pair | scores)).margins == (None,)
    assert preference_record(row(pair | {"margin": 3}), rating).margins == (3.0,)
    for wrong in ({"score_chosen": 8}, {"score_rejected": 8}, {"score_chosen": 5, "score_rejected": 6}):
        with pytest.raises(RmtoolError, match=r"data\.rating_margins") as caught:
            preference_record(row(pair | wrong), rating)
        assert caught.value.id == "E0303"
        assert caught.value.what.startswith(
            '"score_rejected" is m' if wrong == {"score_chosen": 8} else '"score_chosen"'
        )


def read(rows: list[dict[str, Any]]) -> list[Record]:
    numbered = [row(data, line) for line, data in enumerate(rows, 1)]
    rejects = Rejects()
    records = list(preference_records(numbered, RowOptions(), rejects, lambda format: None))
    rejects.raise_if_any()
    return records


def test_rated_rows_of_one_prompt_become_one_record() -> None:
    """HelpSteer2: a response a row, two rows to a prompt, several turns in one string."""
    several = "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc"
    rows = [
        {"prompt": Q, "response": BAD, "helpfulness": 1, "correctness": 4},
        {"prompt": several, "response": "d", "helpfulness": 3},
        {"prompt": Q, "response": GOOD, "helpfulness": 4},
        {"prompt": Q, "response": WORSE, "helpfulness": 1},
    ]
    records = read(rows)
    assert [texts(record) for record in records] == [{(Q, GOOD, BAD), (Q, GOOD, WORSE)}, set()]
    assert [message.content for message in records[1].prompt] == ["a", "b", "c"]
    assert str(records[0].place) == "f.jsonl:1"
    assert records[1].preferences == ()


def test_columns_map_unknown_fields() -> None:
    data = {"question": Q, "answers": {"good": GOOD, "bad": BAD}, "how_sure": 2}
    columns = (("prompt", "question"), ("chosen", "answers.good"), ("rejected", "answers.bad"), ("margin", "how_sure"))
    record = preference_record(row(data), RowOptions(columns))
    assert (texts(record), record.margins) == (ONE, (2.0,))
    with pytest.raises(RmtoolError, match=r'"answers\.best" is missing \(data\.columns\.chosen\)'):
        preference_record(row(data), RowOptions((("chosen", "answers.best"),)))
    assert preference_record(
        row(EXAMPLES["PKU-SafeRLHF"][1]), RowOptions((("better_response_id", "safer_response_id"),))
    )


def test_system_prompts_tools_and_weights_are_read() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    data = {"system": "Be brief.", "prompt": Q, "chosen": [call, {"role": "tool", "content": "4"}, A(GOOD)],
            "rejected": BAD, "tools": json.dumps(tools), "weight": 0.5}  # fmt: skip
    record = preference_record(row(data))
    assert record.prompt == (Message("system", "Be brief."), Message("user", Q))
    assert record.responses[0][0].as_dict() == {**call, "content": ""}
    assert (json.loads(record.tools), record.weight) == (tools, 0.5)
    with pytest.raises(RmtoolError, match="the prompt contain a system message"):
        preference_record(row({**data, "prompt": [{"role": "system", "content": "x"}, U(Q)]}))


def test_a_row_in_a_different_format_is_invalid() -> None:
    with pytest.raises(RmtoolError) as caught:
        read([EXAMPLES["RewardBench"][1], EXAMPLES["JudgeBench"][1]])
    assert "row format JudgeBench differs from the first row's, pairs" in caught.value.what
    assert str(caught.value.place) == "f.jsonl:2"


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("HelpSteer3", {"overall_preference": None}, '"overall_preference" must be a finite number'),
        ("PKU-SafeRLHF", {"better_response_id": True}, '"better_response_id" must be one of 0, 1'),
        ("Chatbot Arena", {"winner": "a"}, '"winner" must be one of model_a, model_b'),
        ("LMSYS arena, 55k", {"winner_tie": 1}, "exactly one of"),
        ("LMSYS arena, 55k", {"prompt": Q}, "must have the same number of turns"),
        ("LMSYS arena, 55k", {"prompt": "[1]"}, '"prompt" must be a string'),
        ("JudgeBench", {"label": "A=B"}, '"label" must be one of A>B, B>A'),
        ("Nectar", {"answers": []}, '"answers" must be a non-empty list'),
        ("Nectar", {"answers": [{"answer": "x"}]}, "answers[0].rank is missing"),
        ("UltraFeedback", {"completions": [{"text": "x"}]}, 'completions[0] must be an object with a "response"'),
        ("rated", {"ratings": [1]}, '"responses" and "ratings" must have the same length'),
        ("rated", {"ratings": [1, "2"]}, '"ratings[1]" must be a finite number'),
        ("RMB best of N", {"loser_list": [{}]}, '"loser_list[0]" must be an object with an "answer"'),
        ("RewardBench 2", {"rejected": [BAD, 3]}, '"rejected[1]" must be a string or a list'),
    ],
)
def test_an_invalid_value_is_reported(name: str, change: dict[str, Any], what: str) -> None:
    with pytest.raises(RmtoolError) as caught:
        preference_record(row(EXAMPLES[name][1] | change, 9))
    assert what in caught.value.what
    assert str(caught.value.place) == "f.jsonl:9"


@pytest.mark.real
@pytest.mark.parametrize(
    ("path", "format"),
    [
        ("hh-rlhf-harmless-base.test.jsonl.gz", "pairs of chosen and rejected"),
        ("train/rmb-preferences.jsonl.gz", "pairs of chosen and rejected"),
        ("rm-bench/chat_filtered.json", "lists of chosen and rejected responses"),
        ("rmb/RMB_dataset/Pairwise_set/Harmlessness/S1.json", "RMB, pairs"),
        ("rmb/RMB_dataset/BoN_set/Harmlessness/S1.json", "RMB, best of N"),
    ],
)
def test_real_files_are_parsed_completely(path: str, format: str) -> None:
    rows, names, rejects = list(read_rows(str(SHARED / "data" / path))), list[str](), Rejects()
    records = list(preference_records(rows, RowOptions(), rejects, lambda found: names.append(found.name)))
    assert (len(records), rejects.count, names) == (len(rows), 0, [format])


# ------------------------------------------------------------------------------------------- invalid rows, mixtures


def test_invalid_rows_are_listed_together_or_skipped(tmp_path: Path) -> None:
    lines = [json.dumps(data) for data in pair_rows(60)]
    for at in range(3, 60, 2):
        lines[at] = ('{"prompt": 1', '{"chosen": "x"}', '{"prompt": "x", "chosen": NaN, "rejected": "y"}')[at % 3]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    rejects = Rejects()
    assert len(list(preference_records(read_rows(str(path), rejects), RowOptions(), rejects, lambda _: None))) == 31
    with pytest.raises(RmtoolError) as caught:
        rejects.raise_if_any()
    error = caught.value
    assert (error.what, len(error.rows), error.more) == ("29 invalid rows", 20, 9)
    assert error.rows[0].startswith(f"{path}:4:13: invalid JSON: expecting ',' delimiter")
    assert RmtoolError.from_dict(error.as_dict()).rows == error.rows
    with Rejects(tmp_path / "rejects.jsonl") as skipped:
        assert len(list(preference_records(read_rows(str(path), skipped), RowOptions(), skipped, lambda _: None))) == 31
        skipped.raise_if_any()
    written = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [item["line"] for item in written] == list(range(4, 61, 2))
    assert {item["code"] for item in written} == {"E0301", "E0303"}
    assert all(item["reason"] and item["row"] for item in written)


def mixed(tmp_path: Path, *sources: Source, seed: int = 0) -> list[str]:
    records = select(sources, RowOptions(), seed, Rejects()).records()
    return [f"{Path(record.place.file).stem}{record.place.line}" for record in records]


def test_a_mixture_takes_its_shares_and_is_the_same_every_time(tmp_path: Path) -> None:
    a, b = (str(write_jsonl(tmp_path / f"{name}.jsonl", pair_rows(40))) for name in "ab")
    taken = mixed(tmp_path, Source(a, fraction=0.5), Source(b, rows=7))
    assert [sum(name[0] == letter for name in taken) for letter in "ab"] == [20, 7]
    assert len(set(taken)) == 27
    assert taken == mixed(tmp_path, Source(a, fraction=0.5), Source(b, rows=7))
    assert taken != mixed(tmp_path, Source(a, fraction=0.5), Source(b, rows=7), seed=1)
    twice = mixed(tmp_path, Source(a, fraction=1.5))
    assert len(twice) == 60
    assert set(twice) == set(mixed(tmp_path, Source(a)))
    with pytest.raises(RmtoolError, match=r"cannot take 41 rows from .*: it has 40"):
        mixed(tmp_path, Source(a, rows=41))
    assert draw_share(Source("x", fraction=0.1), 0, 0, 0).tolist() == []
    with pytest.raises(RmtoolError, match=r"fraction 0\.01 of .* selects none of its 40 rows"):
        mixed(tmp_path, Source(a, fraction=0.01))
    assert len(mixed(tmp_path, Source(a, fraction=0.02))) == 1


def rendered(data: dict[str, Any]) -> list[tuple[str, str]]:
    record = preference_record(row(data))
    return [(message.role, message.content) for message in record.prompt + record.responses[0]]


TURNS = [("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "good")]
TALK = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant: "


@pytest.mark.parametrize(
    "data",
    [
        {"system": "S", "prompt": "bye", "chosen": [U("hi"), A("hello"), U("bye"), A("good")],
         "rejected": [U("hi"), A("hello"), U("bye"), A("bad")]},
        {"system": "S", "chosen": f"{TALK}good", "rejected": f"{TALK}bad"},
        {"system": "S", "prompt": "hi ", "chosen": f"{TALK}good", "rejected": f"{TALK}bad"},
        {"prompt": [{"role": "system", "content": "S"}, U("hi")],
         "chosen": [U("hi"), A("hello"), U("bye"), A("good")], "rejected": [U("hi"), A("hello"), U("bye"), A("bad")]},
    ],
)  # fmt: skip
def test_a_system_prompt_and_transcripts_keep_their_turns(data: dict[str, Any]) -> None:
    assert rendered(data) == [("system", "S"), *TURNS]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ({"prompt": [U("a"), A("b"), U("ok")], "chosen": [U("x"), A("y"), U("ok"), A("c")], "rejected": "r"},
         "does not contain the"),
        ({"prompt": "other", "chosen": f"{TALK}good", "rejected": f"{TALK}bad"}, "does not contain the"),
        ({"prompt": [U("a"), A("b")], "chosen": [U("a"), A("b")], "rejected": "r"}, "does not contain the"),
        ({"system": "S", "chosen": [{"role": "system", "content": "T"}, U("u"), A("c")], "rejected": "r"},
         r'the system prompt in "chosen" differs'),
        ({"prompt": None, "chosen": "c", "rejected": "r"}, '"prompt" is null'),
        ({"prompt": "p", "tools": "[" * 20_000, "chosen": "c", "rejected": "r"}, '"tools" must be a list'),
    ],
)  # fmt: skip
def test_a_prompt_is_never_lost(data: dict[str, Any], what: str) -> None:
    with pytest.raises(RmtoolError, match=what) as caught:
        preference_record(row(data))
    assert caught.value.id == "E0303"


def read_file(path: Path, columns: tuple[tuple[str, str], ...] = ()) -> tuple[list[Record], list[RmtoolError]]:
    skipped = Rejects()
    records = list(preference_records(read_rows(str(path), skipped), RowOptions(columns), skipped, lambda _: None))
    return records, skipped._listed


def test_a_row_without_a_prompt_among_others_is_invalid(tmp_path: Path) -> None:
    rows = [*pair_rows(2), {"chosen": "c", "rejected": "r"}]
    records, errors = read_file(write_jsonl(tmp_path / "p.jsonl", rows))
    assert len(records) == 2
    assert [(error.place.line if error.place else 0, error.what) for error in errors] == [
        (3, "this row has no prompt, but the first row has one")
    ]


def test_columns_must_be_fields_of_a_format(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"question": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(RmtoolError, match=r"unknown field promt") as caught:
        read_file(path, (("promt", "question"),))
    assert (caught.value.id, caught.value.hint) == ("E0204", "did you mean prompt?")
    swapped, _ = read_file(path, (("chosen", "rejected"), ("rejected", "chosen"), ("prompt", "question")))
    assert texts(swapped[0]) == {("q", "b", "a")}


def test_rated_rows_keep_their_places_and_must_agree(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "response": f"r{line}", "rating": line} for line, prompt in enumerate("zazza")
    ]
    rows[3]["weight"] = 0
    records, errors = read_file(write_jsonl(tmp_path / "r.jsonl", rows))
    assert [[place.line for place in record.places] for record in records] == [[1, 3], [2, 5]]
    assert [error.place.line for error in errors if error.place] == [4]
    assert "weight or subset differs from" in errors[0].what
    assert records[0].row == {"rows": [rows[0], rows[2]]}


def test_an_unpaired_surrogate_in_inner_json_is_text() -> None:
    said = '["hi \\ud800"]'
    arena = {"prompt": said, "response_a": "[" * 20_000, "response_b": "b", "winner": "model_a"}
    assert preference_record(row(arena)).prompt[0].content == said


def test_mt_bench_rows_end_after_the_judged_turn() -> None:
    """MT-bench writes both turns in all rows; `turn` says which was judged."""
    both = {name: [U(Q), A(text), U("Sure?"), A("Yes.")] for name, text in (("a", GOOD), ("b", BAD))}
    data = {"conversation_a": both["a"], "conversation_b": both["b"], "winner": "model_a", "judge": "expert 1"}
    assert texts(preference_record(row(data | {"turn": 1}))) == ONE
    second = preference_record(row(data | {"turn": 2}))
    assert [len(response) for response in second.responses] == [3, 3]
    assert second.row == data | {"turn": 2}


CALL = {"name": "add", "arguments": {"a": 2}}
CALLS = [{"type": "function", "function": CALL}]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "assistant", "content": [], "tool_calls": json.dumps(CALLS)},
        {"role": "assistant", "content": None, "function_call": CALL},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"role": "tool_call", "content": json.dumps([CALL])},
    ],
    ids=str,
)
def test_tool_calls_of_other_tools_are_one_kind(message: dict[str, Any]) -> None:
    called = preference_record(row({"prompt": Q, "chosen": message, "rejected": BAD})).responses[0][-1]
    assert called.as_dict() == {"role": "assistant", "content": "", "tool_calls": CALLS}
    assert (called.is_empty(), called.shown()) == (False, 'add({"a": 2})')


@pytest.mark.parametrize("role", ["function", "ipython", "observation", "environment", "tool"])
def test_roles_of_tool_results_are_kept_for_the_template(role: str) -> None:
    prompt = [U(Q), {"role": "assistant", "content": None, "tool_calls": CALLS}, {"role": role, "content": "4"}]
    assert preference_record(row({"prompt": prompt, "chosen": GOOD, "rejected": BAD})).prompt[-1] == Message(role, "4")


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"role": "assistant", "content": [1]}, "chosen.content[0] must be an object"),
        ({"role": "assistant", "content": [{"type": "text", "text": None}]}, "chosen.content[0].text must be a string"),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "x", "image": "y.png"}]},
            "a part that is not text",
        ),
        ({"role": "assistant", "content": [{"type": "tool_use", "id": "x"}]}, "a part that is not text"),
        ({"role": "tool_call", "content": "add 2"}, "chosen.content must be a list of objects, or JSON of one"),
        ({"role": "assistant", "content": None, "tool_calls": ["add"]}, "chosen.tool_calls must be a list of objects"),
        ({"role": "assistant", "content": "x", "function_call": {"add": 2}}, "must be a tool call with name"),
        (
            {"role": "assistant", "content": "x", "context": "The sky is blue."},
            "chosen has unsupported fields: context",
        ),
        ({"role": "robot", "content": "x"}, "chosen.role must be one of"),
    ],
    ids=str,
)
def test_what_is_not_text_is_named(message: dict[str, Any], what: str) -> None:
    with pytest.raises(RmtoolError) as caught:
        preference_record(row({"prompt": Q, "chosen": message, "rejected": BAD}))
    assert what in caught.value.what


@pytest.mark.parametrize(
    "text",
    ["USER: hi ASSISTANT: hello", "H: hi\n\nA: hello", "### Human: hi\n### Assistant: hello", "[INST] hi [/INST] hello",
     "<|im_start|>user\nhi<|im_end|>", "<|start_header_id|>user<|end_header_id|>\n\nhi", "Question: hi\nAnswer: hello",
     "You are helpful.\n\nHuman: hi\n\nAssistant: hello", "Human: hi\nAssistant: hello"],
)  # fmt: skip
def test_a_conversation_in_a_different_notation_is_refused_only_without_a_prompt(text: str) -> None:
    with pytest.raises(RmtoolError, match="unsupported notation"):
        preference_record(row({"chosen": text, "rejected": BAD}))
    assert texts(preference_record(row({"prompt": Q, "chosen": text, "rejected": BAD}))) == {(Q, text, BAD)}
