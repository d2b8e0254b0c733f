"""The formats in which preference data and responses come, recognised by their fields.

In: a `Row`. Out: a `Record`: prompt messages, response messages, which response is preferred to which.
Cost: string work only; nothing is tokenised here.

| format | recognised by |
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

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rmtool.data.messages import Message, Messages, conversation, prompt_of, wrong
from rmtool.data.record import PLAIN, Pairs, Reading, Record
from rmtool.data.rejects import Rejects
from rmtool.data.rows import Row, json_kind
from rmtool.errors import RmtoolError


@dataclass(frozen=True)
class Format:
    """`fields` and `test` recognise a row, `read` makes its record; with `grouped`, rows with one prompt are one."""

    name: str
    fields: frozenset[str]
    read: Callable[[Row, Reading], Record]
    test: Callable[[dict[str, Any]], bool] = field(default=lambda data: True)
    grouped: bool = False

    def fits(self, data: dict[str, Any]) -> bool:
        return self.fields <= data.keys() and self.test(data)


# ------------------------------------------------------------------------------------------------ a row's parts


def _record(row: Row, conversations: Sequence[Messages], pairs: Iterable[tuple[int, int]], **more: Any) -> Record:
    prompt, responses = _split(*conversations)
    pairs = tuple(pairs)
    margins = (_number(row, "margin"),) * len(pairs)
    record = Record(row.place, prompt, responses, pairs, margins, _subset(row), _weight(row), _tools(row), row.data)
    return replace(record, **more) if more else record


def _split(*conversations: Messages) -> tuple[Messages, tuple[Messages, ...]]:
    """The longest common run of messages, and what follows it in each; every response keeps its last message."""
    limit = min(len(messages) for messages in conversations) - 1
    shared = 0
    first = conversations[0]
    while shared < limit and all(messages[shared] == first[shared] for messages in conversations):
        shared += 1
    return conversations[0][:shared], tuple(messages[shared:] for messages in conversations)


def _prompt(row: Row, name: str = "prompt") -> Messages:
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
        try:
            tools = json.loads(tools)
        except ValueError:
            raise wrong(row, '"tools" is a list, or JSON of one', "other text") from None
    if not tools:
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise wrong(row, '"tools" is a list of objects', json_kind(tools))
    return json.dumps(tools, ensure_ascii=False)


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


def _list(row: Row, name: str) -> list[Any]:
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
    row: Row, conversations: Sequence[Messages], ratings: Sequence[float], reading: Reading, ranks: bool = False
) -> Record:
    """All pairs of responses that are rated, or ranked (a smaller number is better)."""
    pairs = by_rating([-rating for rating in ratings] if ranks else ratings)
    if not reading.rating_margins:
        return _record(row, conversations, pairs)
    return _record(row, conversations, pairs, margins=tuple(abs(ratings[a] - ratings[b]) for a, b in pairs))


# ------------------------------------------------------------------------------------------------- the formats


def _pair(row: Row, reading: Reading) -> Record:
    prompt = _prompt(row)
    return _record(row, [conversation(row, prompt, row.data[name], name) for name in ("chosen", "rejected")], [(0, 1)])


def _lists(row: Row, reading: Reading) -> Record:
    prompt, conversations = _prompt(row), list[Messages]()
    for name in ("chosen", "rejected"):
        conversations += [
            conversation(row, prompt, value, f"{name}[{at}]") for at, value in enumerate(_list(row, name))
        ]
    good = range(len(row.data["chosen"]))
    return _record(row, conversations, itertools.product(good, range(len(good), len(conversations))))


def _rmb(row: Row, reading: Reading) -> Record:
    best, worse = ("chosen", "reject") if "chosen" in row.data else ("bon_best", "loser_list")
    prompt = _prompt(row, "conversation_input")
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
    return _record(row, conversations, [(0, at) for at in range(1, len(conversations))], **subset)


def _two(prompt: str, names: tuple[str, str], better: Callable[[Row], float]) -> Callable[[Row, Reading], Record]:
    """A format with two responses; `better` is below 0 where the first is preferred, 0 where they are tied."""

    def read(row: Row, reading: Reading) -> Record:
        start, side = _prompt(row, prompt), better(row)
        conversations = [conversation(row, start, row.data[name], name) for name in names]
        pairs = [] if side == 0 else [(0, 1) if side < 0 else (1, 0)]
        margins = {"margins": (abs(side),) * len(pairs)} if reading.rating_margins else {}
        return _record(row, conversations, pairs, **margins)

    return read


def _strength(name: str) -> Callable[[Row], float]:
    def better(row: Row) -> float:
        value = _number(row, name)
        if value is None:
            raise wrong(row, f'"{name}" is a number', "null")
        return value

    return better


def _safe_rlhf(row: Row) -> float:
    return -1 if _one_of(row, "better_response_id", (0, 1)) == 0 else 1


_WINNERS = {"model_a": -1, "model_b": 1, "tie": 0, "tie (bothbad)": 0, "both_bad": 0}


def _arena(row: Row) -> float:
    if "winner" in row.data:
        return _WINNERS[_one_of(row, "winner", _WINNERS)]
    names = {"winner_model_a": -1, "winner_model_b": 1, "winner_tie": 0}
    chosen = [side for name, side in names.items() if _one_of(row, name, (0, 1)) == 1]
    if len(chosen) != 1:
        raise wrong(row, f"exactly one of {', '.join(names)} is 1", f"{len(chosen)} of them")
    return chosen[0]


def _judge(row: Row) -> float:
    return -1 if _one_of(row, "label", ("A>B", "B>A")) == "A>B" else 1


def _arena_responses(row: Row, reading: Reading) -> Record:
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
    return _two("prompt", ("response_a", "response_b"), _arena)(changed, reading)


def _turns(row: Row, name: str) -> list[str]:
    value = row.data[name]
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return [row.data[name]]
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise wrong(row, f'"{name}" is a string, or a list of one per turn', json_kind(value))
    return value


def _items(name: str, text: str, rating: str, prompt: str, ranks: bool) -> Callable[[Row, Reading], Record]:
    """A list of objects, each with a response and its rating or rank."""

    def read(row: Row, reading: Reading) -> Record:
        start, conversations, ratings = _prompt(row, prompt), list[Messages](), list[float]()
        for at, item in enumerate(_list(row, name)):
            if not isinstance(item, dict) or text not in item:
                raise wrong(row, f'{name}[{at}] is an object with a "{text}"', json_kind(item))
            value = _number(row, f"{name}[{at}].{rating}", item.get(rating))
            if value is None:
                raise wrong(row, f"{name}[{at}].{rating} is missing")
            conversations.append(conversation(row, start, item[text], f"{name}[{at}].{text}"))
            ratings.append(value)
        return _rated(row, conversations, ratings, reading, ranks)

    return read


def _lists_of(ratings: str) -> Callable[[Row, Reading], Record]:
    def read(row: Row, reading: Reading) -> Record:
        responses, values = _list(row, "responses"), _list(row, ratings)
        if len(responses) != len(values):
            raise wrong(row, f'"responses" and "{ratings}" have equally many items', f"{len(responses)}, {len(values)}")
        numbers = [_number(row, f"{ratings}[{at}]", value) for at, value in enumerate(values)]
        if None in numbers:
            raise wrong(row, f"{ratings}[{numbers.index(None)}] is a finite number", "null")
        start = _prompt(row)
        conversations = [conversation(row, start, value, f"responses[{at}]") for at, value in enumerate(responses)]
        return _rated(row, conversations, [n for n in numbers if n is not None], reading, ranks=ratings == "ranks")

    return read


def _one_response(row: Row, reading: Reading) -> Record:
    """One of the rows that `grouped` puts together; its rating waits in `margins`."""
    name = "rating" if "rating" in row.data else "helpfulness"
    rating = _number(row, name)
    if rating is None:
        raise wrong(row, f'"{name}" is a number', "null")
    start = _prompt(row)
    return _record(row, [conversation(row, start, row.data["response"], "response")], [], margins=(rating,))


def _fields(*names: str) -> frozenset[str]:
    return frozenset(names)


def _has_lists(data: dict[str, Any]) -> bool:
    """chosen and rejected hold several responses: strings, or whole conversations."""
    return all(
        isinstance(data[name], list) and data[name] and isinstance(data[name][0], str | list)
        for name in ("chosen", "rejected")
    )


FORMATS = (
    Format("RMB, pairs", _fields("conversation_input", "chosen", "reject"), _rmb),
    Format("RMB, best of N", _fields("conversation_input", "bon_best", "loser_list"), _rmb),
    Format("lists of chosen and rejected responses", _fields("chosen", "rejected"), _lists, _has_lists),
    Format("pairs of chosen and rejected", _fields("chosen", "rejected"), _pair),
    Format(
        "HelpSteer3 preference",
        _fields("context", "response1", "response2", "overall_preference"),
        _two("context", ("response1", "response2"), _strength("overall_preference")),
    ),
    Format(
        "HelpSteer2 preference",
        _fields("prompt", "response_1", "response_2", "preference_strength"),
        _two("prompt", ("response_1", "response_2"), _strength("preference_strength")),
    ),
    Format(
        "PKU-SafeRLHF",
        _fields("prompt", "response_0", "response_1", "better_response_id"),
        _two("prompt", ("response_0", "response_1"), _safe_rlhf),
    ),
    Format(
        "Chatbot Arena, conversations",
        _fields("conversation_a", "conversation_b", "winner"),
        _two("prompt", ("conversation_a", "conversation_b"), _arena),
    ),
    Format(
        "Chatbot Arena, responses",
        _fields("prompt", "response_a", "response_b"),
        _arena_responses,
        lambda data: "winner" in data or "winner_model_a" in data,
    ),
    Format(
        "JudgeBench",
        _fields("question", "response_A", "response_B", "label"),
        _two("question", ("response_A", "response_B"), _judge),
    ),
    Format("Nectar", _fields("prompt", "answers"), _items("answers", "answer", "rank", "prompt", True)),
    Format(
        "UltraFeedback, completions",
        _fields("instruction", "completions"),
        _items("completions", "response", "overall_score", "instruction", False),
    ),
    Format("ranked responses", _fields("responses", "ranks"), _lists_of("ranks")),
    Format("rated responses", _fields("responses", "ratings"), _lists_of("ratings")),
    Format(
        "rated rows, put together by prompt",
        _fields("prompt", "response"),
        _one_response,
        lambda data: "helpfulness" in data or "rating" in data,
        grouped=True,
    ),
)


def recognise(row: Row) -> Format:
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


def preference_record(row: Row, reading: Reading = PLAIN) -> Record:
    """The record of one row by itself, whatever its format.

    Raises:
        RmtoolError: E0303 a field is missing or of the wrong kind.
    """
    row = _renamed(row, reading)
    return recognise(row).read(row, reading)


def preference_records(
    rows: Iterable[Row], reading: Reading, rejects: Rejects, seen: Callable[[Format], None]
) -> Iterator[Record]:
    """The records of a source, all of its first row's format; bad rows go to `rejects`.

    `seen` is called once, with the format. Rated rows are held until the end, and come by their prompts' first row.
    """
    format: Format | None = None
    singles = list[Record]()
    for row in rows:
        try:
            row = _renamed(row, reading)
            if format is None:
                format = recognise(row)
                seen(format)
            if not format.fits(row.data):
                format_now = recognise(row)
                raise wrong(row, f"this row is of another format ({format_now.name}) than the first ({format.name})")
            record = format.read(row, reading)
        except RmtoolError as error:
            rejects.add(error, row.data)
            continue
        if format.grouped:
            singles.append(record)
        else:
            yield record
    yield from _grouped(singles, reading)


def _grouped(singles: Sequence[Record], reading: Reading) -> Iterator[Record]:
    groups: dict[tuple[Messages, str], list[Record]] = {}
    for record in singles:
        groups.setdefault((_asked(record), record.tools), []).append(record)
    for (_, tools), records in groups.items():
        ratings = [record.margins[0] or 0.0 for record in records]
        pairs = by_rating(ratings)
        prompt, responses = _split(*(record.prompt + record.responses[0] for record in records))
        margins = tuple(abs(ratings[a] - ratings[b]) if reading.rating_margins else None for a, b in pairs)
        first = records[0]
        rest = first.subset, first.weight, tools, first.row
        yield Record(first.place, prompt, responses, pairs, margins, *rest)


def _asked(record: Record) -> Messages:
    """All messages but the last."""
    return (record.prompt + record.responses[0])[:-1]


def _renamed(row: Row, reading: Reading) -> Row:
    """The row with our names for the source's fields."""
    if not reading.columns:
        return row
    data = dict(row.data)
    for ours, theirs in reading.columns:
        value: Any = row.data
        for part in theirs.split("."):
            if not isinstance(value, dict) or part not in value:
                raise wrong(row, f'"{theirs}", which data.columns.{ours} names, is missing', _shown_fields(row))
            value = value[part]
        data.pop(theirs, None)
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
        start = _prompt(row)
        conversations = [
            conversation(row, start, value, f"responses[{at}]") for at, value in enumerate(_list(row, "responses"))
        ]
    elif "response" in data:
        conversations = [conversation(row, _prompt(row), data["response"], "response")]
    elif "messages" in data:
        conversations = [conversation(row, (), _list(row, "messages"), "messages")]
    else:
        raise wrong(row, 'there is no "response", "responses" or "messages"', _shown_fields(row))
    return _record(row, conversations, [])
