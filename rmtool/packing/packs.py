"""Packs: many response groups in one sequence, their layout, and the attention that keeps them apart.

In: `ResponseGroup`s. Out: a `PackedBatch` for the forward with prefix sharing, or a `PaddedBatch` for models without.
`packed_attention`, a function in transformers' `AttentionInterface`, gives the outputs of running each response with
its prompt alone. The model passes the `PackLayout` through as the keyword argument `packed` (a module global would
be wrong when a checkpointed layer is recomputed during another pack).
Cost: sorting the sequences, and one copy of their tokens. In attention, a prompt of P and responses of R_i tokens take
P^2/2 + sum(R_i (P + R_i/2)) products instead of sum((P + R_i)^2 / 2); keys and values are copied once per response.
Shapes: T unique tokens of a pack, S nodes of its prefix forest, N responses, L tokens of the longest sequence;
H query heads, K key and value heads, D head size, 1 the batch; Q query and P key tokens of one node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from rmtool.tokenization.response_group import NO_PARENT, Forest, ResponseGroup, build_forest

NAME = "rmtool_packed"
HALF = (torch.float16, torch.bfloat16)

# What attention modules pass besides the arguments named in `packed_attention`, and that does not change its result
# when it is None, False or already applied. Anything else with a value (a soft cap, sinks, a mask) is unsupported.
HARMLESS = {"position_ids", "use_cache", "output_attentions", "is_causal", "cache_position", "position_embeddings"}
HARMLESS |= {"output_hidden_states", "output_router_logits", "past_key_values", "past_key_value", "logits_to_keep"}


@dataclass(frozen=True)
class PackLayout:
    """The attention structure of a pack. The queries of node s are its own tokens; its keys are the tokens of its path.

    lengths:      S ints, tokens of each node, in their order in the pack
    paths:        S tuples of nodes, from a root to the node itself: whose tokens its sequences begin with
    cu_seqlens_q: int32[S + 1], cumulative lengths
    cu_seqlens_k: int32[S + 1], cumulative lengths of the paths
    kv_index:     int64[cu_seqlens_k[-1]], the position of each key in the pack
    max_q, max_k: the longest node and the longest path, in tokens
    """

    lengths: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    kv_index: torch.Tensor
    max_q: int
    max_k: int


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


class UnsupportedAttentionError(Exception):
    """The model's attention needs something that packed attention does not compute; the reason for padded batches."""


def packed_attention(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packed: PackLayout | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention for a layer of a packed model: outputs [1, T, H, D], and no attention weights.

    Raises:
        UnsupportedAttentionError: the layer passes a mask, dropout, or an argument that is not computed here.
    """
    if packed is None:
        raise UnsupportedAttentionError("the model does not pass keyword arguments to its attention layers")
    _refuse_unsupported(module, attention_mask, dropout, others)
    if query_1HTD.is_cuda and torch.is_autocast_enabled("cuda"):
        # Rotary embedding in fp32 leaves query and key in fp32; autocast knows torch's attention, not the kernel.
        half = torch.get_autocast_dtype("cuda")
        query_1HTD, key_1KTD, value_1KTD = (tensor.to(half) for tensor in (query_1HTD, key_1KTD, value_1KTD))
    one_kernel = query_1HTD.is_cuda and query_1HTD.dtype in HALF and query_1HTD.shape[-1] % 8 == 0
    attend = _varlen if one_kernel else _node_by_node
    return attend(query_1HTD, key_1KTD, value_1KTD, scaling, sliding_window, packed), None


def _refuse_unsupported(
    module: torch.nn.Module, mask: torch.Tensor | None, dropout: float, others: dict[str, Any]
) -> None:
    if mask is not None:
        raise UnsupportedAttentionError("custom attention masks are not supported")
    if dropout:
        raise UnsupportedAttentionError("attention dropout is not supported")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise UnsupportedAttentionError("attention is not causal")
    unknown = sorted(name for name, value in others.items() if name not in HARMLESS and value is not None)
    if unknown:
        raise UnsupportedAttentionError(f"unsupported attention argument: {', '.join(unknown)}")


def _node_by_node(
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    scaling: float | None,
    window: int | None,
    packed: PackLayout,
) -> torch.Tensor:
    # split and cat, not slices: the gradient of a slice is a full-length tensor of zeros, per node and layer.
    queries, keys, values = (tensor.split(packed.lengths, dim=2) for tensor in (query_1HTD, key_1KTD, value_1KTD))
    outputs = []
    for query_1HQD, path in zip(queries, packed.paths, strict=True):
        key_1KPD, value_1KPD = (torch.cat([nodes[at] for at in path], dim=2) for nodes in (keys, values))
        outputs.append(_one_node(query_1HQD, key_1KPD, value_1KPD, scaling, window))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _one_node(
    q_1HQD: torch.Tensor, k_1KPD: torch.Tensor, v_1KPD: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    q_len, k_len = q_1HQD.shape[2], k_1KPD.shape[2]
    gqa = q_1HQD.shape[1] != k_1KPD.shape[1]
    if q_len == k_len and (window is None or k_len <= window):
        return F.scaled_dot_product_attention(q_1HQD, k_1KPD, v_1KPD, is_causal=True, scale=scaling, enable_gqa=gqa)
    # The queries are the last q_len of the k_len tokens; is_causal would align them with the first.
    mask_QP = causal_mask(q_len, k_len, window, q_1HQD.device)
    return F.scaled_dot_product_attention(q_1HQD, k_1KPD, v_1KPD, attn_mask=mask_QP, scale=scaling, enable_gqa=gqa)


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool[Q, P]: which keys each query sees; the last query is the token of the last key."""
    distance_QP = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance_QP >= 0) & (distance_QP < (keys if window is None else window))


def _varlen(
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    scaling: float | None,
    window: int | None,
    packed: PackLayout,
) -> torch.Tensor:
    """One kernel call for the pack; its causal mask ends at the last key (tests/packing/test_attention_gpu.py)."""
    from torch.nn.attention.varlen import varlen_attn

    q_THD, k_TKD, v_TKD = (tensor[0].transpose(0, 1) for tensor in (query_1HTD, key_1KTD, value_1KTD))
    output_THD = varlen_attn(
        q_THD.contiguous(),
        k_TKD[packed.kv_index],
        v_TKD[packed.kv_index],
        packed.cu_seqlens_q,
        packed.cu_seqlens_k,
        packed.max_q,
        packed.max_k,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q_THD.shape[1] != k_TKD.shape[1],
    )
    assert isinstance(output_THD, torch.Tensor)
    return output_THD[None]


# Not compiled: it loops over the nodes of one pack, and each pack has others.
AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
