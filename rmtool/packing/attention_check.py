"""Half-precision packed attention, checked on the queries, keys and values of a forward of the model at hand.

In: a forward of one pack in the model's own precision. Out: the largest error of packed attention against fp32 on the
same input, relative to the rounding of that precision there. Errors of a whole model say nothing here: in bf16 rounding
alone moves the rewards of 30 layers by a tenth of their spread, and would hide a wrong key or window.
Cost: attention over the pack three times more, one of them in fp32; scores of `QUERY_BLOCK` tokens are held at once.
Shapes: T tokens of a pack, H query heads, K key and value heads, D head size (V of values); Q query and P key tokens of
one node.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rmtool.packing import attention, node_attention
from rmtool.packing.packs import PackLayout
from rmtool.packing.written_attention import AttentionParams

NAME = "rmtool_packed_check"
QUERY_BLOCK = 256  # rows of attention scores held at a time
ENDS = 4  # half the tokens at each end of a node, and the number between, whose values count in full


class KernelCheck:
    """An attention function that calls the packed one and compares each node's output with fp32 attention.

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
        query_1HTD: torch.Tensor,
        key_1KTD: torch.Tensor,
        value_1KTV: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **given: Any,
    ) -> tuple[torch.Tensor, None]:
        attend = ALL_ATTENTION_FUNCTIONS[attention.NAME]
        dtype = node_attention.product_dtype(query_1HTD)
        if dtype in attention.HALF:
            packed = given["packed"]
            spiky_1KTV = value_1KTV * _spikes(packed, value_1KTV.device)[:, None].to(value_1KTV.dtype)
            tested_1THV, _ = attend(module, query_1HTD, key_1KTD, spiky_1KTV, attention_mask, **given)
            q, k, v = (tensor.to(dtype) for tensor in (query_1HTD, key_1KTD, spiky_1KTV))
            for rows_Q, path_P in key_positions(packed):
                got_HQV = tested_1THV[0, rows_Q].transpose(0, 1)
                self._compare(got_HQV, q[:, :, rows_Q], k[:, :, path_P], v[:, :, path_P], given)
        output_1THV, _ = attend(module, query_1HTD, key_1KTD, value_1KTV, attention_mask, **given)
        return output_1THV, None

    def _compare(
        self, got_HQV: torch.Tensor, q_1HQD: torch.Tensor, k: torch.Tensor, v: torch.Tensor, given: dict[str, Any]
    ) -> None:
        """Compare one node's output with attention of its q over k [1, K, P, D] and v [1, K, P, V]."""
        names = ("scaling", "sliding_window", "softcap", "s_aux")
        params = AttentionParams(*(given.get(name) for name in names))
        later = k.shape[2] - q_1HQD.shape[2]
        for start in range(0, q_1HQD.shape[2], QUERY_BLOCK):
            q, got = q_1HQD[:, :, start : start + QUERY_BLOCK], got_HQV[:, start : start + QUERY_BLOCK]
            seen = later + start + q.shape[2]
            block = q, k[:, :, :seen], v[:, :, :seen]
            stock = node_attention.attend_node(*block, params)[0]
            with torch.autocast(q.device.type, enabled=False):
                exact, scale = _in_fp32(block[0].float(), block[1].float(), block[2].float(), params)
            rounding = torch.finfo(q.dtype).eps / 2 * scale + (stock.float() - exact).norm(dim=-1)
            error = (got.float() - exact).norm(dim=-1)
            # Where the model itself overflows in half precision, attention has nothing to get right.
            ratio = (error / rounding.clamp_min(torch.finfo(torch.float32).tiny))[exact.isfinite().all(-1)]
            if ratio.numel():
                self.worst = max(self.worst, float(ratio.nan_to_num(nan=torch.inf).max()))


def _spikes(layout: PackLayout, device: torch.device) -> torch.Tensor:
    """float[T], factors for the values, so that few keys of a long node make up most of its outputs: its ends, where
    windows begin, and some between. One wrong key of 4,096 that count alike is less than rounding.
    """
    factors = []
    for length in layout.lengths:
        node = torch.full((length,), 1 / length, device=device)
        node[: 2 * ENDS] = node[-2 * ENDS :] = node[:: max(1, length // ENDS)] = 1
        factors.append(node)
    return torch.cat(factors)


def key_positions(layout: PackLayout) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield for each node the pack positions of its own tokens, int64[Q], and of the tokens of its path, int64[P].

    From `paths`, on purpose: the kernel for GPUs uses `kv_index`, which must not be judged by itself.
    """
    positions = torch.arange(sum(layout.lengths), device=layout.kv_index.device).split(layout.lengths)
    for node, path in enumerate(layout.paths):
        yield positions[node], torch.cat([positions[at] for at in path])


def _in_fp32(
    q_1HQD: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: AttentionParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: the outputs [H, Q, V], and the mean length of the values that each averages [H, Q]."""
    mask_QP = node_attention.causal_mask(q_1HQD.shape[2], k.shape[2], params.window, k.device)
    groups = q_1HQD.shape[1] // k.shape[1]
    k_HPD, v_HPV = (tensor[0].repeat_interleave(groups, dim=0) for tensor in (k, v))
    scores_HQP = q_1HQD[0] @ k_HPD.transpose(1, 2) * params.scale(q_1HQD.shape[-1])
    if params.softcap is not None:
        scores_HQP = (scores_HQP / params.softcap).tanh() * params.softcap
    scores_HQP = scores_HQP.masked_fill(~mask_QP, -torch.inf)
    if params.sinks is not None:
        sinks_HQ1 = params.sinks.float()[:, None, None].expand(*scores_HQP.shape[:2], 1)
        scores_HQP = torch.cat((scores_HQP, sinks_HQ1), dim=-1)
    weights_HQP = scores_HQP.softmax(-1)[..., : mask_QP.shape[1]]
    return weights_HQP @ v_HPV, (weights_HQP @ v_HPV.norm(dim=-1, keepdim=True))[..., 0]
