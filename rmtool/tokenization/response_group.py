"""Sequences of token ids whose common prefixes are stored once: a prompt with its responses, and whole packs.

In: token id sequences. Out: a `ResponseGroup` (one prompt, several responses), a `Forest` (all distinct prefixes of any
sequences), or an order in which sequences with a common prefix are neighbors.
Prefixes are compared as ids, never as text: a tokenizer may merge the last characters of the prompt with the first ones
of a response, so that two texts share more characters than tokens.
Cost: O(tokens) and one sort. `build_forest` is for packs and holds all tokens; `prefix_order` is for complete files and
holds a window of each sequence at a time.
"""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import AnyStr

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
NO_PARENT = -1
# Ids of a sequence compared at a time, and of all sequences together, within these bounds.
SHORTEST_WINDOW, LONGEST_WINDOW, WINDOWS = 32, 1024, 2**22
Window = Callable[[int, int, int], Ids]  # (sequence, start, stop) -> its ids [start, stop)


@dataclass(frozen=True)
class ResponseGroup:
    """A prompt and its responses as token ids, the prompt stored once.

    prompt:    int32[P], the longest common prefix; empty with one response, where there is nothing to share
    responses: int32[R_i] each, R_i >= 1: the reward is taken at the last token
    """

    prompt: Ids
    responses: tuple[Ids, ...]

    @property
    def unique_tokens(self) -> int:
        """Tokens to compute when the prompt is computed once."""
        return len(self.prompt) + sum(len(response) for response in self.responses)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, with the prompt in each."""
        return self.unique_tokens + len(self.prompt) * (len(self.responses) - 1)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and response."""
        return len(self.prompt) + max(len(response) for response in self.responses)

    def sequences(self) -> list[Ids]:
        """Return each response with its prompt before it, as a model without prefix sharing reads it."""
        return [self.sequence(index) for index in range(len(self.responses))]

    def sequence(self, index: int) -> Ids:
        """Return one response with its prompt before it."""
        response = self.responses[index]
        return np.concatenate((self.prompt, response)) if len(self.prompt) else response

    def window(self, index: int, start: int, stop: int) -> Ids:
        """Return ids [start, stop) of `sequence(index)`, fewer at its end, without copying the rest."""
        split = len(self.prompt)
        prompt, response = self.prompt[start:stop], self.responses[index][max(start - split, 0) : max(stop - split, 0)]
        return np.concatenate((prompt, response)) if len(prompt) else response

    def truncate_prompt(self, count: int) -> ResponseGroup:
        """Return the group without the first `count` tokens of its prompt."""
        assert 0 <= count <= len(self.prompt)
        return ResponseGroup(self.prompt[count:], self.responses)

    def select(self, responses: Sequence[int]) -> ResponseGroup:
        """Return the group with only these responses, in this order."""
        return ResponseGroup(self.prompt, tuple(self.responses[index] for index in responses))


def build_group(sequences: Sequence[Sequence[int] | Ids]) -> ResponseGroup:
    """Split off the longest common prefix of `sequences`; every sequence keeps at least its last token for itself."""
    arrays = [np.asarray(sequence, dtype=np.int32) for sequence in sequences]
    assert arrays
    assert all(len(array) for array in arrays)
    prefix = shared_ids(arrays) if len(arrays) > 1 else 0
    return ResponseGroup(arrays[0][:prefix], tuple(array[prefix:] for array in arrays))


def shared_ids(arrays: Sequence[Ids]) -> int:
    """Return the length of the longest common prefix of id arrays, at most one less than the shortest of them."""
    keys = [array.tobytes() for array in arrays]
    limit = min(map(len, keys)) - 4
    return functools.reduce(lambda length, key: common_prefix(keys[0], key, length), keys[1:], limit) // 4


def common_prefix(a: AnyStr, b: AnyStr, limit: int | None = None) -> int:
    """Return the length of the longest common prefix of two strings or byte strings, at most `limit`."""
    low, high = 0, min(len(a), len(b)) if limit is None else min(limit, len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class Forest:
    """Distinct prefixes as nodes, parents before their children; sequence i ends with the last token of `ends[i]`.

    tokens:  S id arrays, none empty
    parents: S ints, the index of the node just before on the path, or NO_PARENT
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
    """Build the forest of all distinct prefixes; equal sequences end in the same node."""
    keys = [_sortable(ids) for ids in sequences]
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    nodes: list[_Node] = []
    path: list[_Node] = []  # from the root to the end of the last sequence
    ends: dict[int, _Node] = {}
    last = b""
    for index in order:
        ids, shared = sequences[index], common_prefix(last, keys[index]) // 4
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
    """Split `node`: it keeps its end (and the sequences that end there); return the new node with its beginning."""
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
    """Return bytes that sort as the ids do, a prefix before what it is a prefix of."""
    return ids.astype(">i4").tobytes()


@dataclass(frozen=True)
class _Run:
    """Neighboring sequences in the order.

    Unsorted: they agree on `start` ids, and the first one shares `shared` ids with the sequence before it.
    Sorted: `shares` has, for each, the number of ids that it shares with the sequence before it.
    """

    items: Sequence[int]
    start: int = 0
    shared: int = 0
    shares: array[int] | None = None


def prefix_order(read: Window, count: int) -> Iterator[tuple[int, int]]:
    """Yield the sequences 0 to count - 1 in lexicographic order, equal ones by their number, each with the number of
    ids that it shares with the one before it.

    Only a window of each sequence is held at a time, a short one where there are many, so that millions of long
    sequences are sorted in little memory.

    Args:
        read: returns ids [start, stop) of a sequence, fewer at its end.
    """
    pending = [_Run(range(count))]  # a stack
    while pending:
        run = pending.pop()
        if run.shares is None:
            pending += reversed(_sort_window(run, read))
        else:
            yield from zip(run.items, run.shares, strict=True)


def _sort_window(run: _Run, read: Window) -> list[_Run]:
    """Split an unsorted run by the next ids of its sequences."""
    window = max(SHORTEST_WINDOW, min(LONGEST_WINDOW, WINDOWS // max(1, len(run.items))))
    keys = [_sortable(read(item, run.start, run.start + window)) for item in run.items]
    parts = list[_Run]()
    last: bytes | None = None
    for key, places in itertools.groupby(sorted(range(len(keys)), key=keys.__getitem__), key=keys.__getitem__):
        items = array("q", (run.items[at] for at in places))
        shared = run.shared if last is None else run.start + common_prefix(last, key) // 4
        end, last = run.start + len(key) // 4, key
        if len(items) > 1 and len(key) == 4 * window:
            parts.append(_Run(items, end, shared))
            continue
        if not parts or parts[-1].shares is None:
            parts.append(_Run(array("q"), shares=array("q")))  # one for all sorted neighbors: there may be millions
        done = parts[-1]
        assert isinstance(done.items, array)
        assert done.shares is not None
        done.items.extend(items)
        done.shares.extend([shared, *[end] * (len(items) - 1)])
    return parts
