"""Rewards of any number of response groups, each distinct response computed once.

In: a `RewardModel` and response groups, which may live on disk. Out: rewards in the order given, on every rank.
Cost: one forward per pack; 250 bytes per response of millions.
"""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from rmtool.dist import SINGLE_PROCESS, DistInfo
from rmtool.errors import RmtoolError
from rmtool.model.reward_model import RewardModel
from rmtool.tokenization.pack_plan import plan_inference_packs
from rmtool.tokenization.response_group import Ids, ResponseGroup, build_group
from rmtool.ui import Bar


@torch.no_grad()
def compute_rewards(
    model: RewardModel,
    groups: Sequence[ResponseGroup],
    max_tokens: int,
    bar: Bar,
    forward_module: nn.Module | None = None,
    dist: DistInfo = SINGLE_PROCESS,
) -> list[list[float]]:
    """Rewards of every response of every group, in the order given; the same on every rank.

    Each distinct response is computed once, and each prompt once per pack that its responses fill, wherever in `groups`
    they stand. `groups` is read several times, one group at a time; it may live on disk. `bar` advances to len(groups).

    Args:
        forward_module: what to call for a forward: the model, or the engine wrapped around it.
        ranks: who shares the packs. All call this with the same groups, and run equally many forwards.

    Raises:
        RmtoolError: E0503 a pack does not fit into the device's memory.
    """
    forward_module = model if forward_module is None else forward_module
    forward_module.eval()
    lengths, starts, row_of = array("q"), array("q", [0]), array("q")
    for row, group in enumerate(groups):
        lengths.extend(len(group.prompt) + len(response) for response in group.responses)
        starts.append(len(lengths))
        row_of.extend([row] * len(group.responses))

    @functools.lru_cache(maxsize=1)
    def group_of(row: int) -> ResponseGroup:
        return groups[row]  # from a disk, it costs all its responses

    def window(item: int, start: int, stop: int) -> Ids:
        row = row_of[item]
        return group_of(row).window(item - starts[row], start, stop)

    plan = plan_inference_packs(window, lengths, max_tokens, not model.shares_prompts)
    values, done = np.zeros(len(lengths)), 0
    for first in range(0, len(plan.packs), dist.world_size):
        # A rank without a pack in the last round runs the round's first one again: all must take part.
        mine = first + dist.rank if first + dist.rank < len(plan.packs) else first
        items = plan.packs[mine]
        try:
            alone = [build_group([window(item, 0, lengths[item])]) for item in items]
            rewards = forward_module(model.collate(alone)).cpu()
        except torch.OutOfMemoryError as error:
            raise out_of_memory("--tokens-per-pack") from error
        if mine == first + dist.rank:
            values[items] = rewards
        before, done = done, min(first + dist.world_size, len(plan.packs))
        bar.advance(len(groups) * done // len(plan.packs) - len(groups) * before // len(plan.packs))
    values = dist.sum(torch.from_numpy(values)).numpy()[plan.representative]
    return [values[start:end].tolist() for start, end in itertools.pairwise(starts)]


def out_of_memory(setting: str) -> RmtoolError:
    """What to say when the device is full; `setting` is what bounds the memory."""
    return RmtoolError("E0503", "the device has not enough memory for one forward", f"lower {setting}")
