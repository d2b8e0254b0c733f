"""Random batches of random tiny models, and the check that a reward does not depend on its batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from helpers import FAMILIES, VOCABULARY, build
from transformers import AutoModelForSequenceClassification

from rmtool.model.precision import computing_in
from rmtool.model.reward_model import RewardModel
from rmtool.model.rewards import compute_rewards
from rmtool.tokenization.response_group import Ids, ResponseGroup, build_group
from rmtool.ui import SilentUi

# Largest difference allowed between a reward in a batch and the same response alone, where the largest reward of the
# pool is 1. fp32: 8 units in the last place of 1; a third of it was observed. bf16: two units in the last place of 1,
# since an activation may round the other way in a different shape, in each of two layers; a seventh of it was observed
# with AMX, half of it where every part of a product is rounded. fp16 and tf32 have three bits more. Rounding grows with
# depth (README).
BOUND = {"fp32": 1e-6, "bf16": 2**-6, "fp16": 2**-9, "tf32": 2**-9}


MODELS = ("llama", "mistral_window", "qwen3")


@dataclass(frozen=True)
class Pool:
    """Sequences by prompt, and each one's reward alone; `model` is what batches are run through."""

    model: RewardModel
    prompts: tuple[tuple[Ids, ...], ...]
    rewards: dict[bytes, float]


@dataclass(frozen=True)
class Draw:
    """One batch: the responses of each group, how many tokens go into a pack, packed (shared) or padded, and whether
    packs are made of whole groups, as in training, or of single responses, as in evaluation and scoring.
    """

    groups: tuple[tuple[Ids, ...], ...]
    max_tokens: int
    shared: bool
    whole: bool = False


def sequences(seed: int) -> tuple[tuple[Ids, ...], ...]:
    """Prompts that begin alike, each with up to six responses; one response is the start of the next longer prompt."""
    rng = np.random.default_rng(seed)
    prompts = []
    for _ in range(10):
        chat = rng.integers(3, VOCABULARY, 48).astype(np.int32)
        for length in (0, 3, 11, 26, 47):
            tails = [rng.integers(3, VOCABULARY, rng.integers(1, 24)) for _ in range(rng.integers(1, 6))]
            responses = [np.concatenate((chat[:length], tail)).astype(np.int32) for tail in tails]
            prompts.append((*responses, chat[: length + 1]))
    return tuple(prompts)


@torch.no_grad()
def alone(classifier: Any, ids: Ids, precision: str = "fp32") -> float:
    """The slow twin: one response through a classifier as transformers built it; the backbone in `precision`."""
    tokens = torch.tensor(ids[None].astype(np.int64))
    with computing_in(precision, torch.device("cpu")):
        state = classifier.base_model(input_ids=tokens).last_hidden_state[0, -1]
    return float(classifier.score(state.float()))


@cache
def pool(family: str, precision: str = "fp32", rounded: bool = False) -> Pool:
    """A model whose largest reward is 1; its weights are larger than usual, so that attention is far from even.

    Args:
        rounded: to be called, and its model to be run, while forwards are rounded (`round_forwards`).
    """
    config = copy.deepcopy(FAMILIES[family])
    config.initializer_range = 0.05
    model = build(config)
    plain = AutoModelForSequenceClassification.from_config(config).eval()
    plain.load_state_dict(model.classifier.state_dict())
    prompts = sequences(0)
    flat = [ids for responses in prompts for ids in responses]
    largest = max(abs(alone(plain, ids)) for ids in flat)
    for classifier in (plain, model.classifier):
        classifier.score.weight.data /= largest
    model.precision = precision
    return Pool(model, prompts, {ids.tobytes(): alone(plain, ids, precision) for ids in flat})


def draw(pool: Pool, seed: Sequence[int]) -> Draw:
    """1 to 64 groups with 1 or more of their responses, in any order; groups and responses may come twice."""
    rng = np.random.default_rng(list(seed))
    size = rng.integers(1, 65) if rng.integers(3) == 0 else int(np.exp(rng.uniform(0, math.log(65))))
    groups = []
    for index in rng.integers(0, len(pool.prompts), size):
        responses = pool.prompts[index]
        count = rng.integers(1, len(responses) + 1)
        groups.append(tuple(responses[item] for item in rng.integers(0, len(responses), count)))
    max_tokens = int(np.exp(rng.uniform(math.log(64), math.log(8192))))
    return Draw(tuple(groups), max_tokens, bool(rng.integers(2)), bool(rng.integers(2)))


@torch.no_grad()
def rewards_of_a_step(model: RewardModel, groups: Sequence[ResponseGroup], max_tokens: int) -> list[list[float]]:
    """The rewards that a training step is computed from."""
    rewards: list[list[float]] = [[] for _ in groups]
    for items in model.plan(groups, max_tokens):
        flat = iter(model(model.collate([groups[item] for item in items])).tolist())
        for item in items:
            rewards[item] = [next(flat) for _ in groups[item].responses]
    return rewards


def check(pool: Pool, batch: Draw, bound: float | None = None) -> float:
    """The largest difference to the rewards alone; fails beyond the bound, or where the order of a pair flips.

    Every two responses of the batch are a pair, whatever their prompts, if alone they are further apart than rounding
    of both can bring them: twice the bound. In fp32 that is every two different sequences of the pool.
    """
    bound = bound or BOUND[pool.model.precision]
    pool.model.share_prompts(batch.shared)
    groups = [build_group([ids.tolist() for ids in responses]) for responses in batch.groups]
    if batch.whole:
        rewards = rewards_of_a_step(pool.model, groups, batch.max_tokens)
    else:
        rewards = compute_rewards(pool.model, groups, batch.max_tokens, SilentUi())
    assert [len(values) for values in rewards] == [len(responses) for responses in batch.groups]
    got = np.array([value for values in rewards for value in values])
    expected = np.array([pool.rewards[ids.tobytes()] for responses in batch.groups for ids in responses])
    margins = expected[:, None] - expected
    flips = (margins > 2 * bound) & (got[:, None] <= got)
    assert not flips.any(), f"{int(flips.sum())} pairs changed their order"
    worst = float(np.abs(got - expected).max())
    assert worst <= bound, f"a reward differs by {worst:.1e}"
    return worst


def check_many(pool: Pool, seeds: Sequence[tuple[int, int]]) -> float:
    worst = 0.0
    for seed in seeds:
        try:
            worst = max(worst, check(pool, draw(pool, seed)))
        except AssertionError as error:
            raise AssertionError(f"batch {seed}: {error}") from error
    return worst
