"""Attention of packs: the outputs of running each response with its prompt alone, each common prefix computed once.

In: queries, keys and values of a pack, and its `PackLayout`. Out: the attention outputs. `packed_attention` is a
function in transformers' `AttentionInterface`. The model passes the layout through as the keyword argument `packed` (a
module global would be wrong when a checkpointed layer is recomputed during another pack).
Cost: a prompt of P and responses of R_i tokens take P^2/2 + sum(R_i (P + R_i/2)) products instead of
sum((P + R_i)^2 / 2); keys and values are copied once per response.
Shapes: T unique tokens of a pack; H query heads, K key and value heads, D head size, 1 the batch; Q query and P key
tokens of one node.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from rmtool.packing.node_attention import GatherRows, attend_by_node, product_dtype
from rmtool.packing.packs import PackLayout
from rmtool.packing.written_attention import AttentionParams

NAME = "rmtool_packed"
HALF = (torch.float16, torch.bfloat16)
# What `torch.nn.attention.varlen` takes: half precision on NVIDIA's Ampere or later, and heads up to this size.
KERNEL_CAPABILITY, KERNEL_WIDTH = (8, 0), 256

# What attention modules pass besides the arguments named in `packed_attention`, and that does not change its result
# when it is None, False or already applied. Anything else with a value is unsupported.
HARMLESS = {"position_ids", "use_cache", "output_attentions", "is_causal", "cache_position", "position_embeddings"}
HARMLESS |= {"output_hidden_states", "output_router_logits", "past_key_values", "past_key_value", "logits_to_keep"}


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
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
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
    params = AttentionParams(scaling, sliding_window, softcap, s_aux)
    dtype, width = product_dtype(query_1HTD), _kernel_width(query_1HTD, value_1KTD)
    if params.has_kernel and takes_kernel(dtype, width, _capability(query_1HTD.device)):
        # Rotary embedding in fp32 leaves query and key in fp32; autocast knows torch's attention, not the kernel.
        query_1HTD, key_1KTD, value_1KTD = (tensor.to(dtype) for tensor in (query_1HTD, key_1KTD, value_1KTD))
        return _varlen(query_1HTD, key_1KTD, value_1KTD, params, packed), None
    return attend_by_node(query_1HTD, key_1KTD, value_1KTD, params, packed), None


def takes_kernel(dtype: torch.dtype, width: int, capability: tuple[int, int] | None) -> bool:
    """Whether one kernel call can compute a pack's attention.

    Args:
        width: the head size that the kernel would be called with.
        capability: of the CUDA device; None for other devices.
    """
    return capability is not None and capability >= KERNEL_CAPABILITY and dtype in HALF and width <= KERNEL_WIDTH


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _kernel_width(query_1HTD: torch.Tensor, value_1KTD: torch.Tensor) -> int:
    """The head size for the kernel, which wants one for all, a multiple of 8; values may have another than queries."""
    return -(-max(query_1HTD.shape[-1], value_1KTD.shape[-1]) // 8) * 8


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


def _varlen(
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    params: AttentionParams,
    packed: PackLayout,
) -> torch.Tensor:
    """One kernel call for the pack; its causal mask ends at the last key (tests/packing/test_attention_gpu.py)."""
    from torch.nn.attention.varlen import varlen_attn

    size, width = query_1HTD.shape[-1], _kernel_width(query_1HTD, value_1KTD)
    q_THD, k_TKD, v_TKD = (_widened(part, width)[0].transpose(0, 1) for part in (query_1HTD, key_1KTD, value_1KTD))
    keys, values = GatherRows.apply(torch.stack((k_TKD, v_TKD)), packed.kv_index).unbind(0)
    grouped: dict[str, Any] = {}
    if q_THD.shape[1] != k_TKD.shape[1] and _has_enable_gqa(varlen_attn):
        grouped["enable_gqa"] = True
    output_THD = varlen_attn(
        q_THD.contiguous(),
        keys,
        values,
        packed.cu_seqlens_q,
        packed.cu_seqlens_k,
        packed.max_q,
        packed.max_k,
        scale=params.scale(size),
        window_size=(-1 if params.window is None else params.window - 1, 0),
        **grouped,
    )
    assert isinstance(output_THD, torch.Tensor)
    return output_THD[None, ..., : value_1KTD.shape[-1]]


def _widened(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Fill each head up with zeros, which change no product of queries and keys."""
    missing = width - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing else tensor


@functools.cache
def _has_enable_gqa(kernel: Callable[..., Any]) -> bool:
    """Whether fewer key heads than query heads have to be asked for: since torch 2.12."""
    return "enable_gqa" in inspect.signature(kernel).parameters


# Not compiled: it loops over the nodes of one pack, and each pack has others.
AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
