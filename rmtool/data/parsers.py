"""How each format's rows are read: its fields, and what they mean.

In: a `Row` that a format has recognized. Out: a `Record`, or an error with the path of the field that is wrong.
Cost: string work only.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from rmtool.data.messages import Message, Messages, conversation, prompt_of, wrong
from rmtool.data.record import Pairs, Record, RowOptions
from rmtool.data.rows import Row, json_kind

# ------------------------------------------------------------------------------------------------ a row's parts


def record_of(row: Row, conversations: Sequence[Messages], pairs: Iterable[tuple[int, int]], **more: Any) -> Record:
    """The record of whole conversations, with the fields that all formats may have; `more` overrides them."""
    prompt, responses = split_shared(*conversations)
    pairs = tuple(pairs)
    margins = (_number(row, "margin"),) * len(pairs)
    record = Record(row.place, prompt, responses, pairs, margins, _subset(row), _weight(row), _tools(row), row.data)
    return replace(record, **more) if more else record


def split_shared(*conversations: Messages) -> tuple[Messages, tuple[Messages, ...]]:
    """The longest common run of messages, and what follows it in each; every response keeps its last message."""
    limit = min(len(messages) for messages in conversations) - 1
    shared = 0
    first = conversations[0]
    while shared < limit and all(messages[shared] == first[shared] for messages in conversations):
        shared += 1
    return conversations[0][:shared], tuple(messages[shared:] for messages in conversations)


def whole_prompt(row: Row, name: str = "prompt") -> Messages:
    """The prompt, the row's system prompt before it."""
    prompt, system = prompt_of(row, name), row.data.get("system") or row.data.get("system_prompt")
    if not system:
        return prompt
    if not isinstance(system, str):
        raise wrong(row, '"system" is a string', json_kind(system))
    if prompt and prompt[0].role == "system":
        raise wrong(row, 'there is a "system" and a system message in the prompt', hint="keep one of the two")
    return (Message("system", system), *prompt)


def _tools(row: Row) -> str:
    """A list of tools, or JSON of one, as Hub datasets store it."""
    tools = row.data.get("tools")
    if isinstance(tools, str) and tools:
        tools = _inner_json(tools)
        if tools is None:
            raise wrong(row, '"tools" is a list, or JSON of one', "other text")
    if not tools:
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise wrong(row, '"tools" is a list of objects', json_kind(tools))
    return json.dumps(tools, ensure_ascii=False)


