"""Rewards of any number of response groups, each distinct response computed once.

In: a `RewardModel` and response groups, which may be on disk. Out: rewards in the order given, on every rank.
Cost: one forward per pack; 250 bytes per response of millions.
"""

from __future__ import annotations

import functools
import itertools
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn

from rmtool.dist import SINGLE_PROCESS, DistInfo
from rmtool.model.out_of_memory import PackOutOfMemoryError, unless_out_of_memory
from rmtool.model.overflow import all_finite
from rmtool.model.reward_model import RewardModel
from rmtool.packing.packs import Batch
from rmtool.packing.transfer import to_device
from rmtool.tokenization.pack_plan import plan_inference_packs
from rmtool.tokenization.response_group import Ids, ResponseGroup, build_group
from rmtool.ui import Bar


class AbandonedError(Exception):
    """The computation was abandoned between two forwards, by all ranks."""


@torch.no_grad()
def compute_rewards(
    model: RewardModel,
    groups: Sequence[ResponseGroup],
    max_tokens: int,
    bar: Bar,
    forward_module: nn.Module | None = None,
    dist: DistInfo = SINGLE_PROCESS,
    interrupt: Callable[[], bool] | None = None,
) -> list[list[float]]:
    """Compute the reward of every response of every group, in the order given; the same on every rank.

    Each distinct response is computed once, and each prompt once per pack that its responses fill, wherever in `groups`
    they are. `groups` is iterated several times, one group at a time. `bar` advances to len(groups).

    Args:
        max_tokens: most unique tokens of a pack.
        forward_module: what to call for a forward: the model, or the engine that wraps it.
        dist: the processes that divide the packs. All call this with the same groups, and run equally many forwards.
        interrupt: asked before each forward whether to abandon the computation; the same answer on every rank.

    Raises:
        AbandonedError: when `interrupt` says so.
        RmtoolError: E0503 out of memory.
    """
    forward_module = model if forward_module is None else forward_module
    forward_module.eval()
    responses = _Responses(groups)
    plan = plan_inference_packs(responses.window, responses.lengths, max_tokens, not model.shares_prompts)
    rewards_N, done = np.zeros(len(responses.lengths)), 0
    packs = _own_packs(plan.packs, dist, interrupt)
    for items, own, rewards in _run_packs(model, forward_module, responses, packs):
        if own:
            rewards_N[items] = rewards
        before, done = done, min(done + dist.world_size, len(plan.packs))
        bar.advance(len(groups) * done // len(plan.packs) - len(groups) * before // len(plan.packs))
    rewards_N = dist.sum(torch.from_numpy(rewards_N)).numpy()[plan.representative]
    return [rewards_N[start:end].tolist() for start, end in itertools.pairwise(responses.starts)]


def _own_packs(
    packs: Sequence[Sequence[int]], dist: DistInfo, interrupt: Callable[[], bool] | None
) -> Iterator[tuple[Sequence[int], bool]]:
    """Yield this rank's pack of each round, and whether no other rank has it, until it is interrupted."""
    for first in range(0, len(packs), dist.world_size):
        if interrupt and interrupt():
            raise AbandonedError
        # A rank without a pack in the last round runs the round's first one again: all must take part.
        own = first + dist.rank
        yield (packs[own], True) if own < len(packs) else (packs[first], False)


def _run_packs(
    model: RewardModel, module: nn.Module, responses: _Responses, packs: Iterator[tuple[Sequence[int], bool]]
) -> Iterator[tuple[Sequence[int], bool, list[float]]]:
    """Yield each pack with its rewards. The next pack is built and its forward launched before they are waited for."""
    waiting: Callable[[], tuple[Sequence[int], bool, list[float]]] | None = None
    for items, own in packs:
        batch = model.build_batch([responses.as_group(item) for item in items])
        fetch = unless_out_of_memory(functools.partial(_launch, model, module, batch))
        if waiting:  # before the error of this launch, which may be one of the kernels of the pack before
            yield waiting()
        if fetch is None:
            raise _out_of_memory(responses, items)
        waiting = functools.partial(_fetch, responses, items, own, fetch)
    if waiting:
        yield waiting()


def _launch(model: RewardModel, module: nn.Module, batch: Batch) -> Callable[[], list[float]]:
    """Start a forward and the copy of its rewards to the CPU; return what waits for them. Where fp16 has overflowed, it
    computes them again in fp32.
    """
    batch = to_device(batch, model.device)
    with model.overflow_guard.watch() if model.precision == "fp16" else nullcontext() as ranges:
        rewards_N = module(batch)
    if ranges is not None:
        rewards_N = torch.cat((rewards_N, all_finite(ranges).float()[None]))
    copied_N = rewards_N.to("cpu", non_blocking=True)
    arrived = None if rewards_N.device.type == "cpu" else torch.Event(rewards_N.device)
    if arrived:
        arrived.record()

    def fetch() -> list[float]:
        if arrived:
            arrived.synchronize()
        rewards = copied_N.tolist()
        if ranges is None or rewards.pop():
            return rewards
        with model.in_fp32():
            rewards = module(batch).tolist()
        model.overflow_guard.repeated += 1
        if all(map(math.isfinite, rewards)):  # else it is not fp16 that fails
            model.overflow_guard.adapt(ranges)
        return rewards

    return fetch


def _fetch(
    responses: _Responses, items: Sequence[int], own: bool, fetch: Callable[[], list[float]]
) -> tuple[Sequence[int], bool, list[float]]:
    rewards = unless_out_of_memory(fetch)
    if rewards is None:
        raise _out_of_memory(responses, items)
    return items, own, rewards


def _out_of_memory(responses: _Responses, items: Sequence[int]) -> PackOutOfMemoryError:
    return PackOutOfMemoryError([responses.group_index(item) for item in items], responses.tokens(items))


class _Responses:
    """The responses of all groups, numbered through.

    lengths: tokens of each response with its prompt
    starts:  the number of each group's first response, and that of all responses
    """

    def __init__(self, groups: Sequence[ResponseGroup]):
        self.lengths, self.starts, self._group_index = array("q"), array("q", [0]), array("q")
        for index, group in enumerate(groups):
            self.lengths.extend(len(group.prompt) + len(response) for response in group.responses)
            self.starts.append(len(self.lengths))
            self._group_index.extend([index] * len(group.responses))
        self._group = functools.lru_cache(maxsize=1)(groups.__getitem__)  # from disk, one costs all its responses

    def window(self, item: int, start: int, stop: int) -> Ids:
        """Ids [start, stop) of one response with its prompt."""
        index = self._group_index[item]
        return self._group(index).window(item - self.starts[index], start, stop)

    def as_group(self, item: int) -> ResponseGroup:
        return build_group([self.window(item, 0, self.lengths[item])])

    def tokens(self, items: Sequence[int]) -> int:
        """The tokens of these responses, each with its prompt."""
        return sum(self.lengths[item] for item in items)

    def group_index(self, item: int) -> int:
        return self._group_index[item]
