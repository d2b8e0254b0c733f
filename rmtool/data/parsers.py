"""Parsers: from the fields of a row to its record, one for each kind of format.

In: a `Row` that a format has recognized. Out: a `Record`, or an error with the path of the invalid field.
Cost: string work only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

from rmtool.data.messages import inner_json, invalid_row
from rmtool.data.notations import refuse_python_text
from rmtool.data.pairs import margins_by_rating, pairs_by_rating
from rmtool.data.record import Message, Messages, Record, RowOptions, prompt_of, split_prompt
from rmtool.data.rows import Row, json_kind

Parser = Callable[[Row, RowOptions], Record]

COMMON_FIELDS = frozenset({"system", "system_prompt", "tools", "chat_template_kwargs", "margin", "weight", "subset"})
# Arguments of apply_chat_template that are not for the template, or that rmtool sets.
_RESERVED: tuple[str, ...] = (
    "conversation",
    "tools",
    "chat_template",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
)
_RESERVED += ("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask")
_RESERVED += ("sanitize_control_tokens", "tokenizer_kwargs", "messages", "raise_exception", "strftime_now")
_RESERVED += ("bos_token", "eos_token", "pad_token", "unk_token")

# ------------------------------------------------------------------------------------------------ a row's parts


def record_of(
    row: Row, prompt: Messages, values: Mapping[str, Any], pairs: Iterable[tuple[int, int]] = (), **more: Any
) -> Record:
    """Return the record of a prompt and the responses in `values`, by their path in the row, with the fields that all
    formats may have; `more` overrides them.

    Raises:
        RmtoolError: E0303 when a response or field is invalid.
    """
    prompt, responses = split_prompt(row, prompt, values)
    pairs = tuple(pairs)
    margins = (_number(row, "margin"),) * len(pairs)
    labels = (pairs, margins, _subset(row), _weight(row))
    kwargs = _template_kwargs(row)
    record = Record(row.place, prompt, responses, *labels, _tools(row), row.data, template_kwargs=kwargs)
    return replace(record, **more) if more else record


def rated_record(
    row: Row, prompt: Messages, values: Mapping[str, Any], ratings: Sequence[float], options: RowOptions, **more: Any
) -> Record:
    """Return the record of responses that are each preferred to those with a lower rating, as `record_of` does."""
    record = record_of(row, prompt, values)
    pairs, dropped = pairs_by_rating(ratings, options.max_pairs, record.prompt)
    margins = (_number(row, "margin"),) * len(pairs)
    return replace(record, preferences=pairs, margins=margins, dropped_pairs=dropped, **more)


def full_prompt(row: Row, name: str = "prompt") -> Messages:
    """Return the row's system prompt and the prompt in the field `name`.

    Raises:
        RmtoolError: as `with_system`, and when the prompt is invalid.
    """
    return with_system(row, prompt_of(row, name))


def with_system(row: Row, prompt: Messages) -> Messages:
    """Return the row's system prompt and `prompt`.

    Raises:
        RmtoolError: E0303 when the system prompt is invalid, or there are two.
    """
    systems = {name: row.data[name] for name in ("system", "system_prompt") if row.data.get(name)}
    if not systems:
        return prompt
    name, system = systems.popitem()
    if not isinstance(system, str):
        raise invalid_row(row, f'"{name}" must be a string', json_kind(system))
    if any(other != system for other in systems.values()):
        raise invalid_row(row, '"system" and "system_prompt" differ', hint="keep one of the two")
    if prompt and prompt[0].role == "system":
        raise invalid_row(row, f'both "{name}" and the prompt contain a system message', hint="keep one of the two")
    return (Message("system", system), *prompt)


def _tools(row: Row) -> str:
    """Return JSON of the tools: a list, or JSON of one, as Hub datasets store it."""
    tools = row.data.get("tools")
    if isinstance(tools, str) and tools:
        tools = inner_json(tools)
        if tools is None:
            raise invalid_row(row, '"tools" must be a list, or JSON of one', "other text")
    if not tools:
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise invalid_row(row, '"tools" must be a list of objects', json_kind(tools))
    return json.dumps(tools, ensure_ascii=False)


def _template_kwargs(row: Row) -> str:
    """Return JSON of further arguments of the chat template: an object, or JSON of one, as TRL reads them."""
    name = "chat_template_kwargs"
    given = row.data.get(name)
    if not given:
        return ""
    kwargs = inner_json(given) if isinstance(given, str) else given
    if not isinstance(kwargs, dict):
        raise invalid_row(row, f'"{name}" must be an object, or JSON of one', json_kind(row.data[name]))
    if reserved := [key for key in _RESERVED if key in kwargs]:
        raise invalid_row(row, f'"{name}" contains "{reserved[0]}", which is not for the template', hint="remove it")
    return json.dumps(kwargs, ensure_ascii=False, sort_keys=True) if kwargs else ""


def _number(row: Row, name: str, value: Any = None) -> float | None:
    value = row.data.get(name) if value is None else value
    if value is None:
        return None
    value = float(value) if isinstance(value, Decimal) else value  # of a parquet file
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise invalid_row(row, f'"{name}" must be a finite number', repr(value))
    return float(value)


def required_number(row: Row, name: str, value: Any = None) -> float:
    """Return the field, or `value` at the path `name`, as a number.

    Raises:
        RmtoolError: E0303 when it is not a finite number.
    """
    number = _number(row, name, value)
    if number is None:
        raise invalid_row(row, f'"{name}" must be a finite number', "null")
    return number


def _weight(row: Row) -> float:
    weight = _number(row, "weight")
    if weight is not None and weight < 0:
        raise invalid_row(row, '"weight" must be at least 0', repr(weight))
    return 1.0 if weight is None else weight


def _subset(row: Row) -> str | None:
    value = row.data.get("subset")
    if value is not None and not isinstance(value, str):
        raise invalid_row(row, '"subset" must be a string', json_kind(value))
    return value


def one_of(row: Row, name: str, allowed: Collection[Any]) -> Any:
    """Return the field, which must have one of these values.

    Raises:
        RmtoolError: E0303 when it has another one.
    """
    value = row.data.get(name)
    if isinstance(value, bool) or value not in list(allowed):
        raise invalid_row(row, f'"{name}" must be one of {", ".join(map(str, allowed))}', repr(value))
    return value


def items_of(row: Row, name: str) -> dict[str, Any]:
    """Return the items of a list by their paths.

    Raises:
        RmtoolError: E0303 when it is not a list, or empty.
    """
    value = row.data.get(name)
    if isinstance(value, str):
        refuse_python_text(row, value, name)
    if not isinstance(value, list) or not value:
        raise invalid_row(row, f'"{name}" must be a non-empty list', json_kind(value) if value != [] else "[]")
    return {f"{name}[{at}]": item for at, item in enumerate(value)}


# ------------------------------------------------------------------------------------------------- the parsers


def pair(prompt: Callable[[Row], Messages] = full_prompt, names: Sequence[str] = ("chosen", "rejected")) -> Parser:
    """Return a parser of one chosen and one rejected response."""

    def parse(row: Row, options: RowOptions) -> Record:
        more = _score_margin(row) if options.rating_margins else {}
        return record_of(row, prompt(row), {name: row.data[name] for name in names}, [(0, 1)], **more)

    return parse


def _score_margin(row: Row) -> dict[str, Any]:
    """Return the margin by score_chosen and score_rejected, as UltraFeedback binarized has them."""
    names = ("score_chosen", "score_rejected")
    chosen, rejected = (_number(row, name) for name in names)
    if chosen is None and rejected is None:
        return {}
    if chosen is None or rejected is None:
        raise invalid_row(row, f'"{names[chosen is not None]}" is missing, but data.rating_margins needs both scores')
    if chosen < rejected:
        what = '"score_chosen" must not be below "score_rejected" with data.rating_margins'
        raise invalid_row(row, what, f"{chosen:g} and {rejected:g}")
    return {"margins": (chosen - rejected,)}


def lists(row: Row, options: RowOptions) -> Record:
    """Parse lists of `chosen` and `rejected` responses: each of one is preferred to each of the other."""
    chosen, rejected = items_of(row, "chosen"), items_of(row, "rejected")
    ratings = [1] * len(chosen) + [0] * len(rejected)
    return rated_record(row, full_prompt(row), chosen | rejected, ratings, options)


def rmb(best: str, worse: str) -> Parser:
    """Return a parser of RMB: one best response, and one or a list of others, all objects with an `answer`."""

    def parse(row: Row, options: RowOptions) -> Record:
        others = items_of(row, worse) if worse == "loser_list" else {worse: row.data[worse]}
        values = {best: row.data[best]} | others
        for name, item in values.items():
            if not isinstance(item, dict) or not isinstance(item.get("answer"), str):
                raise invalid_row(row, f'"{name}" must be an object with an "answer"', json_kind(item))
            values[name] = item["answer"]
        category = row.data.get("category_path")
        more = {"subset": category} if isinstance(category, str) and row.data.get("subset") is None else {}
        ratings = [1] + [0] * len(others)
        return rated_record(row, full_prompt(row, "conversation_input"), values, ratings, options, **more)

    return parse


def two_responses(
    prompt: str, names: tuple[str, str], label: str, preferences: Mapping[Any, float] | None = None
) -> Parser:
    """Return a parser of two responses. `preferences` maps values of `label` to a number: below 0 the first response is
    preferred, at 0 they are tied; without it, the label is that number.
    """

    def parse(row: Row, options: RowOptions) -> Record:
        preference = preferences[one_of(row, label, preferences)] if preferences else required_number(row, label)
        pairs = [] if preference == 0 else [(0, 1) if preference < 0 else (1, 0)]
        more = {"margins": (abs(preference),) * len(pairs)} if options.rating_margins else {}
        return record_of(row, full_prompt(row, prompt), {name: row.data[name] for name in names}, pairs, **more)

    return parse


def rated_objects(name: str, text: str, rating: str, prompt: str) -> Parser:
    """Return a parser of a list `name` of objects, each with a response and its rating or rank."""

    def parse(row: Row, options: RowOptions) -> Record:
        values, ratings = {}, []
        for path, item in items_of(row, name).items():
            if not isinstance(item, dict) or text not in item:
                raise invalid_row(row, f'{path} must be an object with a "{text}"', json_kind(item))
            if item.get(rating) is None:
                raise invalid_row(row, f"{path}.{rating} is missing")
            ratings.append(required_number(row, f"{path}.{rating}", item[rating]))
            values[f"{path}.{text}"] = item[text]
        return rated(row, full_prompt(row, prompt), values, rating, ratings, options)

    return parse


def rated_lists(rating: str) -> Parser:
    """Return a parser of two lists: `responses`, and their ratings or ranks."""

    def parse(row: Row, options: RowOptions) -> Record:
        responses, values = items_of(row, "responses"), items_of(row, rating)
        if len(responses) != len(values):
            found = f"{len(responses)}, {len(values)}"
            raise invalid_row(row, f'"responses" and "{rating}" must have the same length', found)
        ratings = [required_number(row, path, value) for path, value in values.items()]
        return rated(row, full_prompt(row), responses, rating, ratings, options)

    return parse


def rated(
    row: Row, prompt: Messages, values: Mapping[str, Any], rating: str, ratings: Sequence[float], options: RowOptions
) -> Record:
    """Return the record of rated or ranked responses (rank 1 is the best)."""
    order = [-rank for rank in ratings] if rating in ("rank", "ranks") else ratings
    record = rated_record(row, prompt, values, order, options)
    margins = margins_by_rating(ratings, record.preferences) if options.rating_margins else record.margins
    return replace(record, margins=margins)


def one_response(row: Row, options: RowOptions) -> Record:
    """Parse a row with one rated response, to be grouped by prompt; the rating is in `margins` until then."""
    rating = required_number(row, "rating" if "rating" in row.data else "helpfulness")
    return record_of(row, full_prompt(row), {"response": row.data["response"]}, margins=(rating,))
