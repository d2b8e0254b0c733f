"""Order and number of the pairs in each optimizer step."""

from __future__ import annotations

import pytest
from helpers import numbered_records

from rmtool.data.record import Message, Record
from rmtool.dataset.batches import count_pairs, epoch_order, epoch_steps, plan_steps
from rmtool.errors import Place
from rmtool.tokenization.response_group import build_group


def ranked(place: int) -> Record:
    """Three responses, all three pairs."""
    responses = tuple((Message("assistant", text),) for text in "abc")
    return Record(Place("r", place), (Message("user", "?"),), responses, ((0, 1), (0, 2), (1, 2)), (None, 0.5, None))


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (10, 4), (12, 4), (3, 100)])
def test_an_epoch_has_every_pair_once(count: int, batch_size: int) -> None:
    items = [*numbered_records(count), ranked(1), ranked(2)]
    groups = [build_group([[1, 2, n] for n in range(len(record.responses))]) for record in items]
    steps = list(epoch_steps([item.metadata() for item in items], groups, seed=1, epoch=0, batch_size=batch_size))
    pairs = count_pairs(item.metadata() for item in items)
    assert [sum(len(item.preferences) for item in step) for step in steps[:-1]] == [batch_size] * (len(steps) - 1)
    assert len(steps) == plan_steps(1, None, pairs, batch_size)
    seen = []
    for item in (item for step in steps for item in step):
        for winner, loser, margin in item.preferences:
            ids = [int(item.group.sequences()[response][-1]) for response in (winner, loser)]
            seen.append((str(item.metadata.place), *ids, margin))
    expected = [
        (str(record.place), winner, loser, margin or 0.0)
        for record in items
        for (winner, loser), margin in zip(record.preferences, record.margins, strict=True)
    ]
    assert sorted(seen) == sorted(expected)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {(seed, epoch): tuple(epoch_order(seed, epoch, 50)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    assert orders[0, 1] == tuple(epoch_order(0, 1, 50))


def test_steps_of_several_epochs() -> None:
    assert plan_steps(3, None, 10, 4) == 9
    assert plan_steps(3, 5, 10, 4) == 5
