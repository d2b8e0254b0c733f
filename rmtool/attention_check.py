"""Half-precision packed attention, judged on the queries, keys and values of a forward of the model at hand.

In: a forward of one pack in the model's own precision. Out: the largest error of packed attention against fp32 on the
same input, relative to the rounding of that precision there. Errors of a whole model say nothing here: in bf16 rounding
alone moves the rewards of 30 layers by a tenth of their spread, and would hide a wrong key or window.
Cost: attention over the pack three times more, one of them in fp32; the scores of one sequence are held at a time.
Shapes: L tokens of one sequence; query [1, H, T, D], key [1, H_kv, T, D], value [1, H_kv, T, D_v] as in `attention.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rmtool import attention
from rmtool.forest import NO_PARENT
from rmtool.packing import PackLayout

NAME = "rmtool_packed_check"
QUERIES = 256  # rows of attention scores held at a time


class KernelCheck:
    """An attention function that calls the packed one and compares it with each sequence alone, in fp32.

    Attributes:
        worst: the largest error of an output vector (one layer, head and token) so far. 1 is what stock attention in
            the same precision and one rounding of each product come to together; 0 where nothing ran in half precision.
    """

    def __init__(self) -> None:
        self.worst = 0.0
        AttentionInterface.register(NAME, self)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **given: Any,
    ) -> tuple[torch.Tensor, None]:
        output, _ = ALL_ATTENTION_FUNCTIONS[attention.NAME](module, query, key, value, attention_mask, **given)
        dtype, device = query.dtype, query.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if dtype in attention.HALF:
            rounded = tuple(tensor.to(dtype) for tensor in (query, key, value))
            for rows in sequence_rows(given["packed"]):
                q, k, v = (tensor[:, :, rows] for tensor in rounded)
                self._compare(output[0, rows].transpose(0, 1), q, k, v, given)
        return output, None

    def _compare(
        self, got: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, given: dict[str, Any]
    ) -> None:
        """One sequence: `got` [H, L, D_v], and the q, k, v that it should come from."""
        scaling, window = given.get("scaling"), given.get("sliding_window")
        allowed = _allowed(q.shape[2], window, q.device)
        stock = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )[0]
        with torch.autocast(q.device.type, enabled=False):
            exact, scale = _in_fp32(q.float(), k.float(), v.float(), allowed, scaling)
        rounding = torch.finfo(q.dtype).eps / 2 * scale + (stock.float() - exact).norm(dim=-1)
        error = (got.float() - exact).norm(dim=-1)
        # Where the model itself overflows in half precision, attention has nothing to get right.
        share = (error / rounding.clamp_min(torch.finfo(torch.float32).tiny))[exact.isfinite().all(-1)]
        if share.numel():
            self.worst = max(self.worst, float(share.nan_to_num(nan=torch.inf).max()))


def sequence_rows(layout: PackLayout) -> Iterator[torch.Tensor]:
    """For each node that ends a path: the places in the pack of the path's tokens, int64[L]."""
    starts = layout.cu_seqlens_q.tolist()
    inner = set(layout.parents)
    for leaf in range(len(layout.parents)):
        if leaf in inner:
            continue
        pieces, node = list[torch.Tensor](), leaf
        while node != NO_PARENT:
            pieces.append(torch.arange(starts[node], starts[node + 1], device=layout.kv_index.device))
            node = layout.parents[node]
        yield torch.cat(pieces[::-1])


def _allowed(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool[L, L]: which keys (columns) each query sees."""
    ago = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (ago >= 0) & (ago < (length if window is None else window))


def _in_fp32(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, scaling: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: the outputs [H, L, D_v], and the mean length of the values that each averages [H, L]."""
    groups = q.shape[1] // k.shape[1]
    k, v = (tensor[0].repeat_interleave(groups, dim=0) for tensor in (k, v))
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    outputs, scales = [], []
    for queries, mask in zip(q[0].split(QUERIES, dim=1), allowed.split(QUERIES), strict=True):
        shares = (queries @ k.transpose(1, 2) * scaling).masked_fill(~mask, -torch.inf).softmax(-1)
        outputs.append(shares @ v)
        scales.append((shares @ v.norm(dim=-1, keepdim=True))[..., 0])
    return torch.cat(outputs, dim=1), torch.cat(scales, dim=1)
