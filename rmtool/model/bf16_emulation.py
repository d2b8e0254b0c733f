"""Matrix products of bfloat16 numbers on a CPU that has no instructions for them.

In: the operations that torch runs inside a `wide_products` block, with gradients or under no_grad (under inference_mode
torch hands on larger operations, which are left alone). Out: the same matrix products; torch would compute them in
loops, some ten times slower than in fp32 (scripts/bench/SPEED.md). A product of two bfloat16 numbers is exact in fp32,
and hardware adds such products up in fp32 too: only the order of the sums can differ. Attention keeps its
probabilities in fp32 and rounds its result.
Cost: a copy of both factors in fp32 while a product runs; about 10 us of Python per operation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_ATEN = torch.ops.aten
_ROUNDED = {
    *(_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
# Its second result, the logarithm of the softmax's sum, is fp32 anyway.
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu.default


def lacks_bf16() -> bool:
    """Whether this CPU has no instructions for bfloat16 products."""
    has = torch.cpu.get_capabilities()
    return has.get("architecture") == "x86_64" and not (has.get("amx_bf16") or has.get("avx512_bf16"))


def fast_bf16_device() -> str | None:
    """What multiplies bfloat16 matrices several times faster here than fp32: a CPU with AMX (AVX-512's instructions
    alone are about twice as fast), or a GPU. Asking a GPU which one it is would start CUDA, which a launcher must not.
    """
    if torch.cuda.device_count():
        return "GPUs since NVIDIA's Ampere"
    return "this CPU" if torch.cpu.get_capabilities().get("amx_bf16") else None


def wide_products(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """A block for forwards and backwards in `precision`; it changes nothing where bfloat16 is fast or not used."""
    if device.type != "cpu" or precision == "fp32" or not lacks_bf16():
        return contextlib.nullcontext()
    return _WideProducts()


class _WideProducts(TorchDispatchMode):
    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        half = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.bfloat16
        if half and func in _ROUNDED:
            return _each(_round, _in_fp32(func, args, kwargs))
        if half and func is _ATTENTION:
            output, *rest = _in_fp32(func, args, kwargs)
            return _round(output), *rest
        return func(*args, **kwargs)


def _in_fp32(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*_each(_widen, args), **_each(_widen, kwargs))


def _each(change: Callable[[torch.Tensor], torch.Tensor], tensors: Any) -> Any:
    return tree_map_only(torch.Tensor, change, tensors)


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _round(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16()
