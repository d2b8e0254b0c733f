"""Which response clusters, or single responses, share a forward pass: packs within a token limit, of equal cost.

In: response clusters, or windows of id sequences, and a limit in tokens. Out: lists of indices. No torch.
Cost: planning a step is O(n log n) in its clusters, and reads each prompt a few times.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rmtool.tokenization.prefix_forest import Window, prefix_order
from rmtool.tokenization.response_group import ResponseGroup

# The kernel for GPUs gathers every node's keys: a long prompt with very many short responses would have few tokens and
# no end of keys.
KEYS_PER_TOKEN = 16


BALANCE_TOLERANCE = 1.005  # packs are even enough when the heaviest costs so many times the mean


def plan_packs(
    groups: Sequence[ResponseGroup], max_tokens: int, world_size: int = 1, padded: bool = False, key_cost: float = 0.0
) -> list[list[int]]:
    """Split a step's groups into packs of at most `max_tokens` tokens each, their number a multiple of `world_size`.

    Groups that share most of a prompt stay together, as far as the limit allows. A group over the limit gets a pack of
    its own: packing can bound memory no further. Where there are fewer groups than packs, the last packs stay empty;
    the caller runs something in them with weight zero. `padded` counts a pack as rows times its longest row, as `pad`
    will build it, instead of unique tokens.

    Packs are made to cost alike, so that ranks finish together: a token costs 1, and what attention adds for each key
    that it asks costs `key_cost`.

    Returns each pack's group indices in ascending order: a plan depends on nothing but its arguments.
    """
    sizes = [(len(group.responses), group.longest) for group in groups]
    packs = (
        _by_length_for(sizes, max_tokens, world_size)
        if padded
        else _best_balanced(groups, max_tokens, world_size, key_cost)
    )
    packs += [[] for _ in range(-len(packs) % world_size)]
    return [sorted(items) for items in packs]


def _best_balanced(
    groups: Sequence[ResponseGroup], max_tokens: int, world_size: int, key_cost: float
) -> list[list[int]]:
    """As few packs as keep the budget, of about the same cost."""
    if world_size == 1:
        whole = sum(group.unique_tokens for group in groups) <= max_tokens
        return [list(range(len(groups)))] if whole else _balanced(groups, max_tokens, 1, key_cost, max_tokens)[1]
    # Large clusters of groups share most, small ones can be shared out evenly: what has the lightest heaviest pack.
    share = -(-pack_tokens(groups) // world_size)
    limits = sorted({min(max_tokens, max(1, share // parts)) for parts in (1, 2, 4)}, reverse=True)
    return min(
        (_balanced(groups, max_tokens, world_size, key_cost, limit) for limit in limits), key=lambda plan: plan[0]
    )[1]


def _balanced(
    groups: Sequence[ResponseGroup], max_tokens: int, world_size: int, key_cost: float, limit: int
) -> tuple[float, list[list[int]]]:
    """The same with clusters of at most `limit` tokens: what its packs cost a rank at most, and the packs."""
    clusters = _group_by_prompt(groups, limit)
    sizes = [pack_tokens([groups[item] for item in cluster]) for cluster in clusters]
    keys = [sum(key_count(groups[item]) for item in cluster) for cluster in clusters]
    costs = [size + key_cost * asked for size, asked in zip(sizes, keys, strict=True)]
    count = _round_up(min(len(sizes), -(-sum(sizes) // max_tokens)), world_size)
    packs = _greedy_balance(costs, count)
    while any(len(items) > 1 and sum(sizes[item] for item in items) > max_tokens for items in packs):
        count = _round_up(count + max(1, count // 16), world_size)
        packs = _greedy_balance(costs, count)
    heaviest = max(sum(costs[item] for item in items) for items in packs)
    return heaviest * (len(packs) // world_size), [
        [item for cluster in items for item in clusters[cluster]] for items in packs
    ]


def key_count(group: ResponseGroup) -> int:
    """Keys that the group's tokens ask, each those before it on its path and itself."""
    prompt = len(group.prompt)
    lengths = [len(response) for response in group.responses]
    return prompt * (prompt + 1) // 2 + sum(length * prompt + length * (length + 1) // 2 for length in lengths)


