"""Attention over a packed token group, as one function in transformers' `AttentionInterface`.

In: query H x T, key and value H_kv x T of one pack, and the pack's `PackLayout`, which the model passes through as the
keyword argument `packed` (a module global would be wrong when a checkpointed layer is recomputed during another pack).
Out: T x H attention outputs, equal to running each response with its prompt alone.
Cost: a prompt of P and responses of R_i tokens take P^2/2 + sum(R_i (P + R_i/2)) products instead of
sum((P + R_i)^2 / 2); keys and values are copied once per response.
Shapes: query [1, H, T, D], key and value [1, H_kv, T, D], the result [1, T, H, D], as transformers has them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from rmtool.packing.pack_layout import PackLayout
from rmtool.tokenization.response_group import NO_PARENT

NAME = "rmtool_packed"
HALF = (torch.float16, torch.bfloat16)

# What attention modules pass besides the arguments named in `packed_attention`, and that does not change its result
# when it is None, False or already applied. Anything else that carries a value (a soft cap, sinks, a mask) is refused.
HARMLESS = {"position_ids", "use_cache", "output_attentions", "is_causal", "cache_position", "position_embeddings"}
HARMLESS |= {"output_hidden_states", "output_router_logits", "past_key_values", "past_key_value", "logits_to_keep"}


class UnsupportedAttentionError(Exception):
    """This model's attention takes something that the packed forward does not compute. Decides the padded fallback."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packed: PackLayout | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """See the module's top.

    Raises:
        UnsupportedAttentionError: a mask, dropout, or an argument that this function does not know.
    """
    if packed is None:
        raise UnsupportedAttentionError("the model does not hand its keyword arguments to its attention")
    _refuse_unknown(module, attention_mask, dropout, others)
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        # Rotary embedding in fp32 leaves query and key in fp32; autocast knows torch's attention, not the kernel.
        query, key, value = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (query, key, value))
    if query.is_cuda and query.dtype in HALF and query.shape[-1] % 8 == 0:
        return _varlen(query, key, value, scaling, sliding_window, packed), None
    return _node_by_node(query, key, value, scaling, sliding_window, packed), None


def _refuse_unknown(module: torch.nn.Module, mask: torch.Tensor | None, dropout: float, others: dict[str, Any]) -> None:
    if mask is not None:
        raise UnsupportedAttentionError("its attention takes a mask of its own")
    if dropout:
        raise UnsupportedAttentionError("its attention applies dropout")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise UnsupportedAttentionError("its attention is not causal")
    unknown = sorted(name for name, value in others.items() if name not in HARMLESS and value is not None)
    if unknown:
        raise UnsupportedAttentionError(f"its attention takes {', '.join(unknown)}")


def _node_by_node(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    packed: PackLayout,
) -> torch.Tensor:
    # split and cat, not slices: the gradient of a slice is a full-length tensor of zeros, per node and layer.
    queries, keys, values = (tensor.split(packed.lengths, dim=2) for tensor in (query, key, value))
    outputs, paths = [], list[list[int]]()
    for node, parent in enumerate(packed.parents):
        paths.append([*(paths[parent] if parent != NO_PARENT else ()), node])
        k, v = (torch.cat([pieces[at] for at in paths[node]], dim=2) for pieces in (keys, values))
        outputs.append(_one_node(queries[node], k, v, scaling, window))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _one_node(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    q_len, k_len = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if q_len == k_len and (window is None or k_len <= window):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa)
    # The queries are the last q_len of the k_len tokens; is_causal would align them with the first.
    query_at = torch.arange(k_len - q_len, k_len, device=q.device)[:, None]
    key_at = torch.arange(k_len, device=q.device)[None, :]
    allowed = key_at <= query_at
    if window is not None:
        allowed &= key_at > query_at - window
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scaling, enable_gqa=gqa)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    packed: PackLayout,
) -> torch.Tensor:
    """One kernel call for the pack; its causal mask ends at the last key (tests/packing/test_attention_gpu.py)."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output = varlen_attn(
        q.contiguous(),
        k[packed.kv_index],
        v[packed.kv_index],
        packed.cu_seqlens_q,
        packed.cu_seqlens_k,
        packed.max_q,
        packed.max_k,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(output, torch.Tensor)
    return output[None]


# Outside of compiled layers: it loops over the nodes of one pack, and each pack has others.
AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
