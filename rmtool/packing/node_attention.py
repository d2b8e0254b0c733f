"""Attention of packs, node by node: on CPUs torch's flash kernel and its backward, elsewhere torch's attention; with a
soft cap or sinks, attention written out (`written_attention.py`).

In: queries, keys and values of a pack, and its `PackLayout`. Out: the attention outputs. On a CPU the kernel is called
directly: through autograd, every node of every layer costs a graph node, copies of its keys and a conversion of its
mask. Half precision has its forward in half precision and its backward in fp32: with AMX, torch's backward takes three
times as long in bf16 as in fp32 (scripts/bench/SPEED.md).
Cost: keys and values of every node, copied, while a layer runs; one mask per pack and window.
Shapes: T unique tokens of a pack; H query heads, K key and value heads, D head size, 1 the batch; Q query and P key
tokens of one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from rmtool.packing.packs import PackLayout
from rmtool.packing.written_attention import AttentionParams, written_attention

# A call with a mask computes the scores that the mask hides, so a long node takes several calls.
QUERIES_PER_CALL = 256

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_by_node(
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    params: AttentionParams,
    packed: PackLayout,
) -> torch.Tensor:
    """Compute the attention outputs of a pack, [1, T, H, D]."""
    # A plan's fake tensors are on the CPU and stand for a GPU. The kernel takes one head size for all.
    real, sizes = not isinstance(query_1HTD, FakeTensor), {query_1HTD.shape[-1], value_1KTD.shape[-1]}
    if query_1HTD.device.type == "cpu" and real and len(sizes) == 1 and params.has_kernel:
        heads = (tensor.to(product_dtype(query_1HTD)) for tensor in (query_1HTD, key_1KTD, value_1KTD))
        return _OnCpu.apply(*heads, params.scaling, params.window, packed)
    return _through_autograd(query_1HTD, key_1KTD, value_1KTD, params, packed)


def _through_autograd(
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    params: AttentionParams,
    packed: PackLayout,
) -> torch.Tensor:
    # One gather and one split for all nodes. No slices: their gradients are tensors of zeros.
    both_1TKE = torch.cat((key_1KTD.transpose(1, 2), value_1KTD.transpose(1, 2)), dim=-1)
    gathered = GatherRows.apply(both_1TKE, packed.kv_index).transpose(1, 2)
    keys, values = (
        part.split(packed.key_lengths, dim=2)
        for part in gathered.split((key_1KTD.shape[-1], value_1KTD.shape[-1]), dim=-1)
    )
    nodes = zip(query_1HTD.split(packed.lengths, dim=2), keys, values, strict=True)
    outputs = [attend_node(*node, params) for node in nodes]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which products of this tensor are computed: autocast's, where it is enabled."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def attend_node(
    q_1HQD: torch.Tensor, k_1KPD: torch.Tensor, v_1KPD: torch.Tensor, params: AttentionParams
) -> torch.Tensor:
    """Compute the attention outputs of one node, [1, H, Q, D], with the keys of its path."""
    q_len, k_len = q_1HQD.shape[2], k_1KPD.shape[2]
    named: dict[str, Any] = {"scale": params.scaling, "enable_gqa": q_1HQD.shape[1] != k_1KPD.shape[1]}
    if q_len == k_len and (params.window is None or k_len <= params.window) and params.has_kernel:
        return F.scaled_dot_product_attention(q_1HQD, k_1KPD, v_1KPD, is_causal=True, **named)
    # The queries are the last q_len of the k_len tokens; is_causal would align them with the first.
    mask_QP = causal_mask(q_len, k_len, params.window, q_1HQD.device)
    if params.has_kernel:
        return F.scaled_dot_product_attention(q_1HQD, k_1KPD, v_1KPD, attn_mask=mask_QP, **named)
    return written_attention(q_1HQD, k_1KPD, v_1KPD, mask_QP, params, QUERIES_PER_CALL)


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool[Q, P]: which keys each query sees; the last query is the token of the last key."""
    distance_QP = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance_QP >= 0) & (distance_QP < (keys if window is None else window))


