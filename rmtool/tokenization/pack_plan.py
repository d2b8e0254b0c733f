"""Pack plans: which response groups, or single responses, share a forward pass.

In: response groups, or windows of id sequences, and a limit in unique tokens. Out: lists of indices, one per pack.
Cost: planning a step is O(n log n) in its groups and reads each prompt a few times.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rmtool.tokenization.response_group import ResponseGroup, Window, prefix_order

# The GPU kernel gathers the keys of every node: a long prompt with very many short responses would have few tokens and
# too many keys for memory.
KEYS_PER_TOKEN = 16
BALANCE_TOLERANCE = 1.005  # packs are balanced when the heaviest costs at most this times the mean


def plan_packs(
    groups: Sequence[ResponseGroup], max_tokens: int, world_size: int = 1, padded: bool = False, key_cost: float = 0.0
) -> list[list[int]]:
    """Split a step's groups into packs of at most `max_tokens` tokens each, their number a multiple of `world_size`.

    Groups that share most of a prompt stay together, as far as the limit allows. A group over the limit gets a pack of
    its own: packing can bound memory no further. Where there are fewer groups than packs, the last packs stay empty;
    the caller runs something in them with weight zero. `padded` counts a pack as rows times its longest row, as `pad`
    will build it, instead of unique tokens.

    Packs cost about the same, so that ranks finish together: a token costs 1, each key that it attends to `key_cost`.

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
    """Return as few packs as `max_tokens` allows, of about the same cost."""
    if world_size == 1:
        fits = sum(group.unique_tokens for group in groups) <= max_tokens
        fits = fits and sum(group.tokens for group in groups) <= KEYS_PER_TOKEN * max_tokens
        return [list(range(len(groups)))] if fits else _balanced(groups, max_tokens, 1, key_cost, max_tokens)[1]
    # Large clusters share most, small ones balance better; the plan with the lightest heaviest pack wins. Rows that
    # repeat a prompt need the large ones (12 pairs of 4 prompts on 2 ranks: 156 tokens instead of 396), and RMB on 8
    # ranks is 4% faster with the small ones. Costs 0.02 s for a step of 256 pairs.
    share = -(-pack_tokens(groups) // world_size)
    limits = sorted({min(max_tokens, max(1, share // parts)) for parts in (1, 2, 4)}, reverse=True)
    plans = (_balanced(groups, max_tokens, world_size, key_cost, limit) for limit in limits)
    return min(plans, key=lambda plan: plan[0])[1]


def _balanced(
    groups: Sequence[ResponseGroup], max_tokens: int, world_size: int, key_cost: float, limit: int
) -> tuple[float, list[list[int]]]:
    """Return the largest cost of a rank, and the packs, with clusters of at most `limit` tokens."""
    most_keys = KEYS_PER_TOKEN * max_tokens
    clusters = _group_by_prompt(groups, limit, most_keys)
    sizes = [pack_tokens([groups[item] for item in cluster]) for cluster in clusters]
    attended = [sum(key_count(groups[item]) for item in cluster) for cluster in clusters]
    costs = [size + key_cost * count for size, count in zip(sizes, attended, strict=True)]
    keys = [sum(groups[item].tokens for item in cluster) for cluster in clusters]
    least = max(-(-sum(sizes) // max_tokens), -(-sum(keys) // most_keys))
    count = _round_up(min(len(sizes), least), world_size)
    packs = _greedy_balance(costs, count)

    def over(values: Sequence[int], items: Sequence[int], most: int) -> bool:
        return sum(values[item] for item in items) > most

    while any(len(items) > 1 and (over(sizes, items, max_tokens) or over(keys, items, most_keys)) for items in packs):
        count = _round_up(count + max(1, count // 16), world_size)
        packs = _greedy_balance(costs, count)
    heaviest = max(sum(costs[item] for item in items) for items in packs) * (len(packs) // world_size)
    return heaviest, [[item for cluster in items for item in clusters[cluster]] for items in packs]


def key_count(group: ResponseGroup) -> int:
    """Return the number of keys that the tokens of a group attend to: those before each on its path, and itself."""
    prompt = len(group.prompt)
    lengths = [len(response) for response in group.responses]
    return prompt * (prompt + 1) // 2 + sum(length * prompt + length * (length + 1) // 2 for length in lengths)


def pack_tokens(groups: Sequence[ResponseGroup]) -> int:
    """Return the unique tokens of the groups in one pack."""
    if len(groups) == 1:
        return groups[0].unique_tokens
    sequences = [ids for group in groups for ids in group.sequences()]
    order = prefix_order(lambda item, start, stop: sequences[item][start:stop], len(sequences))
    return sum(len(sequences[item]) - shared for item, shared in order)


def _group_by_prompt(groups: Sequence[ResponseGroup], limit: int, most_keys: int) -> list[list[int]]:
    """Return clusters of about `limit` tokens and `most_keys` keys at most, of groups that share more than half of the
    shorter prompt.
    """
    firsts = [group.sequence(0) for group in groups]
    order = prefix_order(lambda item, start, stop: firsts[item][start:stop], len(groups))
    clusters: list[list[int]] = []
    last, size, keys = -1, 0, 0  # of the last cluster; size: tokens, without what its groups share beyond the prompt
    for item, shared in order:
        cost = groups[item].unique_tokens
        half = min(len(group.prompt) or group.longest for group in (groups[last], groups[item])) / 2
        if shared > half and size + cost - shared <= limit and keys + groups[item].tokens <= most_keys:
            clusters[-1].append(item)
            size += cost - min(shared, cost)
        else:
            clusters.append([item])
            size, keys = cost, 0
        keys += groups[item].tokens
        last = item
    return clusters


def _greedy_balance(costs: Sequence[float], count: int) -> list[list[int]]:
    """Assign items to `count` packs, the most expensive first, each to the lightest pack; then move and swap items
    while that makes the heaviest pack lighter.
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
    """Make the heaviest pack lighter by moving an item to a different pack or swapping two; return whether it could."""
    order = sorted(range(len(packs)), key=lambda pack: (loads[pack], pack))
    heavy = order[-1]
    if loads[heavy] * len(loads) <= BALANCE_TOLERANCE * sum(loads):
        return False
    for light in order[:-1]:
        gap = loads[heavy] - loads[light]
        # What moves, minus what comes back, should be half the gap: then both packs cost the same.
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
    """As `_by_length`, with packs for every rank if there are enough rows: a lower limit makes more packs."""
    packs = _by_length(sizes, max_tokens)
    wanted = min(_round_up(len(packs), world_size), len(sizes))
    while len(packs) < wanted and max_tokens > 1:
        max_tokens = max_tokens * 9 // 10
        packs = _by_length(sizes, max_tokens)
    return packs


def _by_length(sizes: Sequence[tuple[int, int]], max_tokens: int) -> list[list[int]]:
    """Return packs of items with similar lengths, to limit padding; a size is (rows, longest row)."""
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
    """Packs of distinct sequences; `representative[i]` is the sequence computed for i (itself, or an equal one)."""

    packs: list[list[int]]
    representative: np.ndarray


def plan_inference_packs(read: Window, lengths: Sequence[int], max_tokens: int, padded: bool = False) -> InferencePlan:
    """Split any number of sequences into packs of at most `max_tokens` unique tokens.

    Sequences with a common prefix become neighbors and share it within their pack, wherever they occur in the input;
    equal sequences are computed once. Holds about 20 MB, or 250 bytes per sequence of millions.

    Args:
        read: returns ids [start, stop) of a sequence, fewer at its end.
        lengths: the length of each sequence.
    """
    representative = np.arange(len(lengths))
    order, sizes, shares = (
        array("q"),
        array("q"),
        array("q"),
    )  # of each distinct sequence: its length, and the ids it shares
    for item, shared in prefix_order(read, len(lengths)):
        if order and shared == lengths[item]:
            representative[item] = order[-1]
            continue
        order.append(item)
        sizes.append(lengths[item])
        shares.append(shared)
    packs = _by_length([(1, size) for size in sizes], max_tokens) if padded else _by_prefix(sizes, shares, max_tokens)
    return InferencePlan([[order[at] for at in pack] for pack in packs], representative)


def _by_prefix(sizes: Sequence[int], shares: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return packs of neighbors, from the tokens of each, and how many of them it shares with the one before it."""
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
