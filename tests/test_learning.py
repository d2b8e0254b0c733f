"""Loss, metrics, schedule, order of pairs: the parts of a step that need no model."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import pair_rows
from hypothesis import given
from hypothesis import strategies as st

from rmtool.config import TrainConfig
from rmtool.data.formats import preference_record
from rmtool.data.messages import Message
from rmtool.data.record import Record
from rmtool.data.rows import Row
from rmtool.dataset.batches import count_pairs, epoch_order, epoch_steps, plan_steps
from rmtool.dataset.split import hold_out
from rmtool.errors import Place, RmtoolError
from rmtool.evaluation.metrics import PairSums
from rmtool.model.loss import bradley_terry
from rmtool.tokenization.response_group import build_group
from rmtool.training.optim import build_optimizer, lr_multiplier

TRAIN = TrainConfig(batch_size=4, learning_rate=1e-3)
REWARDS = st.lists(st.tuples(st.floats(-20, 20), st.floats(-20, 20)), min_size=1, max_size=30)


def test_the_loss_is_minus_log_sigmoid_of_the_difference_less_the_margin() -> None:
    chosen, rejected, margin = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.0])
    expected = [-math.log(1 / (1 + math.exp(-(c - r - m)))) for c, r, m in ((2, 1, 0.5), (-1, 3, 0))]
    torch.testing.assert_close(bradley_terry(chosen, rejected, margin), torch.tensor(expected))
    assert bradley_terry(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(math.log(2))


def test_the_loss_stays_finite_for_huge_differences() -> None:
    assert bradley_terry(torch.tensor([-1e4]), torch.tensor([1e4])).item() == pytest.approx(2e4)


def test_a_column_of_rewards_would_broadcast_and_is_refused() -> None:
    with pytest.raises(AssertionError):
        bradley_terry(torch.zeros(3, 1), torch.zeros(3, 1))
    with pytest.raises(AssertionError):
        bradley_terry(torch.zeros(3), torch.zeros(3), torch.zeros(3, 1))


@given(REWARDS, st.data())
def test_metrics_do_not_depend_on_the_cut(pairs: list[tuple[float, float]], data: st.DataObject) -> None:
    chosen, rejected = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
    whole = PairSums.of(chosen, rejected, bradley_terry(chosen, rejected)).report("m")
    cut = data.draw(st.integers(0, len(pairs)))
    parts = PairSums()
    for part in (slice(0, cut), slice(cut, None)):
        c, r = chosen[part], rejected[part]
        parts += PairSums.from_vector(PairSums.of(c, r, bradley_terry(c, r)).vector())
    assert parts.report("m") == pytest.approx(whole)
    assert whole["m/accuracy"] == np.mean([c > r for c, r in pairs])
    assert whole["m/reward_margin"] == pytest.approx(whole["m/chosen_rewards"] - whole["m/rejected_rewards"])


def test_metric_names_are_those_the_field_reads() -> None:
    one = torch.ones(1)
    assert list(PairSums.of(one, one, one).report("eval/rm")) == [
        f"eval/rm/{name}" for name in ("accuracy", "loss", "chosen_rewards", "rejected_rewards", "reward_margin")
    ]


def test_an_equal_pair_is_a_tie_and_earns_nothing() -> None:
    one = torch.ones(1)
    sums = PairSums.of(one, one, one)
    assert (sums.correct, sums.ties) == (0.0, 1.0)


def test_warm_up_counts_optimizer_steps_once_and_the_fall_ends_at_zero() -> None:
    linear = replace(TRAIN, warmup_steps=4)
    factors = [lr_multiplier(linear, step, 10) for step in range(11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[7] == pytest.approx(0.5)
    assert factors[10] == 0.0
    cosine = replace(TRAIN, schedule="cosine")
    assert lr_multiplier(cosine, 0, 10) == 1.0
    assert lr_multiplier(cosine, 5, 10) == pytest.approx(0.5)
    assert lr_multiplier(replace(TRAIN, schedule="constant"), 9, 10) == 1.0


def test_the_optimizer_is_the_recipes_and_decays_only_matrices() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    model[0].weight.requires_grad_(True)
    optimizer = build_optimizer(model, replace(TRAIN, weight_decay=0.1, eps=1e-5))
    decays = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {(2, 3): 0.1, (2,): 0.0}
    assert all(group["eps"] == 1e-5 and group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)


def records(count: int) -> list[Record]:
    return [preference_record(Row(Place("x", n), row)) for n, row in enumerate(pair_rows(count), 1)]


def ranked(place: int) -> Record:
    """Three responses, all three pairs."""
    responses = tuple((Message("assistant", text),) for text in "abc")
    return Record(Place("r", place), (Message("user", "?"),), responses, ((0, 1), (0, 2), (1, 2)), (None, 0.5, None))


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (10, 4), (12, 4), (3, 100)])
def test_an_epoch_has_every_pair_once(count: int, batch_size: int) -> None:
    items = [*records(count), ranked(1), ranked(2)]
    groups = [build_group([[1, 2, n] for n in range(len(record.responses))]) for record in items]
    steps = list(epoch_steps([item.metadata() for item in items], groups, seed=1, epoch=0, batch_size=batch_size))
    pairs = count_pairs(item.metadata() for item in items)
    assert [sum(len(unit.preferences) for unit in step) for step in steps[:-1]] == [batch_size] * (len(steps) - 1)
    assert len(steps) == plan_steps(1, None, pairs, batch_size)
    seen = []
    for unit in (unit for step in steps for unit in step):
        for winner, loser, margin in unit.preferences:
            ids = [int(unit.group.sequences()[response][-1]) for response in (winner, loser)]
            seen.append((str(unit.metadata.place), *ids, margin))
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


@given(st.integers(0, 15), st.integers(0, 5))
def test_no_prompt_stands_on_both_sides(wanted: int, seed: int) -> None:
    items = records(25) + [replace(record, place=Place("again", 1)) for record in records(5)]
    labels = [item.metadata() for item in items]
    train, held = hold_out(labels, wanted, seed)
    assert count_pairs(labels[place] for place in held) == wanted
    assert sorted(train + held) == list(range(len(items)))
    assert not {items[place].prompt for place in train} & {items[place].prompt for place in held}


def test_records_without_a_prompt_are_held_out_one_by_one() -> None:
    items = [replace(record, prompt=()).metadata() for record in records(20)]
    train, held = hold_out(items, 5, 0)
    assert (len(train), len(held)) == (15, 5)


def test_a_hold_out_that_whole_prompts_cannot_give_is_refused() -> None:
    items = [replace(record, prompt=(Message("user", str(n % 2)),)).metadata() for n, record in enumerate(records(20))]
    with pytest.raises(RmtoolError) as caught:
        hold_out(items, 15, 0)
    assert (caught.value.id, "10 can" in caught.value.what) == ("E0308", True)


def test_steps_of_several_epochs() -> None:
    assert plan_steps(3, None, 10, 4) == 9
    assert plan_steps(3, 5, 10, 4) == 5
