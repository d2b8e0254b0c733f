"""The metrics are sums over pairs: however pairs are divided, they are the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmtool.dist import SINGLE_PROCESS
from rmtool.evaluation.metrics import PairSums, sum_pairs
from rmtool.model.loss import bradley_terry

REWARDS = st.lists(st.tuples(st.floats(-20, 20), st.floats(-20, 20)), min_size=1, max_size=30)


@given(REWARDS, st.data())
def test_metrics_do_not_depend_on_the_cut(pairs: list[tuple[float, float]], data: st.DataObject) -> None:
    chosen, rejected = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
    whole = PairSums.of(chosen, rejected, bradley_terry(chosen, rejected)).report("m")
    cut = data.draw(st.integers(0, len(pairs)))
    parts = PairSums()
    for part in (slice(0, cut), slice(cut, None)):
        c, r = chosen[part], rejected[part]
        parts += PairSums.reduce(sum_pairs(c, r, bradley_terry(c, r)), SINGLE_PROCESS)
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
