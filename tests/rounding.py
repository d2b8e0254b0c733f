"""Half-precision and TF32 matrix products as coarse as hardware could make them, on any CPU.

Real instructions add exact products up in fp32, in an order that depends on the shapes, and round the result. Here the
sum is taken in 2 to 5 parts, how many depends on the number of rows, and each part and each running sum is rounded: a
token's states differ between batches as they do on hardware, and by more. On CPUs without the instructions torch rounds
less, and a token's states are often the same bits in every batch. TF32 has the factors rounded to 10 bits of mantissa,
and sums in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rmtool.model.reward_model import RewardModel
from rmtool.packing.packs import Batch

HALF = (torch.bfloat16, torch.float16)
_ATEN = torch.ops.aten
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu.default


def rounded_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[..., M, K] @ [..., K, N], every part of the sum rounded to the factors' dtype."""
    parts = min(2 + left.shape[-2] % 4, left.shape[-1])
    if left.dtype == torch.float32:
        left, right = _as_tf32(left), _as_tf32(right)
    total = None
    for a, b in zip(left.tensor_split(parts, -1), right.tensor_split(parts, -2), strict=True):
        part = (a.float() @ b.float()).to(left.dtype)
        total = part if total is None else (total.float() + part.float()).to(left.dtype)
    assert total is not None
    return total


def _as_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Round to 10 bits of mantissa, to nearest, ties away from zero."""
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class RoundedProducts(TorchDispatchMode):
    """While it is on, products of matrices of these dtypes are `rounded_matmul`s, attention's two products included."""

    def __init__(self, dtypes: Sequence[torch.dtype] = HALF):
        super().__init__()
        self.dtypes = dtypes

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        half = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype in self.dtypes
        if half and func in (_ATEN.mm.default, _ATEN.bmm.default):
            return rounded_matmul(args[0], args[1])
        if half and func is _ATEN.addmm.default:
            return (args[0].float() + rounded_matmul(args[1], args[2]).float()).to(args[0].dtype)
        if half and func is _ATTENTION:
            return _rounded_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _rounded_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = q.shape[1] // k.shape[1]
    k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
    scores = rounded_matmul(q, k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    shares = scores.softmax(-1).nan_to_num()  # a row that may see nothing (padding) gives zeros
    return rounded_matmul(shares.to(q.dtype), v), scores.logsumexp(-1)


def round_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the forwards of every `RewardModel` in less than fp32 with `RoundedProducts`."""
    real = RewardModel.forward

    def forward(self: RewardModel, batch: Batch) -> torch.Tensor:
        if self.precision == "fp32":
            return real(self, batch)
        with RoundedProducts((torch.float32,) if self.precision == "tf32" else HALF):
            return real(self, batch)

    monkeypatch.setattr(RewardModel, "forward", forward)
