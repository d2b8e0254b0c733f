"""Layouts of other tools and data sets whose fields need more than a name: prompts in several fields, arenas, ratings.

In: a `Row`. Out: the messages of its prompt, or its `Record`.
Cost: string work only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rmtool.data.field_names import has_content, is_message, is_messages
from rmtool.data.messages import inner_json, invalid_row, role_of
from rmtool.data.parsers import (
    full_prompt,
    one_of,
    rated,
    record_of,
    required_number,
    two_responses,
    with_system,
)
from rmtool.data.record import Message, Messages, Record, RowOptions, prompt_of
from rmtool.data.rows import Row, json_kind

# ------------------------------------------------------------------------------------------------- prompts


def alpaca_prompt(row: Row, names: tuple[str, ...] = ("instruction", "input")) -> Messages:
    """Return the prompt of LLaMA-Factory's alpaca layout: `history`, then `instruction` and `input` on two lines.

    Raises:
        RmtoolError: E0303 when one of them is invalid.
    """
    history, texts = list[Message](), []
    for at, turn in enumerate(row.data.get("history") or []):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise invalid_row(row, f"history[{at}] must be a list of two strings", json_kind(turn))
        history += [Message("user", turn[0]), Message("assistant", turn[1])]
    for name in names:
        if text := row.data.get(name):
            if not isinstance(text, str):
                raise invalid_row(row, f'"{name}" must be a string', json_kind(text))
            texts.append(text)
    return with_system(row, (*history, Message("user", "\n".join(texts))) if texts else tuple(history))


def swift_query(row: Row) -> Messages:
    """Return the prompt of ms-swift's older layout: `history`, then `query`."""
    return alpaca_prompt(row, ("query",))


def step_prompt(row: Row) -> Messages:
    """Return the prompt of Step-DPO: it ends in the beginning of the response, which the response continues."""
    begun = row.data["initial_reason_steps"]
    if begun is not None and not isinstance(begun, str):
        raise invalid_row(row, '"initial_reason_steps" must be a string', json_kind(begun))
    prompt = full_prompt(row)
    return (*prompt, Message("assistant", begun)) if begun else prompt


def orca_prompt(row: Row) -> Messages:
    """Return the prompt of orca_dpo_pairs: `system`, then `question` (`input` in Argilla's version)."""
    return full_prompt(row, "question" if row.data.get("question") else "input")


def prompt_in(name: str) -> Callable[[Row], Messages]:
    """Return a reader of the prompt in the field `name`."""
    return lambda row: full_prompt(row, name)


def ends_before_response(value: Any) -> bool:
    """Return whether a value is a list of messages that the response follows."""
    last = value[-1] if is_messages(value) else None
    return is_message(last) and has_content(last) and role_of(last) != "assistant"


# ------------------------------------------------------------------------------------------------- records


def swift(row: Row, options: RowOptions) -> Record:
    """Parse ms-swift: `messages` end with the chosen response, which `rejected_response` replaces."""
    messages = prompt_of(row, "messages")
    values = {"messages": row.data["messages"], "rejected_response": row.data["rejected_response"]}
    system = with_system(row, ())
    return record_of(row, (*system, *messages[:-1]), values, [(0, 1)])


def swift_conversations(row: Row, options: RowOptions) -> Record:
    """Parse ms-swift: `messages` are the chosen conversation, `rejected_messages` the rejected one."""
    values = {name: row.data[name] for name in ("messages", "rejected_messages")}
    return record_of(row, with_system(row, ()), values, [(0, 1)])


def openai(row: Row, options: RowOptions) -> Record:
    """Parse OpenAI's preferences: `input` has the messages before the responses, and tools."""
    given = row.data["input"]
    if not isinstance(given, dict):
        raise invalid_row(row, '"input" must be an object with "messages"', json_kind(given))
    inner = Row(row.place, {**row.data, "messages": given.get("messages"), "tools": given.get("tools")})
    values = {name: row.data[name] for name in ("preferred_output", "non_preferred_output")}
    return replace(record_of(inner, full_prompt(inner, "messages"), values, [(0, 1)]), row=row.data)


def web_gpt(row: Row, options: RowOptions) -> Record:
    """Parse WebGPT comparisons: two answers with scores, and a question, which is an object with its `full_text`."""
    question = row.data["question"]
    text = question.get("full_text") if isinstance(question, dict) else question
    if not isinstance(text, str):
        raise invalid_row(row, "question.full_text must be a string", json_kind(text))
    scores = [required_number(row, name) for name in ("score_0", "score_1")]
    answers = {name: row.data[name] for name in ("answer_0", "answer_1")}
    return rated(row, with_system(row, (Message("user", text),)), answers, "score", scores, options)


_WINNERS = {
    "model_a": -1,
    "model_b": 1,
    **dict.fromkeys(("A", "model_1"), -1),
    **dict.fromkeys(("B", "model_2"), 1),
    **dict.fromkeys(("tie", "tie (bothbad)", "both_bad", "tie (inconsistent)"), 0),
}


def arena_conversations(row: Row, options: RowOptions) -> Record:
    """Parse Chatbot Arena conversations. `turn` is how many turns were judged: rows of MT-bench have them all."""
    data, turn = dict(row.data), row.data.get("turn")
    names = ("conversation_a", "conversation_b")
    if isinstance(turn, int) and turn > 0 and all(isinstance(data[name], list) for name in names):
        data |= {name: data[name][: 2 * turn] for name in names}
    return _arena(Row(row.place, data), options, names, row)


def _arena(row: Row, options: RowOptions, names: tuple[str, str], source: Row) -> Record:
    return replace(two_responses("prompt", names, "winner", _WINNERS)(row, options), row=source.data)


def arena_responses(row: Row, options: RowOptions) -> Record:
    """Parse Chatbot Arena responses: strings, or JSON lists with one string per turn, as the prompt."""
    turns = {name: _turns(row, name) for name in ("prompt", "response_a", "response_b")}
    if len({len(texts) for texts in turns.values()}) != 1:
        found = ", ".join(str(len(texts)) for texts in turns.values())
        raise invalid_row(row, "prompt, response_a and response_b must have the same number of turns", found)
    data = {**row.data, "prompt": None, "winner": _arena_winner(row)}
    for name in ("response_a", "response_b"):
        texts = itertools.chain.from_iterable(zip(turns["prompt"], turns[name], strict=True))
        roles = itertools.cycle(("user", "assistant"))
        data[name] = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return _arena(Row(row.place, data), options, ("response_a", "response_b"), row)


def _arena_winner(row: Row) -> Any:
    """Return `winner`, or what says the same: winner_model_a, winner_model_b or winner_tie is 1."""
    if "winner" in row.data:
        return row.data["winner"]
    names = ("winner_model_a", "winner_model_b", "winner_tie")
    winners = [name for name in names if one_of(row, name, (0, 1)) == 1]
    if len(winners) != 1:
        raise invalid_row(row, f"exactly one of {', '.join(names)} must be 1", f"{len(winners)} of them")
    return winners[0].removeprefix("winner_")


def _turns(row: Row, name: str) -> list[str]:
    value = row.data[name]
    if isinstance(value, str):
        turns = inner_json(value) if value.startswith("[") else None
        value = [value] if turns is None else turns
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise invalid_row(row, f'"{name}" must be a string, or a list of strings, one per turn', json_kind(value))
    return value
