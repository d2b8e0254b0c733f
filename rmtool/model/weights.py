"""A trained classifier's weights as an ordinary checkpoint has them: whole, merged, under transformers' names.

In: a classifier whose parameters an engine may have cut up, with adapters beside its weights or 4-bit weights. Out: its
state dict, a tensor at a time, on the CPU, and an empty classifier that saves it. The classifier is not changed: it can
train on.
Cost: one gather and one copy per tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rmtool.model.classifier import without_zero3_init, zero3_gathered

BASE = ".base_layer."  # where peft puts the weights beside which adapters stand


def whole_weights(classifier: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the state dict, floating point in `dtype`. Where parameters are cut up, all ranks must go
    through it to its end.
    """
    parameters = dict(classifier.named_parameters(remove_duplicate=False))
    known = parameters | dict(classifier.named_buffers(remove_duplicate=False))
    for name in classifier.state_dict():
        if name not in known or ".lora_" in name:  # adapters, and how 4-bit weights are quantized
            continue
        module: Any = classifier.get_submodule(name.rpartition(BASE)[0]) if BASE in name else None
        cut = [parameters[name]] if name in parameters else []
        cut += [value for part, value in module.named_parameters() if "lora_" in part] if module else []
        with torch.no_grad(), zero3_gathered(cut):
            whole = _dequantized(known[name])
            if module is not None and name.endswith(".weight"):
                whole = whole.float() + module.get_delta_weight("default").float()
            kind = dtype if whole.is_floating_point() else whole.dtype
            yield name.replace(BASE, "."), whole.to("cpu", kind, copy=True)


def _dequantized(weight: torch.Tensor) -> torch.Tensor:
    state: Any = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


def meta_copy(classifier: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A classifier of the same kind without adapters or quantization, and without memory for its weights: its
    `save_pretrained(folder, state_dict=...)` writes an ordinary checkpoint.
    """
    config = copy.deepcopy(classifier.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with without_zero3_init(), torch.device("meta"):
        twin = type(classifier)(config)
    twin.to(dtype=dtype)  # type: ignore[call-arg]  # transformers wraps its signature
    if hasattr(classifier, "_weight_conversions"):  # the names and shapes that the weights had when they were loaded
        twin._weight_conversions = classifier._weight_conversions
    return twin
