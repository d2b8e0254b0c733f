"""The decoder layers of a backbone: where they are, how to shorten the stack, and how to compile them.

In: a transformers backbone. Out: its stack of layers; or the same layers, each compiled once for all lengths.
Cost: of compiling, some 20 s at a run's first step and again at its first evaluation; more for layers of several kinds.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def decoder_layers(backbone: PreTrainedModel) -> list[nn.Module]:
    """List the layers in order; empty where the stack cannot be told from other lists of modules."""
    return list(_stack(backbone) or ())


def keep_first_layers(backbone: PreTrainedModel, count: int) -> None:
    """Remove all but the first `count` layers; the stack must be known."""
    stack = _stack(backbone)
    assert stack is not None
    del stack[count:]
    backbone.config.get_text_config().num_hidden_layers = count


def _stack(backbone: PreTrainedModel) -> nn.ModuleList | None:
    count = backbone.config.get_text_config().num_hidden_layers
    stacks = [module for module in backbone.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return stacks[0] if len(stacks) == 1 else None


def compile_layers(backbone: PreTrainedModel, backend: str = "inductor") -> int:
    """Compile each decoder layer with torch.compile; returns how many.

    Lengths are symbols, so that packs of any size run the same code, and layers of one kind share it. Packed attention
    is left out (`attention.py`).
    """
    layers = decoder_layers(backbone)
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    return len(layers)


def uncompile_layers(backbone: PreTrainedModel) -> None:
    """Undo `compile_layers`."""
    for layer in decoder_layers(backbone):
        layer._compiled_call_impl = None
