"""The decoder layers of a backbone: where they are, and compiled.

In: a transformers backbone. Out: its stack of layers; or the same layers, each compiled once for all lengths.
Cost of compiling: some 20 s at a run's first step, again at its first evaluation, more where layers differ in kind.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def decoder_layers(backbone: PreTrainedModel) -> list[nn.Module]:
    """The layers in order; none where the stack cannot be told from other lists of modules."""
    return list(_stack(backbone) or ())


def keep_first_layers(backbone: PreTrainedModel, count: int) -> None:
    """Take all but the first `count` layers out; the stack must be known."""
    stack = _stack(backbone)
    assert stack is not None
    del stack[count:]
    backbone.config.get_text_config().num_hidden_layers = count


def _stack(backbone: PreTrainedModel) -> nn.ModuleList | None:
    count = backbone.config.get_text_config().num_hidden_layers
    stacks = [module for module in backbone.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return stacks[0] if len(stacks) == 1 else None


def compile_layers(backbone: PreTrainedModel, backend: str = "inductor") -> int:
    """Let torch compile each layer but the last; returns how many.

    Lengths are symbols, so that packs of any size run the same code, and layers of one kind share it. Attention over a
    pack stays as it is (`attention.py`), and so does the last layer, whose hooks pick rows (`readout.py`).
    """
    layers = decoder_layers(backbone)[:-1]
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    return len(layers)
