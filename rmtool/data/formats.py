"""Formats of preference data, recognized by their fields.

In: `Row`s. Out: `Record`s: prompt, responses, and which response is preferred to which.
Cost: string work only; nothing is tokenized here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rmtool.data import layouts, parsers
from rmtool.data.field_names import most_alike
from rmtool.data.fields import check_unread, renamed, require_known_columns, shown_fields
from rmtool.data.messages import invalid_row
from rmtool.data.pairs import grouped
from rmtool.data.record import PLAIN, Record, RowOptions, has_no_prompt
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
    when:     a further condition on the row
    """

    name: str
    fields: tuple[str, ...]
    parse: parsers.Parser
    any_of: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    lists: bool = False
    grouped: bool = False
    when: Callable[[dict[str, Any]], bool] | None = None

    @functools.cached_property
    def reads(self) -> frozenset[str]:
        """The fields that `parse` reads."""
        return parsers.COMMON_FIELDS.union(self.fields, self.any_of, self.optional)

    def fits(self, data: dict[str, Any]) -> bool:
        """Return whether a row has the fields of this format."""
        required = data.keys() >= set(self.fields) and (not self.any_of or any(name in data for name in self.any_of))
        if not required or (self.when and not self.when(data)):
            return False
        return not self.lists or all(map(_is_list_of_responses, (data[name] for name in self.fields)))


