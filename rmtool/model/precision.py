"""Compute precision: what this machine supports, and fp32 forwards of a half-precision model.

In: the precision that a recipe or checkpoint names; or a backbone with bf16, fp16 or 4-bit weights. Out: the precision
to compute in; or a context in which the backbone computes in fp32 (outside autocast) from the same weights.
Cost: of the fp32 forwards, the largest layer in fp32 while it runs, and one more read and write of the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STACKS = (nn.ModuleList, nn.ModuleDict)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def lacks_bf16() -> bool:
    """Whether this CPU has no bf16 instructions; torch's bf16 products are then some ten times slower than fp32."""
    has = torch.cpu.get_capabilities()
    return has.get("architecture") == "x86_64" and not (has.get("amx_bf16") or has.get("avx512_bf16"))


def fast_bf16_device() -> str | None:
    """Name what multiplies bf16 matrices several times faster than fp32 here: a CPU with AMX, or a GPU.

    AVX-512 instructions alone are about twice as fast. The GPU's model is not queried: that would initialize CUDA,
    which a launcher must not do.
    """
    if torch.cuda.device_count():
        return "GPUs since NVIDIA's Ampere"
    return "this CPU" if torch.cpu.get_capabilities().get("amx_bf16") else None


def compute_precision(precision: str) -> str:
    """The precision to compute in where `precision` is asked for: fp32 on a CPU without bf16 instructions."""
    return "fp32" if default_device().type == "cpu" and lacks_bf16() else precision


def precision_notices(precision: str, shared: bool = False) -> list[str]:
    """Notices for the user where `precision` is not what is computed in, or is slow.

    Args:
        shared: whether the model shares prefixes. The attention kernel for that is one of half precision.
    """
    used = compute_precision(precision)
    if used != precision:
        return [f"{precision} is not supported by this CPU; computing in {used}"]
    if used == "fp32" and shared and default_device().type == "cuda":
        return ["fp32 on a GPU is many times slower than bf16: attention over shared prefixes runs node by node"]
    return []


@contextlib.contextmanager
def fp32_compute(backbone: PreTrainedModel) -> Iterator[None]:
    """Compute in fp32 inside the context. Every weight is restored at its end; not for forwards with gradients."""
    with contextlib.ExitStack() as stack:
        for module in _layers_and_others(backbone):
            if isinstance(module, nn.Embedding):  # the largest matrix, of which few rows are used
                stack.callback(module.register_forward_hook(lambda _, __, output: output.float()).remove)
            else:
                _upcast_while_it_runs(module, stack)  # also fp32 weights, which FSDP2 gathers in bf16
        for module in backbone.modules():
            if hasattr(module, "compute_type_is_set"):  # bitsandbytes
                _compute_4bit_in_fp32(module, stack)
        yield


def _layers_and_others(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of each stack, and the modules next to the stacks."""
    for child in module.children():
        if isinstance(module, STACKS) and not isinstance(child, STACKS):
            yield child  # a layer, which may contain stacks (experts)
        elif any(isinstance(inner, STACKS) for inner in child.modules()):
            yield from _layers_and_others(child)
        else:
            yield child


def _is_half(parameter: nn.Parameter) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)


def _upcast_while_it_runs(module: nn.Module, stack: contextlib.ExitStack) -> None:
    half = dict[nn.Parameter, torch.Tensor]()

    def upcast(*_: Any) -> None:
        for parameter in module.parameters():
            if _is_half(parameter):
                half[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(*_: Any) -> None:
        for parameter, data in half.items():
            parameter.data = data
        half.clear()

    stack.callback(restore)
    stack.callback(module.register_forward_pre_hook(upcast).remove)
    stack.callback(module.register_forward_hook(restore).remove)


def _compute_4bit_in_fp32(layer: nn.Module, stack: contextlib.ExitStack) -> None:
    """For bitsandbytes' Linear4bit, which fixes its compute dtype at its first forward."""
    stack.callback(vars(layer).update, compute_dtype=layer.compute_dtype, compute_type_is_set=layer.compute_type_is_set)
    vars(layer).update(compute_dtype=torch.float32, compute_type_is_set=True)
