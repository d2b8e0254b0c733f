"""Formats of preference data and responses, recognized by their fields.

In: `Row`s. Out: `Record`s: prompt, responses, and which response is preferred to which.
Cost: string work only; nothing is tokenized here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rmtool.data import parsers
from rmtool.data.record import PLAIN, Messages, Record, RowOptions, has_no_prompt, invalid_row
from rmtool.data.rejects import Rejects
from rmtool.data.rows import Row
from rmtool.errors import RmtoolError


@dataclass(frozen=True)
class Format:
    """A format of preference data. README's table of formats is made of these.

    name:     shown to the user
    fields:   required fields
    parse:    makes the record of a row
    any_of:   fields of which one is required, too
    optional: other fields that `parse` reads
    lists:    whether chosen and rejected are lists of responses
    grouped:  whether rows with the same prompt become one record
    """

    name: str
    fields: tuple[str, ...]
    parse: parsers.Parser
    any_of: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    lists: bool = False
    grouped: bool = False

    def fits(self, data: dict[str, Any]) -> bool:
        """Return whether a row has the fields of this format."""
        required = data.keys() >= set(self.fields) and (not self.any_of or any(name in data for name in self.any_of))
        return required and (not self.lists or all(map(_is_list_of_responses, (data[name] for name in self.fields))))


def _is_list_of_responses(value: Any) -> bool:
    """Return whether a value is a list of strings or conversations, not one conversation."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], str | list)


def _two(name: str, prompt: str, names: tuple[str, str], label: str, preferences: dict[Any, float] | None) -> Format:
    parse = parsers.two_responses(prompt, names, label, preferences)
    return Format(name, (prompt, *names, label), parse)


# The first that fits a source's first row is the format of the source.
FORMATS = (
    Format(
        "RMB, pairs",
        ("conversation_input", "chosen", "reject"),
        parsers.rmb("chosen", "reject"),
        optional=("category_path",),
    ),
    Format(
        "RMB, best of N",
        ("conversation_input", "bon_best", "loser_list"),
        parsers.rmb("bon_best", "loser_list"),
        optional=("category_path",),
    ),
    Format("lists of chosen and rejected responses", ("chosen", "rejected"), parsers.lists, lists=True),
    Format(
        "pairs of chosen and rejected",
        ("chosen", "rejected"),
        parsers.pair,
        optional=("score_chosen", "score_rejected"),
    ),
    _two("HelpSteer3 preference", "context", ("response1", "response2"), "overall_preference", None),
    _two("HelpSteer2 preference", "prompt", ("response_1", "response_2"), "preference_strength", None),
    _two("PKU-SafeRLHF", "prompt", ("response_0", "response_1"), "better_response_id", {0: -1, 1: 1}),
    Format(
        "Chatbot Arena, conversations",
        ("conversation_a", "conversation_b", "winner"),
        parsers.two_responses("prompt", ("conversation_a", "conversation_b"), "winner", parsers.ARENA_WINNERS),
    ),
    Format(
        "Chatbot Arena, responses",
        ("prompt", "response_a", "response_b"),
        parsers.arena_responses,
        any_of=("winner", "winner_model_a"),
        optional=("winner_model_b", "winner_tie"),
    ),
    _two("JudgeBench", "question", ("response_A", "response_B"), "label", {"A>B": -1, "B>A": 1}),
    Format("Nectar", ("prompt", "answers"), parsers.rated_objects("answers", "answer", "rank", "prompt")),
    Format(
        "UltraFeedback, completions",
        ("instruction", "completions"),
        parsers.rated_objects("completions", "response", "overall_score", "instruction"),
    ),
    Format("ranked responses", ("responses", "ranks"), parsers.rated_lists("ranks")),
    Format("rated responses", ("responses", "ratings"), parsers.rated_lists("ratings")),
    Format(
        "rated rows, grouped by prompt",
        ("prompt", "response"),
        parsers.one_response,
        any_of=("helpfulness", "rating"),
        grouped=True,
    ),
)
# Fields that data.columns can map: those that some format reads.
FIELDS = parsers.COMMON_FIELDS.union(*((*format.fields, *format.any_of, *format.optional) for format in FORMATS))


def recognize(row: Row) -> Format:
    """Return the format of a row with preferences.

    Raises:
        RmtoolError: E0303 when it has the fields of no format.
    """
    for format in FORMATS:
        if format.fits(row.data):
            return format
    if "chosen" in row.data or "rejected" in row.data:
        missing = "rejected" if "chosen" in row.data else "chosen"
        raise invalid_row(row, f'"{missing}" is missing', _shown_fields(row))
    hint = "use a format of the README, or set data.columns.chosen=COLUMN and data.columns.rejected=COLUMN"
    raise invalid_row(row, "unknown preference format", _shown_fields(row), hint)


def _shown_fields(row: Row) -> str:
    return f"fields {', '.join(map(repr, row.data)) or 'none'}"


