"""Held-out pairs: by prompt, in a number that can be had."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import numbered_records
from hypothesis import given
from hypothesis import strategies as st

from rmtool.data.record import Message
from rmtool.dataset.batches import count_pairs
from rmtool.dataset.split import hold_out
from rmtool.errors import Place, RmtoolError


@given(st.integers(0, 15), st.integers(0, 5))
def test_no_prompt_stands_on_both_sides(wanted: int, seed: int) -> None:
    items = numbered_records(25) + [replace(record, place=Place("again", 1)) for record in numbered_records(5)]
    labels = [item.metadata() for item in items]
    train, held = hold_out(labels, wanted, seed)
    assert count_pairs(labels[place] for place in held) == wanted
    assert sorted(train + held) == list(range(len(items)))
    assert not {items[place].prompt for place in train} & {items[place].prompt for place in held}


def test_records_without_a_prompt_are_held_out_one_by_one() -> None:
    items = [replace(record, prompt=()).metadata() for record in numbered_records(20)]
    train, held = hold_out(items, 5, 0)
    assert (len(train), len(held)) == (15, 5)


def test_a_hold_out_that_whole_prompts_cannot_give_is_refused() -> None:
    items = [
        replace(record, prompt=(Message("user", str(n % 2)),)).metadata()
        for n, record in enumerate(numbered_records(20))
    ]
    with pytest.raises(RmtoolError) as caught:
        hold_out(items, 15, 0)
    assert (caught.value.id, "10 is possible" in caught.value.what) == ("E0308", True)


@pytest.mark.parametrize("prompts", [1, 9])
def test_a_fraction_that_holds_out_nothing_is_refused(prompts: int) -> None:
    """One prompt with more pairs than are wanted, and a fraction below one pair."""
    items = [
        replace(record, prompt=(Message("user", str(n % prompts)),)).metadata()
        for n, record in enumerate(numbered_records(9))
    ]
    with pytest.raises(RmtoolError) as caught:
        hold_out(items, 1.8 / 9 if prompts == 1 else 0.1, 0)
    assert caught.value.id == "E0308"
