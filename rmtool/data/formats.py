"""The formats in which preference data and responses come, recognized by their fields.

In: a `Row`. Out: a `Record`: prompt messages, response messages, which response is preferred to which.
Cost: string work only; nothing is tokenized here.

| format | recognized by |
|---|---|
| TRL, hh-rlhf, UltraFeedback binarized, Tulu 3, RewardBench | chosen, rejected (strings, messages, transcripts) |
| RM-Bench, RewardBench 2 | chosen, rejected (lists of responses: each of one is preferred to each of the other) |
| RMB | conversation_input with chosen and reject, or with bon_best and loser_list |
| HelpSteer3, HelpSteer2 preference | two responses, overall_preference or preference_strength (below 0: the first) |
| PKU-SafeRLHF | response_0, response_1, better_response_id |
| Chatbot Arena | conversation_a and _b, or response_a and _b, with winner or winner_model_a, _b, _tie |
| JudgeBench | response_A, response_B, label A>B or B>A |
| Nectar, ranked lists | answers or responses with ranks (1 is the best) |
| UltraFeedback, rated lists | completions or responses with ratings (the highest is the best) |
| HelpSteer and HelpSteer2, rated rows | a response a row, with helpfulness or rating; put together by prompt |
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rmtool.data import parsers as shapes
from rmtool.data.messages import Messages, conversation, has_no_prompt, wrong
from rmtool.data.record import PLAIN, Record, RowOptions
from rmtool.data.rejects import Rejects
from rmtool.data.rows import Row
from rmtool.errors import RmtoolError


@dataclass(frozen=True)
class Format:
    """`fields` and `test` recognize a row, `read` makes its record; with `grouped`, rows with one prompt are one."""

    name: str
    fields: frozenset[str]
    read: Callable[[Row, RowOptions], Record]
    test: Callable[[dict[str, Any]], bool] = field(default=lambda data: True)
    grouped: bool = False

    def fits(self, data: dict[str, Any]) -> bool:
        return self.fields <= data.keys() and self.test(data)


def _fields(*names: str) -> frozenset[str]:
    return frozenset(names)


def _has_lists(data: dict[str, Any]) -> bool:
    """chosen and rejected hold several responses: strings, or whole conversations."""
    return all(
        isinstance(data[name], list) and data[name] and isinstance(data[name][0], str | list)
        for name in ("chosen", "rejected")
    )


FORMATS = (
    Format("RMB, pairs", _fields("conversation_input", "chosen", "reject"), shapes.rmb),
    Format("RMB, best of N", _fields("conversation_input", "bon_best", "loser_list"), shapes.rmb),
    Format("lists of chosen and rejected responses", _fields("chosen", "rejected"), shapes.lists, _has_lists),
    Format("pairs of chosen and rejected", _fields("chosen", "rejected"), shapes.pair),
    Format(
        "HelpSteer3 preference",
        _fields("context", "response1", "response2", "overall_preference"),
        shapes.two_responses("context", ("response1", "response2"), shapes.strength("overall_preference")),
    ),
    Format(
        "HelpSteer2 preference",
        _fields("prompt", "response_1", "response_2", "preference_strength"),
        shapes.two_responses("prompt", ("response_1", "response_2"), shapes.strength("preference_strength")),
    ),
    Format(
        "PKU-SafeRLHF",
        _fields("prompt", "response_0", "response_1", "better_response_id"),
        shapes.two_responses("prompt", ("response_0", "response_1"), shapes.safe_rlhf_winner),
    ),
    Format(
        "Chatbot Arena, conversations",
        _fields("conversation_a", "conversation_b", "winner"),
        shapes.two_responses("prompt", ("conversation_a", "conversation_b"), shapes.arena_winner),
    ),
    Format(
        "Chatbot Arena, responses",
        _fields("prompt", "response_a", "response_b"),
        shapes.arena_responses,
        lambda data: "winner" in data or "winner_model_a" in data,
    ),
    Format(
        "JudgeBench",
        _fields("question", "response_A", "response_B", "label"),
        shapes.two_responses("question", ("response_A", "response_B"), shapes.judge_label),
    ),
    Format("Nectar", _fields("prompt", "answers"), shapes.items("answers", "answer", "rank", "prompt", True)),
    Format(
        "UltraFeedback, completions",
        _fields("instruction", "completions"),
        shapes.items("completions", "response", "overall_score", "instruction", False),
    ),
    Format("ranked responses", _fields("responses", "ranks"), shapes.lists_of("ranks")),
    Format("rated responses", _fields("responses", "ratings"), shapes.lists_of("ratings")),
    Format(
        "rated rows, put together by prompt",
        _fields("prompt", "response"),
        shapes.one_response,
        lambda data: "helpfulness" in data or "rating" in data,
        grouped=True,
    ),
)


# What any format or any row may have: whatever a column can be mapped to.
FIELDS = frozenset().union(*(format.fields for format in FORMATS)) | {
    "prompt", "system", "system_prompt", "tools", "margin", "weight", "subset", "category_path",
    "rating", "helpfulness", "winner", "winner_model_a", "winner_model_b", "winner_tie", "messages",
    "score_chosen", "score_rejected",
}  # fmt: skip


def recognize(row: Row) -> Format:
    """The format of a row with preferences.

    Raises:
        RmtoolError: E0303 none fits.
    """
    for format in FORMATS:
        if format.fits(row.data):
            return format
    if "chosen" in row.data or "rejected" in row.data:
        missing = "rejected" if "chosen" in row.data else "chosen"
        raise wrong(row, f'"{missing}" is missing', _shown_fields(row))
    hint = "see the formats in the README, or map fields: --set data.columns.chosen=... data.columns.rejected=..."
    raise wrong(row, "this is no known format of preferences", _shown_fields(row), hint)


def _shown_fields(row: Row) -> str:
    return f"fields {', '.join(map(repr, row.data)) or 'none'}"


def preference_record(row: Row, reading: RowOptions = PLAIN) -> Record:
    """The record of one row by itself, whatever its format.

    Raises:
        RmtoolError: E0303 a field is missing or of the wrong kind.
    """
    row = _renamed(row, reading)
    return recognize(row).read(row, reading)


def preference_records(
    rows: Iterable[Row], reading: RowOptions, rejects: Rejects, seen: Callable[[Format], None]
) -> Iterator[Record]:
    """The records of a source, all of its first row's format; bad rows go to `rejects`.

    `seen` is called once, with the format. Rated rows are held until the end, and come by their prompts' first row.
    """
    require_known_columns(reading)
    format: Format | None = None
    alone: bool | None = None  # whether responses have no prompt, by the first row
    singles = list[Record]()
    for row in rows:
        try:
            row = _renamed(row, reading)
            if format is None:
                format = recognize(row)
                seen(format)
            if not format.fits(row.data):
                format_now = recognize(row)
                raise wrong(row, f"this row is of another format ({format_now.name}) than the first ({format.name})")
            record = format.read(row, reading)
            unasked = has_no_prompt(record.prompt + record.responses[0])
            alone = unasked if alone is None else alone
            if unasked and not alone:
                raise wrong(row, "this row has no prompt, and the first has one")
        except RmtoolError as error:
            rejects.add(error, row.data)
            continue
        if format.grouped:
            singles.append(record)
        else:
            yield record
    yield from _grouped(singles, reading, rejects)


def require_known_columns(reading: RowOptions) -> None:
    """Only fields that some format reads can be mapped: another one would be lost without a word.

    Raises:
        RmtoolError: E0204 nothing reads a field of that name.
    """
    for ours, _ in reading.columns:
        if ours not in FIELDS:
            near = difflib.get_close_matches(ours, FIELDS, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(sorted(FIELDS))}"
            raise RmtoolError("E0204", f"data.columns.{ours}: no format has a field {ours}", hint)


def _grouped(singles: Sequence[Record], reading: RowOptions, rejects: Rejects) -> Iterator[Record]:
    groups: dict[tuple[Messages, str], list[Record]] = {}
    for record in singles:
        groups.setdefault((_asked(record), record.tools), []).append(record)
    for (_, tools), members in groups.items():
        records = list(_agreeing(members, rejects))
        ratings = [record.margins[0] or 0.0 for record in records]
        pairs = shapes.by_rating(ratings)
        prompt, responses = shapes.split_shared(*(record.prompt + record.responses[0] for record in records))
        margins = tuple(abs(ratings[a] - ratings[b]) if reading.rating_margins else None for a, b in pairs)
        first = records[0]
        row = first.row if len(records) == 1 else {"rows": [record.row for record in records]}
        places = tuple(record.place for record in records)
        yield Record(first.place, prompt, responses, pairs, margins, first.subset, first.weight, tools, row, places)


def _agreeing(records: Sequence[Record], rejects: Rejects) -> Iterator[Record]:
    """The first of one prompt's rows, and those that have the same weight and subset."""
    first = records[0]
    for record in records:
        if (record.weight, record.subset) == (first.weight, first.subset):
            yield record
            continue
        what = f"this row has another weight or subset than {first.place}, which has the same prompt"
        found = f"{record.weight:g}, {record.subset}; not {first.weight:g}, {first.subset}"
        rejects.add(RmtoolError("E0303", what, "give all rows of a prompt the same", record.place, found), record.row)


