"""What a layer makes of its attention scores, and attention written out for layers that torch's kernels do not know.

In: the queries of one node, and the keys and values of its path. Out: the attention outputs with a soft cap (Gemma 2)
or sinks (gpt-oss).
Cost: scores of a block of queries are held in fp32, those of all blocks for the backward.
Shapes: H query heads, K key and value heads, G query heads of each, D head size, 1 the batch; Q query and P key tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionParams:
    """How scores become attention weights.

    scaling: of products of queries and keys; None: 1 / sqrt(D)
    window:  keys that a query sees, itself included; None: all
    softcap: scores are softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118, section 2); None: as they are
    sinks:   float[H], in each head one more score in the denominator of the softmax (gpt-oss); None: none
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def scale(self, size: int) -> float:
        """The scaling for heads of this size."""
        return size**-0.5 if self.scaling is None else self.scaling

    @property
    def has_kernel(self) -> bool:
        """Whether torch's attention kernels compute this."""
        return self.softcap is None and self.sinks is None


def written_attention(
    q_1HQD: torch.Tensor,
    k_1KPD: torch.Tensor,
    v_1KPD: torch.Tensor,
    mask_QP: torch.Tensor,
    params: AttentionParams,
    block: int,
) -> torch.Tensor:
    """Compute the attention outputs [1, H, Q, D]; products in autocast's dtype, scores and weights in fp32.

    Args:
        mask_QP: which keys each query sees; the last query is the token of the last key.
        block: queries whose scores are computed at one time, with the keys that they see.
    """
    later = k_1KPD.shape[2] - q_1HQD.shape[2]
    outputs = []
    for start in range(0, q_1HQD.shape[2], block):
        seen = later + min(start + block, q_1HQD.shape[2])
        given = q_1HQD[:, :, start : start + block], k_1KPD[:, :, :seen], v_1KPD[:, :, :seen]
        outputs.append(_one_block(*given, mask_QP[start : start + block, :seen], params))
    return torch.cat(outputs, dim=2)


def _one_block(
    q_1HQD: torch.Tensor, k_1KPD: torch.Tensor, v_1KPD: torch.Tensor, mask_QP: torch.Tensor, params: AttentionParams
) -> torch.Tensor:
    _, heads, queries, size = q_1HQD.shape
    kv_heads, keys = k_1KPD.shape[1:3]
    groups = heads // kv_heads  # query heads g of a key head are neighbors: no copy of the keys for each
    products = q_1HQD.reshape(1, kv_heads, groups * queries, size) @ k_1KPD.transpose(2, 3)
    exact = products.to(torch.promote_types(products.dtype, torch.float32))
    scores_1KGQP = exact.view(1, kv_heads, groups, queries, keys) * params.scale(size)
    if params.softcap is not None:
        scores_1KGQP = params.softcap * torch.tanh(scores_1KGQP / params.softcap)
    scores_1KGQP = scores_1KGQP.masked_fill(~mask_QP, -torch.inf)
    total = scores_1KGQP.logsumexp(-1, keepdim=True)
    if params.sinks is not None:
        total = torch.logaddexp(total, params.sinks.to(total.dtype).view(1, kv_heads, groups, 1, 1))
    weights = (scores_1KGQP - total).exp().view(1, kv_heads, groups * queries, keys)
    return (weights.to(v_1KPD.dtype) @ v_1KPD).view(1, heads, queries, v_1KPD.shape[-1])
