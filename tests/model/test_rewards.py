"""Rewards do not depend on the batch: random batches against each response alone through transformers.

What is exact: the ids that are compared, and the order of every pair in fp32. What is only equal up to rounding: the
rewards, within `BOUND`, because other shapes add the same products in another order.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from random_batches import BOUND, MODELS, check_many, draw, pool
from rounding import round_forwards

from rmtool.model.rewards import compute_rewards
from rmtool.tokenization.response_group import build_group
from rmtool.ui import SilentUi


def test_the_pool_has_what_the_batches_are_to_be_tested_on() -> None:
    for family in MODELS:
        rewards = np.sort(list(pool(family).rewards.values()))
        assert np.diff(rewards).min() > 4 * BOUND["fp32"]  # so every pair's order is tested
        assert np.abs(rewards).max() == pytest.approx(1)
    batches = [draw(pool("llama"), (0, index)) for index in range(250)]
    sizes = [len(batch.groups) for batch in batches]
    assert (min(sizes), max(sizes)) == (1, 64)
    assert len({(batch.shared, batch.whole) for batch in batches}) == 4
    assert {len(responses) for batch in batches for responses in batch.groups} == set(range(1, 7))
    whole = batches[sizes.index(64)].groups
    assert len({tuple(ids.tobytes() for ids in responses) for responses in whole}) < len(whole)
    texts = sorted(ids.tobytes() for responses in whole for ids in responses)
    assert any(b.startswith(a) and a != b for a, b in itertools.pairwise(texts))


@pytest.mark.parametrize("family", MODELS)
def test_rewards_do_not_depend_on_the_batch(family: str) -> None:
    check_many(pool(family), [(9, index) for index in range(20)])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_rewards_do_not_depend_on_the_batch_in_1000_batches(family: str, part: int) -> None:
    check_many(pool(family), [(part, index) for index in range(250)])


@pytest.mark.parametrize("family", MODELS)
def test_bf16_rewards_stay_within_their_bound(family: str, rounded: bool) -> None:
    check_many(pool(family, "bf16", rounded), [(9, index) for index in range(10)])


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_rewards_of_10_bits_stay_within_their_bound(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of a product rounded: no CPU has tf32, and few have fp16."""
    round_forwards(monkeypatch)
    check_many(pool("llama", precision, rounded=True), [(9, index) for index in range(10)])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_rounded_rewards_stay_within_their_bound_in_100_batches(family: str, precision: str, rounded: bool) -> None:
    check_many(pool(family, precision, rounded), [(0, index) for index in range(100)])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", MODELS)
def test_half_precision_rewards_are_near_those_of_fp32(family: str, precision: str) -> None:
    exact, half = (np.array(list(pool(family, each).rewards.values())) for each in ("fp32", precision))
    assert np.abs(exact - half).max() < 2 * BOUND[precision]


def test_bf16_rounds_the_backbone_and_not_the_reward() -> None:
    """A head in bf16 would stay within the bound here, but put rewards near 4 on a grid of 0.03."""
    half = pool("llama", "bf16")
    half.model.share_prompts(True)
    groups = [build_group([ids.tolist()]) for responses in half.prompts for ids in responses]
    rewards = torch.tensor(compute_rewards(half.model, groups, 4096, SilentUi()))
    assert (rewards != rewards.bfloat16()).float().mean() > 0.9
