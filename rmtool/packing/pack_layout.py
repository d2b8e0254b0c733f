"""The layout of a pack: many response groups in one row, and what attention must know to keep them apart.

In: `ResponseGroup`s. Out: a `PackedBatch` for the forward with prefix sharing, or a `PaddedBatch` for models without.
Cost: sorting the sequences, and one copy of their tokens.
Shapes: T unique tokens of a pack, S nodes (see `forest.py`), N responses, L longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from rmtool.tokenization.response_group import NO_PARENT, Forest, ResponseGroup, build_forest


@dataclass(frozen=True)
class PackLayout:
    """How attention reads a pack. Node s asks with its own tokens; its keys are those of its path: the tokens of its
    parents from the root on, then its own.

    lengths:      S ints, tokens of each node; the nodes lie in this order in the pack
    parents:      S ints, the index of the node just before on its path, or NO_PARENT; a parent comes first
    cu_seqlens_q: int32[S + 1], running sum of lengths
    cu_seqlens_k: int32[S + 1], running sum of the paths' lengths
    kv_index:     int64[cu_seqlens_k[-1]], where in the pack each key stands
    read_index:   int64[<= N], ascending: the tokens whose last state is read
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    kv_index: torch.Tensor
    read_index: torch.Tensor
    max_q: int
    max_k: int


@dataclass(frozen=True)
class PackedBatch:
    """input_ids, position_ids int64[1, T]; reward_index int64[N]: the pack position of each response's last token."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    reward_index: torch.Tensor
    layout: PackLayout

    def to(self, device: torch.device) -> PackedBatch:
        layout = replace(
            self.layout,
            cu_seqlens_q=self.layout.cu_seqlens_q.to(device),
            cu_seqlens_k=self.layout.cu_seqlens_k.to(device),
            kv_index=self.layout.kv_index.to(device),
            read_index=self.layout.read_index.to(device),
        )
        return PackedBatch(
            self.input_ids.to(device), self.position_ids.to(device), self.reward_index.to(device), layout
        )


@dataclass(frozen=True)
class PaddedBatch:
    """input_ids, attention_mask int64[N, L], padded on the right; reward_index int64[N]: each row's last real token."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    reward_index: torch.Tensor

    def to(self, device: torch.device) -> PaddedBatch:
        return PaddedBatch(self.input_ids.to(device), self.attention_mask.to(device), self.reward_index.to(device))


Batch = PackedBatch | PaddedBatch


def pack(groups: Sequence[ResponseGroup]) -> PackedBatch:
    """Lay the groups end to end, every prefix that several sequences share once: a prompt for its responses, a system
    prompt for its prompts, a response that two groups share. Rewards come out in the order of the groups, then of their
    responses.
    """
    forest = build_forest([ids for group in groups for ids in group.sequences()])
    lengths = np.array([len(tokens) for tokens in forest.tokens])
    last = np.cumsum(lengths) - 1
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate(forest.tokens).astype(np.int64))[None],
        position_ids=torch.from_numpy(_runs(np.array(forest.depths), lengths))[None],
        reward_index=torch.from_numpy(last[list(forest.ends)]),
        layout=_layout(lengths, forest, last[sorted(set(forest.ends))]),
    )


def _layout(lengths: np.ndarray, forest: Forest, read: np.ndarray) -> PackLayout:
    starts = np.concatenate(([0], np.cumsum(lengths)))
    paths = list[list[int]]()
    for node, parent in enumerate(forest.parents):
        paths.append([*(paths[parent] if parent != NO_PARENT else ()), node])
    on_paths = np.concatenate(paths)
    key_lengths = np.array(forest.depths) + lengths
    return PackLayout(
        lengths=tuple(lengths.tolist()),
        parents=forest.parents,
        cu_seqlens_q=torch.from_numpy(starts.astype(np.int32)),
        cu_seqlens_k=torch.from_numpy(np.concatenate(([0], np.cumsum(key_lengths))).astype(np.int32)),
        kv_index=torch.from_numpy(_runs(starts[on_paths], lengths[on_paths])),
        read_index=torch.from_numpy(read),
        max_q=int(lengths.max()),
        max_k=int(key_lengths.max()),
    )


def _runs(firsts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64: `lengths[i]` whole numbers from `firsts[i]` on, for one i after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(firsts - (ends - lengths), lengths) + np.arange(ends[-1])


def pad(groups: Sequence[ResponseGroup], pad_id: int) -> PaddedBatch:
    """One row per response, padded on the right with `pad_id`; rewards in the same order as `pack`."""
    rows = [row for group in groups for row in group.sequences()]
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return PaddedBatch(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(mask.sum(1) - 1))