def _inner_json(text: str) -> Any:
    """What JSON in a field says; None where it is none that we would read in a row."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no character
    except (ValueError, RecursionError):
        return None
    return value


def _number(row: Row, name: str, value: Any = None) -> float | None:
    value = row.data.get(name) if value is None else value
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise wrong(row, f'"{name}" is a finite number', repr(value))
    return float(value)


def _weight(row: Row) -> float:
    weight = _number(row, "weight")
    if weight is not None and weight < 0:
        raise wrong(row, '"weight" is at least 0', repr(weight))
    return 1.0 if weight is None else weight


def _subset(row: Row) -> str | None:
    value = row.data.get("subset")
    if value is not None and not isinstance(value, str):
        raise wrong(row, '"subset" is a string', json_kind(value))
    return value


def _one_of(row: Row, name: str, known: Iterable[Any]) -> Any:
    value = row.data.get(name)
    known = list(known)
    if isinstance(value, bool) or value not in known:
        raise wrong(row, f'"{name}" is one of {", ".join(map(str, known))}', repr(value))
    return value


def listed(row: Row, name: str) -> list[Any]:
    value = row.data.get(name)
    if not isinstance(value, list) or not value:
        raise wrong(row, f'"{name}" is a list with at least one item', json_kind(value) if value != [] else "none")
    return value


def by_rating(ratings: Sequence[float]) -> Pairs:
    """(winner, loser) of all two responses with different ratings, the higher one the winner."""
    return tuple(
        (a, b) if ratings[a] > ratings[b] else (b, a)
        for a, b in itertools.combinations(range(len(ratings)), 2)
        if ratings[a] != ratings[b]
    )


def _rated(
    row: Row, conversations: Sequence[Messages], ratings: Sequence[float], reading: RowOptions, ranks: bool = False
) -> Record:
    """All pairs of responses that are rated, or ranked (a smaller number is better)."""
    pairs = by_rating([-rating for rating in ratings] if ranks else ratings)
    if not reading.rating_margins:
        return record_of(row, conversations, pairs)
    return record_of(row, conversations, pairs, margins=tuple(abs(ratings[a] - ratings[b]) for a, b in pairs))


# ------------------------------------------------------------------------------------------------- the formats


def pair(row: Row, reading: RowOptions) -> Record:
    prompt, names = whole_prompt(row), ("chosen", "rejected")
    margins = _score_margin(row) if reading.rating_margins else {}
    return record_of(row, [conversation(row, prompt, row.data[name], name) for name in names], [(0, 1)], **margins)


def _score_margin(row: Row) -> dict[str, Any]:
    """The margin that score_chosen and score_rejected give, as UltraFeedback binarized has them."""
    names = ("score_chosen", "score_rejected")
    chosen, rejected = (_number(row, name) for name in names)
    if chosen is None and rejected is None:
        return {}
    if chosen is None or rejected is None:
        raise wrong(row, f'"{names[chosen is not None]}" is missing, and data.rating_margins asks for the difference')
    if chosen < rejected:
        what = '"score_chosen" is below "score_rejected", and data.rating_margins makes their difference the margin'
        raise wrong(row, what, f"{chosen:g} and {rejected:g}")
    return {"margins": (chosen - rejected,)}


def lists(row: Row, reading: RowOptions) -> Record:
    prompt, conversations = whole_prompt(row), list[Messages]()
    for name in ("chosen", "rejected"):
        conversations += [
            conversation(row, prompt, value, f"{name}[{at}]") for at, value in enumerate(listed(row, name))
        ]
    good = range(len(row.data["chosen"]))
    return record_of(row, conversations, itertools.product(good, range(len(good), len(conversations))))


def rmb(row: Row, reading: RowOptions) -> Record:
    best, worse = ("chosen", "reject") if "chosen" in row.data else ("bon_best", "loser_list")
    prompt = whole_prompt(row, "conversation_input")
    losers = row.data[worse] if worse == "loser_list" else [row.data[worse]]
    if not isinstance(losers, list) or not losers:
        raise wrong(row, f'"{worse}" is a list with at least one item', json_kind(losers))
    conversations = []
    for name, item in ((best, row.data[best]), *((f"{worse}[{at}]", item) for at, item in enumerate(losers))):
        if not isinstance(item, dict) or not isinstance(item.get("answer"), str):
            raise wrong(row, f'"{name}" is an object with an "answer"', json_kind(item))
        conversations.append(conversation(row, prompt, item["answer"], name))
    path = row.data.get("category_path")
    subset = {"subset": path} if isinstance(path, str) and "subset" not in row.data else {}
    return record_of(row, conversations, [(0, at) for at in range(1, len(conversations))], **subset)


def two_responses(
    prompt: str, names: tuple[str, str], better: Callable[[Row], float]
) -> Callable[[Row, RowOptions], Record]:
    """A format with two responses; `better` is below 0 where the first is preferred, 0 where they are tied."""

    def read(row: Row, reading: RowOptions) -> Record:
        start, side = whole_prompt(row, prompt), better(row)
        conversations = [conversation(row, start, row.data[name], name) for name in names]
        pairs = [] if side == 0 else [(0, 1) if side < 0 else (1, 0)]
        margins = {"margins": (abs(side),) * len(pairs)} if reading.rating_margins else {}
        return record_of(row, conversations, pairs, **margins)

    return read


def strength(name: str) -> Callable[[Row], float]:
    def better(row: Row) -> float:
        value = _number(row, name)
        if value is None:
            raise wrong(row, f'"{name}" is a number', "null")
        return value

    return better


def safe_rlhf_winner(row: Row) -> float:
    return -1 if _one_of(row, "better_response_id", (0, 1)) == 0 else 1


_WINNERS = {"model_a": -1, "model_b": 1, "tie": 0, "tie (bothbad)": 0, "both_bad": 0}


def arena_winner(row: Row) -> float:
    if "winner" in row.data:
        return _WINNERS[_one_of(row, "winner", _WINNERS)]
    names = {"winner_model_a": -1, "winner_model_b": 1, "winner_tie": 0}
    chosen = [side for name, side in names.items() if _one_of(row, name, (0, 1)) == 1]
    if len(chosen) != 1:
        raise wrong(row, f"exactly one of {', '.join(names)} is 1", f"{len(chosen)} of them")
    return chosen[0]


def judge_label(row: Row) -> float:
    return -1 if _one_of(row, "label", ("A>B", "B>A")) == "A>B" else 1


def arena_responses(row: Row, reading: RowOptions) -> Record:
    """Prompt and responses are strings, or JSON lists with one string per turn."""
    turns = {name: _turns(row, name) for name in ("prompt", "response_a", "response_b")}
    if len({len(texts) for texts in turns.values()}) != 1:
        raise wrong(row, "prompt, response_a and response_b have equally many turns")
    plain = {}
    for name in ("response_a", "response_b"):
        said = zip(turns["prompt"], turns[name], strict=True)
        plain[name] = [
            {"role": role, "content": text}
            for turn in said
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
    changed = Row(row.place, {**row.data, "prompt": None, **plain})
    return two_responses("prompt", ("response_a", "response_b"), arena_winner)(changed, reading)


def _turns(row: Row, name: str) -> list[str]:
    value = row.data[name]
    if isinstance(value, str) and value.startswith("["):
        value = _inner_json(value)
        if value is None:
            return [row.data[name]]
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise wrong(row, f'"{name}" is a string, or a list of one per turn', json_kind(value))
    return value


def items(name: str, text: str, rating: str, prompt: str, ranks: bool) -> Callable[[Row, RowOptions], Record]:
    """A list of objects, each with a response and its rating or rank."""

    def read(row: Row, reading: RowOptions) -> Record:
        start, conversations, ratings = whole_prompt(row, prompt), list[Messages](), list[float]()
        for at, item in enumerate(listed(row, name)):
            if not isinstance(item, dict) or text not in item:
                raise wrong(row, f'{name}[{at}] is an object with a "{text}"', json_kind(item))
            value = _number(row, f"{name}[{at}].{rating}", item.get(rating))
            if value is None:
                raise wrong(row, f"{name}[{at}].{rating} is missing")
            conversations.append(conversation(row, start, item[text], f"{name}[{at}].{text}"))
            ratings.append(value)
        return _rated(row, conversations, ratings, reading, ranks)

    return read


def lists_of(ratings: str) -> Callable[[Row, RowOptions], Record]:
    def read(row: Row, reading: RowOptions) -> Record:
        responses, values = listed(row, "responses"), listed(row, ratings)
        if len(responses) != len(values):
            raise wrong(row, f'"responses" and "{ratings}" have equally many items', f"{len(responses)}, {len(values)}")
        numbers = [_number(row, f"{ratings}[{at}]", value) for at, value in enumerate(values)]
        if None in numbers:
            raise wrong(row, f"{ratings}[{numbers.index(None)}] is a finite number", "null")
        start = whole_prompt(row)
        conversations = [conversation(row, start, value, f"responses[{at}]") for at, value in enumerate(responses)]
        return _rated(row, conversations, [n for n in numbers if n is not None], reading, ranks=ratings == "ranks")

    return read


def one_response(row: Row, reading: RowOptions) -> Record:
    """One of the rows that `grouped` puts together; its rating waits in `margins`."""
    name = "rating" if "rating" in row.data else "helpfulness"
    rating = _number(row, name)
    if rating is None:
        raise wrong(row, f'"{name}" is a number', "null")
    start = whole_prompt(row)
    return record_of(row, [conversation(row, start, row.data["response"], "response")], [], margins=(rating,))
