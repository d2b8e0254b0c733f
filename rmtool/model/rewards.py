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

from rmtool.dist import ALONE, Ranks
from rmtool.errors import RmtoolError
from rmtool.model.reward_model import RewardModel
from rmtool.tokenization.pack_plan import plan_reads
from rmtool.tokenization.response_group import Ids, TokenTree, build_tree
from rmtool.ui import Bar


@torch.no_grad()
def compute_rewards(
    model: RewardModel,
    trees: Sequence[TokenTree],
    budget: int,
    bar: Bar,
    run: nn.Module | None = None,
    ranks: Ranks = ALONE,
) -> list[list[float]]:
    """Rewards of every response of every tree, in the order given; the same on every rank.

    Each distinct response is computed once, and each prompt once per pack that its responses fill, wherever in `trees`
    they stand. `trees` is read several times, one tree at a time; it may live on disk. `bar` advances to len(trees).

    Args:
        run: what to call for a forward: the model, or the engine wrapped around it.
        ranks: who shares the packs. All call this with the same trees, and run equally many forwards.

    Raises:
        RmtoolError: E0503 a pack does not fit into the device's memory.
    """
    run = model if run is None else run
    run.eval()
    lengths, starts, row_of = array("q"), array("q", [0]), array("q")
    for row, tree in enumerate(trees):
        lengths.extend(len(tree.prompt) + len(response) for response in tree.responses)
        starts.append(len(lengths))
        row_of.extend([row] * len(tree.responses))

    @functools.lru_cache(maxsize=1)
    def tree_of(row: int) -> TokenTree:
        return trees[row]  # from a disk, it costs all its responses

    def window(item: int, start: int, stop: int) -> Ids:
        row = row_of[item]
        return tree_of(row).window(item - starts[row], start, stop)

    plan = plan_reads(window, lengths, budget, not model.shares_prompts)
    values, done = np.zeros(len(lengths)), 0
    for first in range(0, len(plan.packs), ranks.world):
        # A rank without a pack in the last round runs the round's first one again: all must take part.
        mine = first + ranks.rank if first + ranks.rank < len(plan.packs) else first
        items = plan.packs[mine]
        try:
            alone = [build_tree([window(item, 0, lengths[item])]) for item in items]
            rewards = run(model.collate(alone)).cpu()
        except torch.OutOfMemoryError as error:
            raise out_of_memory("--tokens-per-pack") from error
        if mine == first + ranks.rank:
            values[items] = rewards
        before, done = done, min(first + ranks.world, len(plan.packs))
        bar.advance(len(trees) * done // len(plan.packs) - len(trees) * before // len(plan.packs))
    values = ranks.sum(torch.from_numpy(values)).numpy()[plan.same]
    return [values[start:end].tolist() for start, end in itertools.pairwise(starts)]


def out_of_memory(setting: str) -> RmtoolError:
    """What to say when the device is full; `setting` is what bounds the memory."""
    return RmtoolError("E0503", "the device has not enough memory for one forward", f"lower {setting}")
