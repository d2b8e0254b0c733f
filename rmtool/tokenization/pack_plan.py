"""Which response groups, or single responses, share a forward pass: packs within a token limit, of equal cost.

In: response groups, or windows of id sequences, and a limit in tokens. Out: lists of indices. No torch.
Cost: planning a step is O(n log n) in its groups, and reads each prompt a few times.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rmtool.tokenization.prefix_forest import Window, prefix_order
from rmtool.tokenization.response_group import TokenTree

# The kernel for GPUs gathers every node's keys: a long prompt with very many short responses would have few tokens and
# no end of keys.
KEYS_PER_TOKEN = 16


EVEN = 1.005  # packs are even enough when the heaviest costs so many times the mean


def plan_packs(
    trees: Sequence[TokenTree], budget: int, multiple: int = 1, padded: bool = False, key_cost: float = 0.0
) -> list[list[int]]:
    """Cut a step's trees into packs of at most `budget` tokens each, their number a multiple of `multiple` (the ranks).

    Trees that share most of a prompt stay together, as far as the budget allows. A tree over the budget gets a pack of
    its own: the budget bounds memory as far as cutting can. Where there are fewer trees than packs, the last packs stay
    empty; the caller runs something in them with weight zero. `padded` counts a pack as rows times its longest row, as
    `pad` will build it, instead of unique tokens.

    Packs are made to cost alike, so that ranks finish together: a token costs 1, and what attention adds for each key
    that it asks costs `key_cost`.

    Returns each pack's tree indices in ascending order: a plan depends on nothing but its arguments.
    """
    sizes = [(len(tree.responses), tree.longest) for tree in trees]
    packs = _by_length_for(sizes, budget, multiple) if padded else _evenly(trees, budget, multiple, key_cost)
    packs += [[] for _ in range(-len(packs) % multiple)]
    return [sorted(items) for items in packs]


def _evenly(trees: Sequence[TokenTree], budget: int, multiple: int, key_cost: float) -> list[list[int]]:
    """As few packs as keep the budget, of about the same cost."""
    if multiple == 1:
        whole = sum(tree.unique_tokens for tree in trees) <= budget
        return [list(range(len(trees)))] if whole else _even(trees, budget, 1, key_cost, budget)[1]
    # Large groups of trees share most, small ones can be shared out evenly: what has the lightest heaviest pack.
    share = -(-pack_tokens(trees) // multiple)
    limits = sorted({min(budget, max(1, share // parts)) for parts in (1, 2, 4)}, reverse=True)
    return min((_even(trees, budget, multiple, key_cost, limit) for limit in limits), key=lambda plan: plan[0])[1]


def _even(
    trees: Sequence[TokenTree], budget: int, multiple: int, key_cost: float, limit: int
) -> tuple[float, list[list[int]]]:
    """The same with groups of at most `limit` tokens: what its packs cost a rank at most, and the packs."""
    groups = _relatives(trees, limit)
    sizes = [pack_tokens([trees[item] for item in group]) for group in groups]
    keys = [sum(key_count(trees[item]) for item in group) for group in groups]
    costs = [size + key_cost * asked for size, asked in zip(sizes, keys, strict=True)]
    count = _round_up(min(len(sizes), -(-sum(sizes) // budget)), multiple)
    packs = _spread(costs, count)
    while any(len(items) > 1 and sum(sizes[item] for item in items) > budget for items in packs):
        count = _round_up(count + max(1, count // 16), multiple)
        packs = _spread(costs, count)
    heaviest = max(sum(costs[item] for item in items) for items in packs)
    return heaviest * (len(packs) // multiple), [[item for group in items for item in groups[group]] for items in packs]


def key_count(tree: TokenTree) -> int:
    """Keys that the tree's tokens ask, each those before it on its path and itself."""
    prompt = len(tree.prompt)
    lengths = [len(response) for response in tree.responses]
    return prompt * (prompt + 1) // 2 + sum(length * prompt + length * (length + 1) // 2 for length in lengths)


def pack_tokens(trees: Sequence[TokenTree]) -> int:
    """Tokens of the trees in one pack."""
    if len(trees) == 1:
        return trees[0].unique_tokens
    sequences = [ids for tree in trees for ids in tree.sequences()]
    order = prefix_order(lambda item, start, stop: sequences[item][start:stop], len(sequences))
    return sum(len(sequences[item]) - shared for item, shared in order)


def _relatives(trees: Sequence[TokenTree], limit: int) -> list[list[int]]:
    """Trees that share more than half of the shorter prompt, in groups of at most about `limit` tokens."""
    firsts = [tree.sequence(0) for tree in trees]
    order = prefix_order(lambda item, start, stop: firsts[item][start:stop], len(trees))
    groups: list[list[int]] = []
    last, size = -1, 0  # size: the last group's tokens; what its trees share beyond the prompt is not known here
    for item, shared in order:
        cost = trees[item].unique_tokens
        half = min(len(tree.prompt) or tree.longest for tree in (trees[last], trees[item])) / 2
        if shared > half and size + cost - shared <= limit:
            groups[-1].append(item)
            size += cost - min(shared, cost)
        else:
            groups.append([item])
            size = cost
        last = item
    return groups


