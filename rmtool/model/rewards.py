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
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from rmtool.dist import SINGLE_PROCESS, DistInfo
from rmtool.model.out_of_memory import PackOutOfMemoryError, unless_out_of_memory
from rmtool.model.overflow import Ranges, all_finite
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
        launched = unless_out_of_memory(functools.partial(_Launched.start, model, module, batch))
        if waiting:  # before the error of this launch, which may be one of the kernels of the pack before
            yield waiting()
        if launched is None:
            raise _out_of_memory(responses, items)
        waiting = functools.partial(_fetch, model, module, responses, items, own, launched)
    if waiting:
        yield waiting()


@dataclass(frozen=True)
class _Launched:
    """A forward that has been started, and the copy of its rewards to the CPU.

    copied: float32[N], valid when `arrived` says so; with `ranges` one more, 0 where fp16 has overflowed
    ranges:   outputs of the layers, where they are watched
    """

    batch: Batch
    copied: torch.Tensor
    arrived: torch.Event | None
    ranges: Ranges | None

    @classmethod
    def start(cls, model: RewardModel, module: nn.Module, batch: Batch) -> _Launched:
        batch = to_device(batch, model.device)
        with model.overflow_guard.watch() if model.precision == "fp16" else nullcontext() as ranges:
            rewards_N = module(batch)
        if ranges is not None:
            rewards_N = torch.cat((rewards_N, all_finite(ranges).float()[None]))
        copied = rewards_N.to("cpu", non_blocking=True)
        arrived = None if rewards_N.device.type == "cpu" else torch.Event(rewards_N.device)
        if arrived:
            arrived.record()
        return cls(batch, copied, arrived, ranges)

    def fetch(self) -> list[float]:
        if self.arrived:
            self.arrived.synchronize()
        return self.copied.tolist()


def _fetch(
    model: RewardModel,
    module: nn.Module,
    responses: _Responses,
    items: Sequence[int],
    own: bool,
    launched: _Launched,
) -> tuple[Sequence[int], bool, list[float]]:
    rewards = unless_out_of_memory(launched.fetch)
    if rewards is None:
        raise _out_of_memory(responses, items)
    if launched.ranges is None or rewards.pop():
        return items, own, rewards
    rewards = _repeat_in_fp32(model, module, responses, items, launched.batch)
    model.overflow_guard.repeated += 1
    if all(map(math.isfinite, rewards)):  # else it is not fp16 that fails
        model.overflow_guard.adapt(launched.ranges)
    return items, own, rewards


def _repeat_in_fp32(
    model: RewardModel, module: nn.Module, responses: _Responses, items: Sequence[int], batch: Batch
) -> list[float]:
    """Compute the rewards of a pack in fp32; one by one where there is no memory for the pack."""

    def compute(batch: Batch) -> list[float]:
        found = unless_out_of_memory(lambda: module(batch).tolist())
        if found is not None:
            return found
        if len(batch.reward_index) == 1:
            raise _out_of_memory(responses, items)
        singles = (model.build_batch([responses.as_group(item)]) for item in items)
        return [reward for single in singles for reward in compute(to_device(single, model.device))]

    with model.in_fp32():
        return compute(batch)


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