def preference_record(row: Row, options: RowOptions = PLAIN) -> Record:
    """Return the record of a single row, in any format.

    Raises:
        RmtoolError: E0303 when a field is missing or invalid.
    """
    row = _renamed(row, options)
    return recognize(row).parse(row, options)


def preference_records(
    rows: Iterable[Row], options: RowOptions, rejects: Rejects, seen: Callable[[Format], None]
) -> Iterator[Record]:
    """Return the records of a source, all in the format of its first row; invalid rows go to `rejects`.

    `seen` is called once, with the format. Rated rows are held until the end, and come in the order of their prompts'
    first rows.

    Raises:
        RmtoolError: as `require_known_columns`.
    """
    require_known_columns(options)
    format: Format | None = None
    no_prompts: bool | None = None  # by the first row
    singles = list[Record]()
    for row in rows:
        try:
            row = _renamed(row, options)
            if format is None:
                format = recognize(row)
                seen(format)
            if not format.fits(row.data):
                what = f"row format {recognize(row).name} differs from the first row's, {format.name}"
                raise invalid_row(row, what)
            record = format.parse(row, options)
            no_prompt = has_no_prompt(record.prompt + record.responses[0])
            no_prompts = no_prompt if no_prompts is None else no_prompts
            if no_prompt and not no_prompts:
                raise invalid_row(row, "this row has no prompt, but the first row has one")
        except RmtoolError as error:
            rejects.add(error, row.data)
            continue
        if format.grouped:
            singles.append(record)
        else:
            yield record
    yield from _grouped(singles, options, rejects)


def require_known_columns(options: RowOptions) -> None:
    """Check that only fields that some format reads are mapped: others would be ignored without notice.

    Raises:
        RmtoolError: E0204 when no format reads such a field.
    """
    for ours, _ in options.columns:
        if ours not in FIELDS:
            near = difflib.get_close_matches(ours, FIELDS, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(sorted(FIELDS))}"
            raise RmtoolError("E0204", f"data.columns.{ours}: unknown field {ours}", hint)


def _grouped(singles: Sequence[Record], options: RowOptions, rejects: Rejects) -> Iterator[Record]:
    """Make one record of the rows with the same prompt."""
    groups: dict[tuple[Messages, str], list[Record]] = {}
    for record in singles:
        groups.setdefault((record.prompt, record.tools), []).append(record)
    for (prompt, tools), members in groups.items():
        records = list(_consistent(members, rejects))
        ratings = [record.margins[0] or 0.0 for record in records]
        pairs = parsers.pairs_by_rating(ratings)
        margins = parsers.margins_by_rating(ratings, pairs) if options.rating_margins else (None,) * len(pairs)
        responses = tuple(record.responses[0] for record in records)
        first = records[0]
        row = first.row if len(records) == 1 else {"rows": [record.row for record in records]}
        places = tuple(record.place for record in records)
        yield Record(first.place, prompt, responses, pairs, margins, first.subset, first.weight, tools, row, places)


def _consistent(records: Sequence[Record], rejects: Rejects) -> Iterator[Record]:
    """Return the first of a prompt's rows, and those with the same weight and subset."""
    first = records[0]
    for record in records:
        if (record.weight, record.subset) == (first.weight, first.subset):
            yield record
            continue
        what = f"weight or subset differs from {first.place}, which has the same prompt"
        found = f"{record.weight:g}, {record.subset} (there: {first.weight:g}, {first.subset})"
        hint = "use the same weight and subset in all rows of a prompt"
        rejects.add(RmtoolError("E0303", what, hint, record.place, found), record.row)


def _renamed(row: Row, options: RowOptions) -> Row:
    """Return the row with our field names in place of the source's."""
    if not options.columns:
        return row
    data = dict(row.data)
    for _, theirs in options.columns:
        data.pop(theirs, None)
    for ours, theirs in options.columns:
        value: Any = row.data
        for part in theirs.split("."):
            if not isinstance(value, dict) or part not in value:
                hint = f"set data.columns.{ours}=COLUMN to a field of this row"
                raise invalid_row(row, f'"{theirs}" is missing (data.columns.{ours})', _shown_fields(row), hint)
            value = value[part]
        data[ours] = value
    return Row(row.place, data)


# ------------------------------------------------------------------------------------------------ rows to score


def score_record(row: Row) -> Record:
    """Return the record of a row with `response`, `responses` or `messages`.

    Raises:
        RmtoolError: E0303 when a field is missing or invalid.
    """
    for name in ("reward", "rewards", "best"):
        if name in row.data:
            hint = "rename or remove this field; the output has its own"
            raise invalid_row(row, f'the row already has "{name}"', hint=hint)
    if "responses" in row.data:
        return parsers.record_of(row, parsers.full_prompt(row), parsers.items_of(row, "responses"))
    if "response" in row.data:
        return parsers.record_of(row, parsers.full_prompt(row), {"response": row.data["response"]})
    if "messages" in row.data:
        parsers.items_of(row, "messages")
        return parsers.record_of(row, (), {"messages": row.data["messages"]})
    raise invalid_row(row, '"response", "responses" or "messages" is missing', _shown_fields(row))
