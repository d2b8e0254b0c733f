"""Packs: many response groups in one sequence, and the layout that attention needs to keep them apart.

In: `ResponseGroup`s. Out: a `PackedBatch` for the forward with prefix sharing, or a `PaddedBatch` for models without.
Cost: sorting the sequences, and one copy of their tokens.
Shapes: T unique tokens of a pack, S nodes of its prefix forest, N responses, L tokens of the longest sequence; 1 the
batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from rmtool.tokenization.response_group import NO_PARENT, Forest, ResponseGroup, build_forest


@dataclass  # not frozen: torch 2.11 would compile a layer again for every number of nodes
class PackLayout:
    """The attention structure of a pack. The queries of node s are its own tokens; its keys are the tokens of its path.

    lengths:      S ints, tokens of each node, in their order in the pack
    paths:        S tuples of nodes, from a root to the node itself: whose tokens its sequences begin with
    cu_seqlens_q: int32[S + 1], cumulative lengths
    cu_seqlens_k: int32[S + 1], cumulative lengths of the paths
    kv_index:     int64[cu_seqlens_k[-1]], the position of each key in the pack
    max_q, max_k: the longest node and the longest path, in tokens
    masks:        masks that a layer has made, for the next layers
    """

    lengths: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    kv_index: torch.Tensor
    max_q: int
    max_k: int
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    @functools.cached_property
    def key_lengths(self) -> tuple[int, ...]:
        """S ints, keys of each node."""
        return tuple(sum(self.lengths[node] for node in path) for path in self.paths)


@dataclass(frozen=True)
class PackedBatch:
    """input_ids, position_ids int64[1, T]; reward_index int64[N], the position of each response's last token."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    reward_index: torch.Tensor
    layout: PackLayout


@dataclass(frozen=True)
class PaddedBatch:
    """input_ids, attention_mask int64[N, L], padded on the right; reward_index int64[N], each row's last real token."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    reward_index: torch.Tensor


Batch = PackedBatch | PaddedBatch


def pack(groups: Sequence[ResponseGroup], multiple: int = 1) -> PackedBatch:
    """Concatenate the groups, every common prefix once: a prompt for its responses, a system prompt for its prompts, a
    response that two groups have. Rewards come out in the order of the groups, then of their responses.

    Args:
        multiple: fill the pack up to a multiple of so many tokens, with a sequence that has no reward.
    """
    forest = _fill(build_forest([ids for group in groups for ids in group.sequences()]), multiple)
    lengths_S = np.array([len(tokens) for tokens in forest.tokens])
    last_S = np.cumsum(lengths_S) - 1
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate(forest.tokens).astype(np.int64))[None],
        position_ids=torch.from_numpy(_ranges(np.array(forest.depths), lengths_S))[None],
        reward_index=torch.from_numpy(last_S[list(forest.ends)]),
        layout=_layout(lengths_S, forest),
    )


def _fill(forest: Forest, multiple: int) -> Forest:
    missing = -sum(map(len, forest.tokens)) % multiple
    if not missing:
        return forest
    ids = np.resize(forest.tokens[0], missing)  # repeats a beginning: its states are as sound as those of the pack
    return replace(
        forest,
        tokens=(*forest.tokens, ids),
        parents=(*forest.parents, NO_PARENT),
        depths=(*forest.depths, 0),
    )


def _layout(lengths_S: np.ndarray, forest: Forest) -> PackLayout:
    starts = np.concatenate(([0], np.cumsum(lengths_S)))
    paths = list[tuple[int, ...]]()
    for node, parent in enumerate(forest.parents):
        paths.append((*(paths[parent] if parent != NO_PARENT else ()), node))
    on_paths = np.concatenate(paths)
    key_lengths_S = np.array(forest.depths) + lengths_S
    return PackLayout(
        lengths=tuple(lengths_S.tolist()),
        paths=tuple(paths),
        cu_seqlens_q=torch.from_numpy(starts.astype(np.int32)),
        cu_seqlens_k=torch.from_numpy(np.concatenate(([0], np.cumsum(key_lengths_S))).astype(np.int32)),
        kv_index=torch.from_numpy(_ranges(starts[on_paths], lengths_S[on_paths])),
        max_q=int(lengths_S.max()),
        max_k=int(key_lengths_S.max()),
    )


def _ranges(firsts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate the ranges of `lengths[i]` integers from `firsts[i]`, int64."""
    ends = np.cumsum(lengths)
    return np.repeat(firsts - (ends - lengths), lengths) + np.arange(ends[-1])


def pad(groups: Sequence[ResponseGroup], pad_id: int) -> PaddedBatch:
    """Build one row per response, padded on the right with `pad_id`; rewards in the same order as from `pack`."""
    sequences = [ids for group in groups for ids in group.sequences()]
    shape = len(sequences), max(map(len, sequences))
    ids_NL, mask_NL = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, ids in enumerate(sequences):
        ids_NL[row, : len(ids)] = ids
        mask_NL[row, : len(ids)] = 1
    return PaddedBatch(torch.from_numpy(ids_NL), torch.from_numpy(mask_NL), torch.from_numpy(mask_NL.sum(1) - 1))