def _asked(record: Record) -> Messages:
    """All messages but the last."""
    return (record.prompt + record.responses[0])[:-1]


def _renamed(row: Row, reading: RowOptions) -> Row:
    """The row with our names for the source's fields."""
    if not reading.columns:
        return row
    data = dict(row.data)
    for _, theirs in reading.columns:
        data.pop(theirs, None)
    for ours, theirs in reading.columns:
        value: Any = row.data
        for part in theirs.split("."):
            if not isinstance(value, dict) or part not in value:
                raise wrong(row, f'"{theirs}", which data.columns.{ours} names, is missing', _shown_fields(row))
            value = value[part]
        data[ours] = value
    return Row(row.place, data)


# ---------------------------------------------------------------------------------------------------- to score


def score_record(row: Row) -> Record:
    """The record of a row with `response`, `responses` or `messages`.

    Raises:
        RmtoolError: E0303 a field is missing or of the wrong kind.
    """
    data = row.data
    taken = [name for name in ("reward", "rewards", "best") if name in data]
    if taken:
        hint = "rename or remove that field; it would be overwritten"
        raise wrong(row, f'the row already has "{taken[0]}"', hint=hint)
    if "responses" in data:
        start = shapes.whole_prompt(row)
        values = enumerate(shapes.listed(row, "responses"))
        conversations = [conversation(row, start, value, f"responses[{at}]") for at, value in values]
    elif "response" in data:
        conversations = [conversation(row, shapes.whole_prompt(row), data["response"], "response")]
    elif "messages" in data:
        conversations = [conversation(row, (), shapes.listed(row, "messages"), "messages")]
    else:
        raise wrong(row, 'there is no "response", "responses" or "messages"', _shown_fields(row))
    return shapes.record_of(row, conversations, [])