def _is_list_of_responses(value: Any) -> bool:
    """Return whether a value is a list of strings or conversations, not one conversation."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], str | list)


def _without_prompt(data: dict[str, Any]) -> bool:
    return not data.get("prompt")


def _after(name: str) -> Callable[[dict[str, Any]], bool]:
    """Return the condition that the prompt is a list of messages in the field `name`."""
    return lambda data: not data.get("prompt") and layouts.ends_before_response(data[name])


def _two(name: str, prompt: str, names: tuple[str, str], label: str, preferences: dict[Any, float] | None) -> Format:
    parse = parsers.two_responses(prompt, names, label, preferences)
    return Format(name, (prompt, *names, label), parse)


_SCORES = ("score_chosen", "score_rejected")
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
    Format(
        "lists of chosen and rejected responses",
        ("chosen", "rejected"),
        parsers.lists,
        optional=("prompt",),
        lists=True,
    ),
    Format(
        "LLaMA-Factory, alpaca",
        ("instruction", "chosen", "rejected"),
        parsers.pair(layouts.alpaca_prompt),
        optional=("input", "history", *_SCORES),
        when=_without_prompt,
    ),
    Format(
        "LLaMA-Factory, sharegpt",
        ("conversations", "chosen", "rejected"),
        parsers.pair(layouts.prompt_in("conversations")),
        optional=_SCORES,
        when=_after("conversations"),
    ),
    Format(
        "messages before chosen and rejected",
        ("messages", "chosen", "rejected"),
        parsers.pair(layouts.prompt_in("messages")),
        optional=_SCORES,
        when=_after("messages"),
    ),
    Format(
        "Orca pairs",
        ("system", "chosen", "rejected"),
        parsers.pair(layouts.orca_prompt),
        any_of=("question", "input"),
        optional=_SCORES,
        when=lambda data: not data.get("prompt") and not (data.get("question") and data.get("input")),
    ),
    Format(
        "Step-DPO",
        ("prompt", "initial_reason_steps", "chosen", "rejected"),
        parsers.pair(layouts.step_prompt),
        optional=_SCORES,
    ),
    Format("pairs of chosen and rejected", ("chosen", "rejected"), parsers.pair(), optional=("prompt", *_SCORES)),
    Format(
        "UltraFeedback, Argilla",
        ("instruction", "chosen_response", "rejected_response"),
        parsers.pair(layouts.prompt_in("instruction"), ("chosen_response", "rejected_response")),
    ),
    Format("ms-swift", ("messages", "rejected_response"), layouts.swift),
    Format("ms-swift, two conversations", ("messages", "rejected_messages"), layouts.swift_conversations),
    Format(
        "ms-swift, query",
        ("query", "response", "rejected_response"),
        parsers.pair(layouts.swift_query, ("response", "rejected_response")),
        optional=("history",),
    ),
    Format("OpenAI preferences", ("input", "preferred_output", "non_preferred_output"), layouts.openai),
    _two("Stanford SHP", "history", ("human_ref_A", "human_ref_B"), "labels", {1: -1, 0: 1}),
    Format(
        "Stack Exchange, paired",
        ("question", "response_j", "response_k"),
        parsers.pair(layouts.prompt_in("question"), ("response_j", "response_k")),
    ),
    Format(
        "Stack Exchange preferences",
        ("question", "answers"),
        parsers.rated_objects("answers", "text", "pm_score", "question"),
    ),
    Format("WebGPT comparisons", ("question", "answer_0", "answer_1", "score_0", "score_1"), layouts.web_gpt),
    _two("HelpSteer3 preference", "context", ("response1", "response2"), "overall_preference", None),
    _two("HelpSteer2 preference", "prompt", ("response_1", "response_2"), "preference_strength", None),
    _two("PKU-SafeRLHF", "prompt", ("response_0", "response_1"), "better_response_id", {0: -1, 1: 1}),
    Format(
        "Chatbot Arena, conversations",
        ("conversation_a", "conversation_b", "winner"),
        layouts.arena_conversations,
        optional=("prompt", "turn"),
    ),
    Format(
        "Chatbot Arena, responses",
        ("prompt", "response_a", "response_b"),
        layouts.arena_responses,
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
    Format("ranked responses", ("responses", "ranks"), parsers.rated_lists("ranks"), optional=("prompt",)),
    Format("rated responses", ("responses", "ratings"), parsers.rated_lists("ratings"), optional=("prompt",)),
    Format(
        "rated rows, grouped by prompt",
        ("prompt", "response"),
        parsers.one_response,
        any_of=("helpfulness", "rating"),
        grouped=True,
    ),
)
# Fields that data.columns can map: those that some format reads.
FIELDS = frozenset[str]().union(*(format.reads for format in FORMATS))


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
        hint = f"fix this row, or set data.columns.{missing}=COLUMN"
        raise invalid_row(row, f'"{missing}" is missing', shown_fields(row), hint)
    columns = _missing_column(row.data) or "data.columns.chosen=COLUMN and data.columns.rejected=COLUMN"
    hint = f"use a format of the README, or set {columns}"
    raise invalid_row(row, "unknown preference format", shown_fields(row), hint)


def _missing_column(data: dict[str, Any]) -> str | None:
    """Return the mapping of the only field that a row lacks to be in a format of at least three."""
    for format in FORMATS:
        missing = [name for name in format.fields if name not in data]
        if len(missing) == 1 and len(format.fields) > 2:
            return f"data.columns.{missing[0]}={most_alike(missing[0], data.keys() - format.reads)}"
    return None


def preference_record(row: Row, options: RowOptions = PLAIN) -> Record:
    """Return the record of a single row, in any format.

    Raises:
        RmtoolError: E0303 when a field is missing or invalid.
    """
    row = renamed(row, options)
    return _parse(recognize(row), row, options, None)


def _parse(format: Format, row: Row, options: RowOptions, unread: set[str] | None) -> Record:
    record = format.parse(row, options)
    check_unread(row, record, format.reads, unread)
    return record


def preference_records(
    rows: Iterable[Row],
    options: RowOptions,
    rejects: Rejects,
    seen: Callable[[Format], None],
    unread: set[str] | None = None,
) -> Iterator[Record]:
    """Return the records of a source, all in the format of its first row; invalid rows go to `rejects`.

    `seen` is called once, with the format; `unread` gets names of fields. Rated rows come last, prompt by prompt.

    Raises:
        RmtoolError: as `require_known_columns`.
    """
    require_known_columns(options, FIELDS)
    format: Format | None = None
    no_prompts: bool | None = None  # by the first row
    singles = list[Record]()
    for row in rows:
        try:
            row = renamed(row, options)
            fitting = format if format and format.fits(row.data) else recognize(row)
            if format is None:
                format = fitting
                seen(format)
            if fitting is not format:
                raise invalid_row(row, f"row format {fitting.name} differs from the first row's, {format.name}")
            record = _parse(format, row, options, unread)
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
    yield from grouped(singles, options, rejects)
