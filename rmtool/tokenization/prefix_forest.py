"""Sequences of token ids as one forest, in which every distinct prefix is stored once.

In: id sequences. Out: an order in which sequences with the same beginning are neighbors, or the `Forest` itself:
nodes, each a run of tokens with a parent whose tokens (and those of its own parents) come before.
Cost: O(tokens) and one sort. `build_forest` is for packs and holds all tokens; `prefix_order` is for whole files and
holds a window of each sequence at a time.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rmtool.tokenization.response_group import Ids

NO_PARENT = -1
# Ids of an item compared at a time, and of all items together, within these bounds.
SHORTEST_WINDOW, LONGEST_WINDOW, WINDOWS = 32, 1024, 2**22
Window = Callable[[int, int, int], Ids]  # ids [start, stop) of an item


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
    last = b""
    for index in order:
        ids, shared = sequences[index], _shared(last, keys[index])
        while path and path[-1].start >= shared:
            path.pop()
        if path and path[-1].end > shared:
            path[-1] = _split(path[-1], shared, nodes)
        if shared < len(ids):
            nodes.append(_Node(path[-1] if path else None, index, shared, len(ids)))
            path.append(nodes[-1])
        ends[index] = path[-1]
        last = keys[index]
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


def _sortable(ids: Ids) -> bytes:
    """Bytes that sort as the ids do, a beginning before what it begins."""
    return ids.astype(">i4").tobytes()


def _shared(a: bytes, b: bytes) -> int:
    """Ids in the longest common prefix of two `_sortable`s."""
    size = min(len(a), len(b))
    differs = int.from_bytes(a[:size]) ^ int.from_bytes(b[:size])
    return (8 * size - differs.bit_length()) // 32


@dataclass(frozen=True)
class _Run:
    """Neighbors in the order. Open: they agree on `start` ids, and the first one shares `shared` with the item before
    it. With `shares`, one number per item, their own order is known.
    """

    items: Sequence[int]
    start: int = 0
    shared: int = 0
    shares: array[int] | None = None


def prefix_order(read: Window, count: int) -> Iterator[tuple[int, int]]:
    """The items 0 to count - 1 in the lexicographic order of their ids, equal ones by their number; and with each how
    many ids it shares with the one before it.

    Only a window of the ids of each is held at a time, a short one where there are many, so that millions of long
    sequences sort in little memory.

    Args:
        read: gives an item's ids [start, stop), fewer where it ends sooner.
    """
    pending = [_Run(range(count))]  # the next one is the last
    while pending:
        run = pending.pop()
        if run.shares is None:
            pending += reversed(_cut(run, read))
        else:
            yield from zip(run.items, run.shares, strict=True)


def _cut(run: _Run, read: Window) -> list[_Run]:
    """An open run, cut by its items' next ids."""
    window = max(SHORTEST_WINDOW, min(LONGEST_WINDOW, WINDOWS // max(1, len(run.items))))
    keys = [_sortable(read(item, run.start, run.start + window)) for item in run.items]
    parts = list[_Run]()
    last: bytes | None = None
    for key, places in itertools.groupby(sorted(range(len(keys)), key=keys.__getitem__), key=keys.__getitem__):
        items = array("q", (run.items[at] for at in places))
        shared = run.shared if last is None else run.start + _shared(last, key)
        end, last = run.start + len(key) // 4, key
        if len(items) > 1 and len(key) == 4 * window:
            parts.append(_Run(items, end, shared))
            continue
        if not parts or parts[-1].shares is None:
            parts.append(_Run(array("q"), shares=array("q")))  # one for all settled neighbors: there may be millions
        settled = parts[-1]
        assert isinstance(settled.items, array)
        assert settled.shares is not None
        settled.items.extend(items)
        settled.shares.extend([shared, *[end] * (len(items) - 1)])
    return parts
