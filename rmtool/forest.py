"""Sequences of token ids as one forest, in which every distinct prefix is stored once.

In: id sequences. Out: an order in which sequences with the same beginning are neighbours, or the `Forest` itself:
nodes, each a run of tokens with a parent whose tokens (and those of its own parents) come before.
Cost: O(tokens) and one sort. `build_forest` is for packs and holds all tokens; `prefix_order` is for whole files and
holds WINDOW ids of each sequence at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rmtool.tree import Ids

NO_PARENT = -1
WINDOW = 128  # ids compared at a time
_EQUAL = -1


@dataclass(frozen=True)
class Forest:
    """Nodes in an order that puts parents before their children; sequence i ends with the last token of `ends[i]`.

    tokens:  S id arrays, none empty
    parents: S ints, the index of the node read just before, or NO_PARENT
    depths:  S ints, tokens on the path before the node: the position of its first token
    ends:    one node per sequence, in the order of the sequences
    """

    tokens: tuple[Ids, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    ends: tuple[int, ...]


@dataclass
class _Node:
    parent: _Node | None
    sequence: int  # one that holds the node's tokens, in [start, end)
    start: int
    end: int


def build_forest(sequences: Sequence[Ids]) -> Forest:
    """The forest of all distinct prefixes; equal sequences end in the same node."""
    keys = [_sortable(ids) for ids in sequences]
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    nodes: list[_Node] = []
    path: list[_Node] = []  # from the root to the end of the last sequence
    ends: dict[int, _Node] = {}
    last: Ids = np.empty(0, np.int32)
    for index in order:
        ids = sequences[index]
        shared = shared_length(last, ids)
        while path and path[-1].start >= shared:
            path.pop()
        if path and path[-1].end > shared:
            path[-1] = _split(path[-1], shared, nodes)
        if shared < len(ids):
            nodes.append(_Node(path[-1] if path else None, index, shared, len(ids)))
            path.append(nodes[-1])
        ends[index] = path[-1]
        last = ids
    return _freeze(sequences, order, nodes, [ends[index] for index in range(len(sequences))])


def _split(node: _Node, at: int, nodes: list[_Node]) -> _Node:
    """Cut `node` in two; it keeps its end (and who ends there), a new node takes its beginning. Returns the new one."""
    head = _Node(node.parent, node.sequence, node.start, at)
    node.parent, node.start = head, at
    nodes.append(head)
    return head


def _freeze(sequences: Sequence[Ids], order: Sequence[int], nodes: list[_Node], ends: list[_Node]) -> Forest:
    rank = {sequence: position for position, sequence in enumerate(order)}
    nodes = sorted(nodes, key=lambda node: (rank[node.sequence], node.start))
    number = {id(node): position for position, node in enumerate(nodes)}
    return Forest(
        tokens=tuple(sequences[node.sequence][node.start : node.end] for node in nodes),
        parents=tuple(NO_PARENT if node.parent is None else number[id(node.parent)] for node in nodes),
        depths=tuple(node.start for node in nodes),
        ends=tuple(number[id(node)] for node in ends),
    )


def shared_length(a: Ids, b: Ids) -> int:
    """Length of the longest common prefix."""
    limit = min(len(a), len(b))
    differs = a[:limit] != b[:limit]
    first = int(differs.argmax()) if limit else 0
    return first if limit and differs[first] else limit


def _sortable(ids: Ids) -> bytes:
    """Bytes that sort as the ids do, a beginning before what it begins."""
    return ids.astype(">i4").tobytes()


def prefix_order(read: Callable[[int], Ids], items: Sequence[int]) -> list[int]:
    """`items` in the lexicographic order of their ids; those with equal ids keep their order.

    `read` gives an item's ids. Only WINDOW ids of each are held at a time, so that millions of long sequences sort in
    little memory.
    """
    result: list[int] = []
    pending = [(list(items), 0)]  # runs of items that agree on their first `start` ids; the last one comes first
    while pending:
        run, start = pending.pop()
        if len(run) == 1 or start == _EQUAL:
            result += run
            continue
        keys = {item: _sortable(read(item)[start : start + WINDOW]) for item in run}
        groups = itertools.groupby(sorted(run, key=keys.__getitem__), key=keys.__getitem__)
        parts = [(list(same), start + WINDOW if len(key) == 4 * WINDOW else _EQUAL) for key, same in groups]
        pending += reversed(parts)
    return result
