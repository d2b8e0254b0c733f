"""Compute precision: what this machine supports, and fp32 forwards of a half-precision model.

In: the precision that a recipe or an option names; or a backbone with bf16, fp16 or 4-bit weights. Out: the precision
to compute in, and a context that computes in it; or one in which the backbone computes in fp32 (outside autocast) from
the same weights.
Cost: of the fp32 forwards, the largest layer in fp32 while it runs, and one more read and write of the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP16_MAX = 65504.0
AMPERE = (8, 0)  # CUDA capability
STACKS = (nn.ModuleList, nn.ModuleDict)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def lacks_bf16() -> bool:
    """Whether this CPU has no bf16 instructions; torch's bf16 products are then some ten times slower than fp32."""
    has = torch.cpu.get_capabilities()
    return has.get("architecture") == "x86_64" and not (has.get("amx_bf16") or has.get("avx512_bf16"))


def lacks_fp16() -> bool:
    """Whether this CPU has no fp16 instructions (AVX512-FP16, AMX-FP16)."""
    has = torch.cpu.get_capabilities()
    return has.get("architecture") == "x86_64" and not (has.get("amx_fp16") or has.get("avx512_fp16"))


def fast_bf16_device() -> str | None:
    """Name what multiplies bf16 matrices several times faster than fp32 here: a CPU with AMX, or a GPU.

    AVX-512 instructions alone are about twice as fast. The GPU's model is not queried: that would initialize CUDA,
    which a launcher must not do.
    """
    if torch.cuda.device_count():
        return "GPUs since NVIDIA's Ampere"
    return "this CPU" if torch.cpu.get_capabilities().get("amx_bf16") else None


def compute_precision(precision: str) -> str:
    """The precision to compute in where `precision` is asked for.

    auto is the fastest that keeps the rewards of fp32: on a GPU fp16, which has three bits more than bf16 at the same
    speed; on a CPU fp32. No CPU measured multiplies fp16 faster than fp32, and bf16 products split into two or three
    terms are no faster either (scripts/bench/SPEED.md).
    """
    on_cpu = default_device().type == "cpu"
    if precision == "auto":
        return "fp32" if on_cpu else "fp16"
    return "fp32" if _lacks(precision) else precision


def _lacks(precision: str) -> bool:
    """Whether this device would be slower in `precision` than in fp32, or not compute in it at all."""
    if default_device().type == "cuda":
        # Of inference alone: a launcher, which asks for fp32 and bf16, must not initialize CUDA.
        return precision == "tf32" and torch.cuda.get_device_capability() < AMPERE
    lacks = {"bf16": lacks_bf16, "fp16": lacks_fp16, "tf32": lambda: True}
    return precision in lacks and lacks[precision]()


def precision_notices(precision: str, shared: bool = False) -> list[str]:
    """Notices for the user where `precision` is not what is computed in, or is slow.

    Args:
        shared: whether the model shares prefixes. The attention kernel for that is one of half precision.
    """
    used, device = compute_precision(precision), default_device().type
    if precision not in ("auto", used):
        return [f"{precision} is not supported by this {'CPU' if device == 'cpu' else 'GPU'}; computing in {used}"]
    if PRECISIONS[used] == torch.float32 and shared and device == "cuda":
        faster = "bf16 or fp16"
        return [f"{used} on a GPU is many times slower than {faster}: attention over shared prefixes runs node by node"]
    return []


@contextlib.contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Compute forwards in `precision`: half precision by autocast, fp32 without TF32 products, tf32 with them."""
    half = PRECISIONS[precision] != torch.float32
    # Autocast's cache would keep a copy of every weight until the end of the forward; none is used twice.
    autocast = torch.autocast(device.type, PRECISIONS[precision] if half else None, half, cache_enabled=False)
    with autocast, contextlib.nullcontext() if half else _tf32_products(precision == "tf32"):
        yield


@contextlib.contextmanager
def _tf32_products(allowed: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def loading_dtype(precision: str, stored: Mapping[str, int], free: int | None) -> torch.dtype:
    """The dtype to read a model's matrices in: on a GPU that of the file, where its fp32 rewards are wanted first.

    Args:
        stored: numbers of the checkpoint's weights by safetensors' names of dtypes.
        free: bytes of GPU memory; None on a CPU, where autocast copies fp32 weights anyway.
    """
    dtype = PRECISIONS[precision]
    if free is None or dtype == torch.float32:
        return torch.float32
    if stored.keys() in ({"BF16"}, {"F16"}):  # neither holds every number of the other
        return torch.bfloat16 if "BF16" in stored else torch.float16
    return torch.float32 if 4 * sum(stored.values()) < free / 2 else dtype


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


@contextlib.contextmanager
def fp32_weights(module: nn.Module) -> Iterator[None]:
    """Hold the module's half-precision weights in fp32 inside the context."""
    half = {parameter: parameter.data for parameter in module.parameters() if _is_half(parameter)}
    for parameter in half:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, data in half.items():
            parameter.data = data


def _upcast_while_it_runs(module: nn.Module, stack: contextlib.ExitStack) -> None:
    running = stack.enter_context(contextlib.ExitStack())

    def upcast(*_: Any) -> None:
        running.enter_context(fp32_weights(module))

    def restore(*_: Any) -> None:
        running.close()

    stack.callback(module.register_forward_pre_hook(upcast).remove)
    stack.callback(module.register_forward_hook(restore).remove)


def _compute_4bit_in_fp32(layer: nn.Module, stack: contextlib.ExitStack) -> None:
    """For bitsandbytes' Linear4bit, which fixes its compute dtype at its first forward."""
    stack.callback(vars(layer).update, compute_dtype=layer.compute_dtype, compute_type_is_set=layer.compute_type_is_set)
    vars(layer).update(compute_dtype=torch.float32, compute_type_is_set=True)
