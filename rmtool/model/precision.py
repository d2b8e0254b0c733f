"""A half-precision model computing in fp32, with one layer's weights in fp32 at a time.

In: a backbone with bf16, fp16 or 4-bit weights. Out: a block in which its forwards compute in fp32 (outside autocast),
from the same weights.
Cost: the largest layer in fp32 while that layer runs, and one more read and write of the weights per forward; nothing
where the weights are fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

STACKS = (nn.ModuleList, nn.ModuleDict)


@contextlib.contextmanager
def fp32_compute(backbone: PreTrainedModel) -> Iterator[None]:
    """Compute in fp32 inside the block. Leaves every weight as it was; not for forwards that keep gradients."""
    with contextlib.ExitStack() as stack:
        for module in _units(backbone):
            if any(_is_half(parameter) for parameter in module.parameters()):
                if isinstance(module, nn.Embedding):  # the largest matrix, of which few rows are read
                    stack.callback(module.register_forward_hook(lambda _, __, output: output.float()).remove)
                else:
                    _widen_while_it_runs(module, stack)
        for module in backbone.modules():
            if hasattr(module, "compute_type_is_set"):  # bitsandbytes
                _compute_4bit_in_fp32(module, stack)
        yield


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of each stack, and the modules next to the stacks."""
    for child in module.children():
        if isinstance(module, STACKS) and not isinstance(child, STACKS):
            yield child  # a layer, with stacks of its own inside (experts) or without
        elif any(isinstance(inner, STACKS) for inner in child.modules()):
            yield from _units(child)
        else:
            yield child


def _is_half(parameter: nn.Parameter) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)


def _widen_while_it_runs(module: nn.Module, stack: contextlib.ExitStack) -> None:
    half = dict[nn.Parameter, torch.Tensor]()

    def widen(*_: Any) -> None:
        for parameter in module.parameters():
            if _is_half(parameter):
                half[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(*_: Any) -> None:
        for parameter, data in half.items():
            parameter.data = data
        half.clear()

    stack.callback(restore)
    stack.callback(module.register_forward_pre_hook(widen).remove)
    stack.callback(module.register_forward_hook(restore).remove)


def _compute_4bit_in_fp32(layer: nn.Module, stack: contextlib.ExitStack) -> None:
    """For bitsandbytes' Linear4bit, which settles what it computes in at its first forward."""
    stack.callback(vars(layer).update, compute_dtype=layer.compute_dtype, compute_type_is_set=layer.compute_type_is_set)
    vars(layer).update(compute_dtype=torch.float32, compute_type_is_set=True)
