"""Fidelity: how far rewards in half precision are from those in fp32, measured on a sample of the user's responses.

In: a `RewardModel` as `load_for_inference(fidelity=True)` loads it, and response groups. Out: the rewards of all
responses, and a `Fidelity` of the sample: the responses whose ids have the lowest hashes, the same in every order.
Cost: the sample in fp32, and one hash of every response; where there is much to compute, compiling (`compiling.py`).
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rmtool.model.compiling import choose_compiled, estimate_tokens
from rmtool.model.out_of_memory import PackOutOfMemoryError
from rmtool.model.reward_model import RewardModel
from rmtool.model.rewards import compute_rewards
from rmtool.tokenization.response_group import ResponseGroup, build_group
from rmtool.ui import Bar, SilentUi

SAMPLE = 64  # responses
TRIAL_LENGTH = 64  # tokens of a sequence that is compiled as a trial
SHARE, SMALLEST = 32, 8  # the default sample is at most a 32nd of the responses, and none below 8


@dataclass(frozen=True)
class Fidelity:
    """Differences between the rewards of a sample and the same in fp32.

    responses: their number
    std:       standard deviation of the fp32 rewards
    rms, max:  root mean square and largest difference, in standard deviations
    pairs:     pairs of any two responses with different rewards in fp32
    reordered: those of them that have the opposite order, or equal rewards
    """

    responses: int
    std: float
    rms: float
    max: float
    pairs: int
    reordered: int

    def as_dict(self) -> dict[str, Any]:
        """Return the form in JSON; null for what a sample without spread does not have."""
        return {name: value if np.isfinite(value) else None for name, value in asdict(self).items()}

    def __str__(self) -> str:
        if not self.std:
            return f"not measurable (no spread in the finite fp32 rewards of {self.responses} responses)"
        return (
            f"rms {self.rms:.2g}, max {self.max:.2g} standard deviations from fp32; {self.reordered:,} of "
            f"{self.pairs:,} pairs in a different order ({self.responses} responses)"
        )


def compare(exact: Sequence[float], rewards: Sequence[float]) -> Fidelity:
    """Compare rewards with those of the same responses in fp32; pairs of rewards that are NaN or inf are left out."""
    both = np.array([exact, rewards], dtype=np.float64)
    exact_N, rewards_N = both[:, np.isfinite(both).all(0)]
    off_N, std = rewards_N - exact_N, float(exact_N.std()) if len(exact_N) else 0.0
    rms, largest = (float(np.sqrt((off_N**2).mean())), float(np.abs(off_N).max())) if len(off_N) else (0.0, 0.0)
    first, second = np.triu_indices(len(exact_N), 1)
    order = np.sign(exact_N[first] - exact_N[second])
    reordered = int((order * (rewards_N[first] - rewards_N[second]) <= 0)[order != 0].sum())
    scale = std or np.nan
    return Fidelity(len(exact_N), std, rms / scale, largest / scale, int((order != 0).sum()), reordered)


def sample_size(requested: int | None, responses: int) -> int:
    """The number of sampled responses where `requested` are asked for, None by default."""
    if requested is not None:
        return min(requested, responses)
    size = min(SAMPLE, responses // SHARE)
    return size if size >= SMALLEST else 0


@dataclass(frozen=True)
class Sample:
    """Sampled responses: the group and number of each in the data, and their rewards in fp32."""

    places: tuple[tuple[int, int], ...]
    exact: tuple[float, ...]

    def compare(self, rewards: Sequence[Sequence[float]]) -> Fidelity:
        """Compare the rewards of all responses with those of the sample."""
        return compare(self.exact, [rewards[group][number] for group, number in self.places])


def choose_sample(groups: Sequence[ResponseGroup], size: int) -> list[tuple[int, int]]:
    """Return group and number of the `size` different responses with the lowest hashes."""
    found = dict[bytes, tuple[int, int]]()
    for index, group in enumerate(groups):
        prompt = hashlib.blake2b(group.prompt.tobytes(), digest_size=16)
        for number, response in enumerate(group.responses):
            each = prompt.copy()
            each.update(response.tobytes())
            found.setdefault(each.digest(), (index, number))
        if len(found) > 1000 + 2 * size:
            found = {digest: found[digest] for digest in heapq.nsmallest(size, found)}
    return [found[digest] for digest in heapq.nsmallest(size, found)]


def sample_in_fp32(model: RewardModel, groups: Sequence[ResponseGroup], max_tokens: int, size: int) -> Sample | None:
    """Compute the rewards of a sample in fp32; None without one, and where fp32 is out of memory."""
    places = choose_sample(groups, size) if size else []
    if not places:
        return None
    sampled = [build_group([groups[index].sequence(number)]) for index, number in places]
    for limit in (max_tokens, 1):  # together, else one by one
        try:
            with model.in_fp32():
                rewards = compute_rewards(model, sampled, limit, SilentUi())
        except PackOutOfMemoryError:
            continue
        return Sample(tuple(places), tuple(reward for (reward,) in rewards))
    return None


def rewards_with_fidelity(
    model: RewardModel, groups: Sequence[ResponseGroup], max_tokens: int, bar: Bar, requested: int | None = None
) -> tuple[list[list[float]], Fidelity | None]:
    """Compute the reward of every response, as `compute_rewards` does, and their fidelity where the model computes in
    less than fp32.

    Args:
        requested: responses in the sample; see `sample_size`.
    """
    responses = sum(len(group.responses) for group in groups)
    size = 0 if model.precision == "fp32" else sample_size(requested, responses)
    sample = sample_in_fp32(model, groups, max_tokens, size)
    model.round_weights()
    # After the sample, whose fp32 forwards would be compiled, too.
    choose_compiled(model, "auto", estimate_tokens(groups), TRIAL_LENGTH, training=False)
    rewards = compute_rewards(model, groups, max_tokens, bar)
    return rewards, sample.compare(rewards) if sample else None