class GatherRows(torch.autograd.Function):
    """Rows of dimension 1 by index. Gradients of a row that is used many times, a prompt's, add up in fp32: in bf16,
    64 responses would cost ten times the rounding error. An index expression would sort the index for that.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.shape = rows.shape
        return rows.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        return _sum_rows(gradient, index, ctx.shape[1]).to(gradient.dtype), None


def _sum_rows(rows: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    """Add up rows of dimension 1 by index, in fp32 or more; the reverse of `index_select`."""
    exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return exact.new_zeros((rows.shape[0], count, *rows.shape[2:])).index_add_(1, index, exact)


@dataclass(frozen=True)
class _Call:
    """The queries and keys of one kernel call, as positions in the pack and in the gathered keys.

    mask: None for a complete sequence with itself, which the kernel masks
    """

    queries: slice
    keys: slice
    mask: torch.Tensor | None


def _calls(packed: PackLayout, window: int | None, dtype: torch.dtype) -> Iterator[_Call]:
    query = first_key = 0
    for q_len, k_len in zip(packed.lengths, packed.key_lengths, strict=True):
        if q_len == k_len and (window is None or k_len <= window):
            yield _Call(slice(query, query + q_len), slice(first_key, first_key + k_len), None)
        else:
            for start in range(0, q_len, QUERIES_PER_CALL):
                count = min(QUERIES_PER_CALL, q_len - start)
                seen = k_len - q_len + start + count
                mask = _mask(packed, window, dtype)[:count, packed.max_k - seen + count :][:, :seen]
                yield _Call(slice(query + start, query + start + count), slice(first_key, first_key + seen), mask)
        query, first_key = query + q_len, first_key + k_len


def _mask(packed: PackLayout, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """[Q, max_k + Q], 0 or -inf: whose columns [max_k - P + Q, max_k + Q) are the mask of Q queries and P keys.

    A query sees a key by their distance alone, so every mask is a part of this one.
    """
    if (window, dtype) not in packed.masks:
        seen = causal_mask(QUERIES_PER_CALL, packed.max_k + QUERIES_PER_CALL, window, packed.kv_index.device)
        packed.masks[window, dtype] = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
    return packed.masks[window, dtype]


class _OnCpu(torch.autograd.Function):
    """[1, H, T, D], [1, K, T, D], [1, K, T, D] -> [1, T, H, D]; the gradients are in fp32 or more."""

    @staticmethod
    def forward(
        ctx: Any,
        query_1HTD: torch.Tensor,
        key_1KTD: torch.Tensor,
        value_1KTD: torch.Tensor,
        scaling: float | None,
        window: int | None,
        packed: PackLayout,
    ) -> torch.Tensor:
        keys, values = (_gather(heads, packed) for heads in (key_1KTD, value_1KTD))
        output_1THD = torch.empty_like(query_1HTD.transpose(1, 2), memory_format=torch.contiguous_format)
        output_1HTD, logsumexps = output_1THD.transpose(1, 2), []
        for call in _calls(packed, window, query_1HTD.dtype):
            given = query_1HTD[:, :, call.queries], keys[:, :, call.keys], values[:, :, call.keys]
            part, lse = _flash(*given, 0.0, call.mask is None, attn_mask=call.mask, scale=scaling)
            output_1HTD[:, :, call.queries] = part
            logsumexps.append(lse)
        ctx.save_for_backward(query_1HTD, key_1KTD, value_1KTD, output_1THD, *logsumexps)
        ctx.scaling, ctx.window, ctx.packed = scaling, window, packed
        return output_1THD

    @staticmethod
    def backward(ctx: Any, gradient_1THD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # only once: a checkpointed layer unpacks them
        (*heads, output_1THD), logsumexps = saved[:4], saved[4:]
        dtype = torch.promote_types(output_1THD.dtype, torch.float32)
        query_1HTD, key_1KTD, value_1KTD = (tensor.to(dtype) for tensor in heads)
        outputs, gradients = (tensor.to(dtype).transpose(1, 2) for tensor in (output_1THD, gradient_1THD))
        keys, values = (_gather(heads, ctx.packed) for heads in (key_1KTD, value_1KTD))
        of_query = torch.empty_like(query_1HTD)
        of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(values)
        for call, lse in zip(_calls(ctx.packed, ctx.window, dtype), logsumexps, strict=True):
            q, k = (slice(None), slice(None), call.queries), (slice(None), slice(None), call.keys)
            given = gradients[q], query_1HTD[q], keys[k], values[k], outputs[q], lse
            parts = _flash_backward(*given, 0.0, call.mask is None, attn_mask=call.mask, scale=ctx.scaling)
            of_query[q] = parts[0]
            of_keys[k] += parts[1]
            of_values[k] += parts[2]
        both = (
            _sum_rows(part.transpose(1, 2), ctx.packed.kv_index, query_1HTD.shape[2]).transpose(1, 2)
            for part in (of_keys, of_values)
        )
        return of_query, *both, None, None, None


def _gather(heads_1KTD: torch.Tensor, packed: PackLayout) -> torch.Tensor:
    """The rows of every node's keys or values; contiguous ones are gathered ten times as fast."""
    return heads_1KTD.transpose(1, 2).contiguous().index_select(1, packed.kv_index).transpose(1, 2)
