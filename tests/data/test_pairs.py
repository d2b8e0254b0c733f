"""Pairs of many responses to one prompt: a limit, drawn from the prompt alone, in little time and memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers import write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from rmtool.data.formats import preference_record
from rmtool.data.pairs import pairs_by_rating
from rmtool.data.record import MAX_PAIRS, Message, RowOptions
from rmtool.data.rejects import Rejects
from rmtool.data.rows import Row
from rmtool.data.sources import load_source
from rmtool.errors import Place

PROMPT = (Message("user", "Why?"),)


def all_pairs(ratings: list[float]) -> list[tuple[int, int]]:
    """The obvious way: any two responses with different ratings, in the order of their indices."""
    pairs = itertools.combinations(range(len(ratings)), 2)
    return [(a, b) if ratings[a] > ratings[b] else (b, a) for a, b in pairs if ratings[a] != ratings[b]]


@given(st.lists(st.integers(0, 4), max_size=12), st.integers(1, 80))
def test_pairs_are_all_of_them_or_as_many_as_the_limit(ratings: list[float], limit: int) -> None:
    expected = all_pairs(ratings)
    pairs, dropped = pairs_by_rating(ratings, limit, PROMPT)
    assert len(pairs) == min(limit, len(expected))
    assert dropped == len(expected) - len(pairs)
    assert [pair for pair in expected if pair in set(pairs)] == list(pairs)


def test_every_pair_is_drawn_equally_often_and_prompts_draw_different_ones() -> None:
    ratings = [float(number // 2) for number in range(20)]
    drawn = [pairs_by_rating(ratings, 18, (Message("user", str(n)),))[0] for n in range(2000)]
    counts = Counter(itertools.chain.from_iterable(drawn))
    assert counts.keys() == set(all_pairs(ratings))
    assert min(counts.values()) > 140  # expected: 200, with a standard deviation of 13
    assert max(counts.values()) < 260
    assert len(set(drawn)) == 2000


def test_the_draw_is_that_of_every_machine() -> None:
    pairs, dropped = pairs_by_rating(list(range(100)), 4, PROMPT)
    assert (pairs, dropped) == (DRAWN, 4946)
    code = "from rmtool.data.pairs import *; print(pairs_by_rating(range(100), 4, (('user', 'Why?', ''),))[0])"
    for seed in ("1", "2"):
        shown = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        )
        assert shown.stdout.strip() == str(DRAWN), shown.stderr


DRAWN = ((96, 5), (86, 11), (91, 11), (96, 46))


def rows_of(count: int, ratings: int) -> dict[str, list[dict[str, Any]]]:
    """One prompt with `count` responses, in every format that makes pairs of them."""
    texts = [f"Response {number}." for number in range(count)]
    scores = [number * 7919 % ratings for number in range(count)]
    rated = list(zip(texts, scores, strict=True))
    good, bad = ([text for text, score in rated if bool(score) == wanted] for wanted in (True, False))
    others = [{"answer": text} for text in texts]
    completions = [{"response": text, "overall_score": score} for text, score in rated]
    return {
        "rated rows": [{"prompt": "Why?", "response": text, "rating": score} for text, score in rated],
        "rated responses": [{"prompt": "Why?", "responses": texts, "ratings": scores}],
        "ranked responses": [{"prompt": "Why?", "responses": texts, "ranks": scores}],
        "Nectar": [{"prompt": "Why?", "answers": [{"answer": text, "rank": score} for text, score in rated]}],
        "UltraFeedback": [{"instruction": "Why?", "completions": completions}],
        "lists": [{"prompt": "Why?", "chosen": good, "rejected": bad}],
        "RMB, best of N": [{"conversation_input": "Why?", "bon_best": {"answer": "x"}, "loser_list": others}],
    }


@pytest.mark.parametrize("kind", rows_of(4, 2))
def test_thousands_of_responses_to_one_prompt_need_little_memory(kind: str, tmp_path: Path) -> None:
    count, ratings = 4000, 4000 if kind != "lists" else 2
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(count, ratings)[kind])
    tracemalloc.start()
    loaded = load_source(str(path), RowOptions(), Rejects())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    total = {"lists": 2000 * 2000, "RMB, best of N": 4000}.get(kind, 4000 * 3999 // 2)
    assert (len(loaded.metadata), len(loaded.metadata[0].preferences)) == (1, MAX_PAIRS)
    assert loaded.count.dropped_pairs == total - MAX_PAIRS
    assert peak < 40e6


@pytest.mark.parametrize("kind", [kind for kind in rows_of(4, 2) if kind != "rated rows"])
def test_all_pairs_below_the_limit_are_made_in_every_format(kind: str) -> None:
    (row,) = rows_of(6, 2)[kind]
    record = preference_record(Row(Place("x"), row))
    expected = 6 if kind.startswith("RMB") else 9
    assert (len(record.preferences), record.dropped_pairs) == (expected, 0)
    for limit in (1, 5):
        limited = preference_record(Row(Place("x"), row), RowOptions(rating_margins=True, max_pairs=limit))
        assert set(limited.preferences) < set(record.preferences)
        assert (len(limited.preferences), len(limited.margins), limited.dropped_pairs) == (
            limit,
            limit,
            expected - limit,
        )


def test_the_number_of_dropped_pairs_is_kept_in_the_cache(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(10, 10)["rated rows"])
    for limit, dropped in ((5, 40), (5, 40), (45, 0)):
        loaded = load_source(str(path), RowOptions(max_pairs=limit), Rejects(), use_cache=True)
        assert loaded.count.dropped_pairs == dropped
        assert len(loaded.metadata[0].preferences) == 45 - dropped
