"""Half-precision packed attention, judged on the queries, keys and values of a forward of the model at hand.

In: a forward of one pack in the model's own precision. Out: the largest error of packed attention against fp32 on the
same input, relative to the rounding of that precision there. Errors of a whole model say nothing here: in bf16 rounding
alone moves the rewards of 30 layers by a tenth of their spread, and would hide a wrong key or window.
Cost: attention over the pack three times more, one of them in fp32; scores of `QUERIES` tokens are held at once.
Shapes: L tokens of one node, P of its path; query [1, H, T, D], key [1, H_kv, T, D], value [1, H_kv, T, D_v] as in
`attention.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rmtool.packing import attention
from rmtool.packing.pack_layout import PackLayout
from rmtool.tokenization.response_group import NO_PARENT

NAME = "rmtool_packed_check"
QUERIES = 256  # rows of attention scores held at a time
ENDS = 4  # half the tokens at each end of a node, and the number between, whose values count in full


class KernelCheck:
    """An attention function that calls the packed one and compares it with each node on its path, in fp32.

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
        attend = ALL_ATTENTION_FUNCTIONS[attention.NAME]
        dtype, device = query.dtype, query.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if dtype in attention.HALF:
            packed = given["packed"]
            spiky = value * _spikes(packed, value.device)[:, None].to(value.dtype)
            tested, _ = attend(module, query, key, spiky, attention_mask, **given)
            q, k, v = (tensor.to(dtype) for tensor in (query, key, spiky))
            for rows, path in node_paths(packed):
                got = tested[0, rows].transpose(0, 1)
                self._compare(got, q[:, :, rows], k[:, :, path], v[:, :, path], given)
        output, _ = attend(module, query, key, value, attention_mask, **given)
        return output, None

    def _compare(
        self, got: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, given: dict[str, Any]
    ) -> None:
        """One node: `got` [H, L, D_v], and the q, k, v that it should come from."""
        scaling, gqa = given.get("scaling"), q.shape[1] != k.shape[1]
        visible = _visible(q.shape[2], k.shape[2], given.get("sliding_window"), q.device)
        blocks = (part.split(QUERIES, dim=dim) for part, dim in ((got, 1), (q, 2), (visible, 0)))
        for some, queries, mask in zip(*blocks, strict=True):
            stock = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=scaling, enable_gqa=gqa)[0]
            with torch.autocast(q.device.type, enabled=False):
                exact, scale = _in_fp32(queries.float(), k.float(), v.float(), mask, scaling)
            rounding = torch.finfo(q.dtype).eps / 2 * scale + (stock.float() - exact).norm(dim=-1)
            error = (some.float() - exact).norm(dim=-1)
            # Where the model itself overflows in half precision, attention has nothing to get right.
            share = (error / rounding.clamp_min(torch.finfo(torch.float32).tiny))[exact.isfinite().all(-1)]
            if share.numel():
                self.worst = max(self.worst, float(share.nan_to_num(nan=torch.inf).max()))


def _spikes(layout: PackLayout, device: torch.device) -> torch.Tensor:
    """float[T], what to multiply values by, so that few keys of a long node make up most of its outputs: its ends,
    where windows begin, and some between. One wrong key of 4,096 that count alike is less than rounding.
    """
    factors = []
    for length in layout.lengths:
        node = torch.full((length,), 1 / length, device=device)
        node[: 2 * ENDS] = node[-2 * ENDS :] = node[:: max(1, length // ENDS)] = 1
        factors.append(node)
    return torch.cat(factors)


def node_paths(layout: PackLayout) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each node: the places in the pack of its own tokens, int64[L], and of those of its path, int64[P].

    From the parents, on purpose: the kernel for GPUs reads `kv_index`, which must not be judged by itself.
    """
    starts, paths = layout.cu_seqlens_q.tolist(), list[torch.Tensor]()
    for node, parent in enumerate(layout.parents):
        own = torch.arange(starts[node], starts[node + 1], device=layout.kv_index.device)
        paths.append(own if parent == NO_PARENT else torch.cat([paths[parent], own]))
        yield own, paths[node]


def _visible(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool[L, P]: which keys each query sees; the last query stands at the last key."""
    ago = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (ago >= 0) & (ago < (keys if window is None else window))


def _in_fp32(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scaling: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: the outputs [H, L, D_v], and the mean length of the values that each averages [H, L]."""
    groups = q.shape[1] // k.shape[1]
    k, v = (tensor[0].repeat_interleave(groups, dim=0) for tensor in (k, v))
    scores = q[0] @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    shares = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return shares @ v, (shares @ v.norm(dim=-1, keepdim=True))[..., 0]