def _spread(costs: Sequence[float], count: int) -> list[list[int]]:
    """Items in `count` packs, the costliest first, each to the lightest pack; then moved and exchanged until that
    makes the heaviest pack no lighter.
    """
    packs: list[list[int]] = [[] for _ in range(count)]
    heap = [(0.0, index) for index in range(count)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, lightest = heapq.heappop(heap)
        packs[lightest].append(item)
        heapq.heappush(heap, (load + costs[item], lightest))
    loads = [sum(costs[item] for item in items) for items in packs]
    while _lighten(packs, loads, costs):
        pass
    return packs


def _lighten(packs: list[list[int]], loads: list[float], costs: Sequence[float]) -> bool:
    """Make the heaviest pack lighter, by giving an item to the first pack for which that helps, or exchanging one;
    says whether it could.
    """
    order = sorted(range(len(packs)), key=lambda pack: (loads[pack], pack))
    heavy = order[-1]
    if loads[heavy] * len(loads) <= EVEN * sum(loads):
        return False
    for light in order[:-1]:
        gap = loads[heavy] - loads[light]
        # What goes over, less what comes back, should be half the gap: then both end alike.
        exchanges: list[tuple[float, int, int | None]] = [(costs[mine], mine, None) for mine in packs[heavy]]
        exchanges += [(costs[mine] - costs[other], mine, other) for mine in packs[heavy] for other in packs[light]]
        change, mine, other = min(exchanges, key=lambda exchange: abs(exchange[0] - gap / 2))
        if not 0.01 * gap < change < 0.99 * gap:
            continue
        packs[heavy].remove(mine)
        packs[light].append(mine)
        if other is not None:
            packs[light].remove(other)
            packs[heavy].append(other)
        loads[heavy], loads[light] = loads[heavy] - change, loads[light] + change
        return True
    return False


def _by_length_for(sizes: Sequence[tuple[int, int]], budget: int, multiple: int) -> list[list[int]]:
    """The same, in so many packs that every rank has some, if there are rows for that: a smaller budget makes more."""
    packs = _by_length(sizes, budget)
    wanted = min(_round_up(len(packs), multiple), len(sizes))
    while len(packs) < wanted and budget > 1:
        budget = budget * 9 // 10
        packs = _by_length(sizes, budget)
    return packs


def _by_length(sizes: Sequence[tuple[int, int]], budget: int) -> list[list[int]]:
    """Neighbours in length share a pack, so that little of it is padding; a size is (rows, longest row)."""
    packs: list[list[int]] = []
    rows = longest = 0
    for item in sorted(range(len(sizes)), key=lambda index: (-sizes[index][1], index)):
        rows += sizes[item][0]
        if not packs or rows * longest > budget:
            packs.append([])
            rows, longest = sizes[item]
        packs[-1].append(item)
    return packs


@dataclass(frozen=True)
class ReadPlan:
    """Which sequences to read together; `same[i]` is the one to read for sequence i (itself, or an equal one)."""

    packs: list[list[int]]
    same: np.ndarray


def plan_reads(read: Window, lengths: Sequence[int], budget: int, padded: bool = False) -> ReadPlan:
    """Cut any number of sequences, each read once and alone, into packs of at most `budget` tokens.

    Sequences with the same beginning become neighbours and share it within their pack, wherever they stood in the
    input; equal ones are read once. Holds some 20 MB, or 250 bytes per sequence of millions.

    Args:
        read: gives a sequence's ids [start, stop), fewer where it ends sooner.
        lengths: of each sequence.
    """
    same = np.arange(len(lengths))
    order, sizes, shares = array("q"), array("q"), array("q")  # of each distinct sequence: length, what it shares
    for item, shared in prefix_order(read, len(lengths)):
        if order and shared == lengths[item]:
            same[item] = order[-1]
            continue
        order.append(item)
        sizes.append(lengths[item])
        shares.append(shared)
    packs = _by_length([(1, size) for size in sizes], budget) if padded else _by_prefix(sizes, shares, budget)
    return ReadPlan([[order[at] for at in pack] for pack in packs], same)


def _by_prefix(sizes: Sequence[int], shares: Sequence[int], budget: int) -> list[list[int]]:
    """Runs of neighbours; of each its tokens, and how many of them the one before has too."""
    packs: list[list[int]] = []
    room = keys = 0
    for item, (whole, shared) in enumerate(zip(sizes, shares, strict=True)):
        if not packs or whole - shared > room or whole > keys:
            packs.append([])
            room, keys, shared = budget, KEYS_PER_TOKEN * budget, 0
        packs[-1].append(item)
        room -= whole - shared
        keys -= whole
    return packs


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
