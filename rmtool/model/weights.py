"""A trained classifier's weights as in an ordinary checkpoint: gathered, merged, under transformers' names.

In: a classifier whose parameters may be partitioned (ZeRO-3, FSDP2), have adapters, or be in 4 bits. Out: its state
dict, one tensor at a time, on the CPU, and a classifier without memory that saves it. The classifier itself is not
changed and can train on.
Cost: one gather and one copy per tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rmtool.model.classifier import without_zero3_init, zero3_gathered

BASE = ".base_layer."  # where peft moves the weights of a layer with adapters


def merged_weights(classifier: nn.Module, dtype: torch.dtype, keep: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of the state dict, floating-point tensors in `dtype`. Where parameters are partitioned, all
    ranks must exhaust the iterator; it yields nothing where `keep` is false, and copies nothing to the CPU.
    """
    parameters = dict(classifier.named_parameters(remove_duplicate=False))
    known = parameters | dict(classifier.named_buffers(remove_duplicate=False))
    for name in classifier.state_dict():
        if name not in known or ".lora_" in name:  # adapters, and how 4-bit weights are quantized
            continue
        module: Any = classifier.get_submodule(name.rpartition(BASE)[0]) if BASE in name else None
        needed = [parameters[name]] if name in parameters else []
        needed += [value for part, value in module.named_parameters() if "lora_" in part] if module else []
        with torch.no_grad(), zero3_gathered(needed):
            weight = _dequantized(known[name])
            if module is not None and name.endswith(".weight"):
                weight = weight.float() + module.get_delta_weight("default").float()
            if isinstance(weight, DTensor):
                weight = weight.full_tensor()
            if keep:
                save_dtype = dtype if weight.is_floating_point() else weight.dtype
                yield name.replace(BASE, "."), weight.to("cpu", save_dtype, copy=True)


def _dequantized(weight: torch.Tensor) -> torch.Tensor:
    state: Any = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


def meta_copy(classifier: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Build the same classifier on the meta device, without adapters or quantization; its
    `save_pretrained(folder, state_dict=...)` writes an ordinary checkpoint.
    """
    config = copy.deepcopy(classifier.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.problem_type = "regression"  # to transformers' pipeline and vLLM: the reward is the logit, without a sigmoid
    with without_zero3_init(), torch.device("meta"):
        empty = type(classifier)(config)
    empty.to(dtype=dtype)  # type: ignore[call-arg]  # transformers wraps its signature
    if hasattr(classifier, "_weight_conversions"):  # the names and shapes that the weights had when they were loaded
        empty._weight_conversions = classifier._weight_conversions
    return empty