def pack_tokens(groups: Sequence[ResponseGroup]) -> int:
    """Tokens of the groups in one pack."""
    if len(groups) == 1:
        return groups[0].unique_tokens
    sequences = [ids for group in groups for ids in group.sequences()]
    order = prefix_order(lambda item, start, stop: sequences[item][start:stop], len(sequences))
    return sum(len(sequences[item]) - shared for item, shared in order)


def _group_by_prompt(groups: Sequence[ResponseGroup], limit: int) -> list[list[int]]:
    """Trees that share more than half of the shorter prompt, in clusters of at most about `limit` tokens."""
    firsts = [group.sequence(0) for group in groups]
    order = prefix_order(lambda item, start, stop: firsts[item][start:stop], len(groups))
    clusters: list[list[int]] = []
    last, size = -1, 0  # size: the last cluster's tokens; what its groups share beyond the prompt is not known here
    for item, shared in order:
        cost = groups[item].unique_tokens
        half = min(len(group.prompt) or group.longest for group in (groups[last], groups[item])) / 2
        if shared > half and size + cost - shared <= limit:
            clusters[-1].append(item)
            size += cost - min(shared, cost)
        else:
            clusters.append([item])
            size = cost
        last = item
    return clusters


def _greedy_balance(costs: Sequence[float], count: int) -> list[list[int]]:
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
    while _swap_balance(packs, loads, costs):
        pass
    return packs


def _swap_balance(packs: list[list[int]], loads: list[float], costs: Sequence[float]) -> bool:
    """Make the heaviest pack lighter, by giving an item to the first pack for which that helps, or exchanging one;
    says whether it could.
    """
    order = sorted(range(len(packs)), key=lambda pack: (loads[pack], pack))
    heavy = order[-1]
    if loads[heavy] * len(loads) <= BALANCE_TOLERANCE * sum(loads):
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


def _by_length_for(sizes: Sequence[tuple[int, int]], max_tokens: int, world_size: int) -> list[list[int]]:
    """The same, in so many packs that every rank has some, if there are rows for that: a smaller budget makes more."""
    packs = _by_length(sizes, max_tokens)
    wanted = min(_round_up(len(packs), world_size), len(sizes))
    while len(packs) < wanted and max_tokens > 1:
        max_tokens = max_tokens * 9 // 10
        packs = _by_length(sizes, max_tokens)
    return packs


def _by_length(sizes: Sequence[tuple[int, int]], max_tokens: int) -> list[list[int]]:
    """Neighbors in length share a pack, so that little of it is padding; a size is (rows, longest row)."""
    packs: list[list[int]] = []
    rows = longest = 0
    for item in sorted(range(len(sizes)), key=lambda index: (-sizes[index][1], index)):
        rows += sizes[item][0]
        if not packs or rows * longest > max_tokens:
            packs.append([])
            rows, longest = sizes[item]
        packs[-1].append(item)
    return packs


@dataclass(frozen=True)
class InferencePlan:
    """Which sequences to read together; `same[i]` is the one to read for sequence i (itself, or an equal one)."""

    packs: list[list[int]]
    same: np.ndarray


def plan_inference_packs(read: Window, lengths: Sequence[int], max_tokens: int, padded: bool = False) -> InferencePlan:
    """Cut any number of sequences, each read once and alone, into packs of at most `max_tokens` tokens.

    Sequences with the same beginning become neighbors and share it within their pack, wherever they stood in the
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
    packs = _by_length([(1, size) for size in sizes], max_tokens) if padded else _by_prefix(sizes, shares, max_tokens)
    return InferencePlan([[order[at] for at in pack] for pack in packs], same)


def _by_prefix(sizes: Sequence[int], shares: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Runs of neighbors; of each its tokens, and how many of them the one before has too."""
    packs: list[list[int]] = []
    room = keys = 0
    for item, (whole, shared) in enumerate(zip(sizes, shares, strict=True)):
        if not packs or whole - shared > room or whole > keys:
            packs.append([])
            room, keys, shared = max_tokens, KEYS_PER_TOKEN * max_tokens, 0
        packs[-1].append(item)
        room -= whole - shared
        keys -= whole
    return packs


def _round_up(value: int, world_size: int) -> int:
    return -(-value // world_size) * world_size
