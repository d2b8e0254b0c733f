"""Liger's kernels in a classifier: norms, rotary embedding and MLP.

In: a classifier. Out: the same with Liger's forwards where they compute the same function, or unchanged; a notice.
Cost: nothing; the kernels are compiled at the first forward.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rmtool.errors import first_line

# The activation that each of Liger's MLPs computes, whatever the config says; by the argument that turns it off.
ACTIVATIONS = {"swiglu": {"silu", "swish"}, "geglu": {"gelu_pytorch_tanh"}}
# Not its loss, which would replace the model's forward by that of a causal LM, with a head that a reward model lacks;
# nor the activation that it puts into transformers' table, for all models of the process.
OFF = {"fused_linear_cross_entropy": False, "cross_entropy": False, "relu_squared": False}


def apply_liger(classifier: PreTrainedModel) -> str:
    """Install the kernels that Liger has for this model, in place; returns a notice for the user."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        return f"Liger kernels: off ({first_line(error)})"
    decoder = getattr(classifier, classifier.base_model_prefix).get_decoder()
    config = decoder.config
    patch = MODEL_TYPE_TO_APPLY_LIGER_FN.get(config.model_type)
    if patch is None:
        return f"Liger kernels: off (none for {config.model_type})"
    used = {getattr(config, name, None) for name in ("hidden_act", "hidden_activation")} - {None}
    chosen = OFF | {name: used <= same for name, same in ACTIVATIONS.items()}
    known = inspect.signature(patch).parameters
    before = {module: vars(module).get("forward") for module in decoder.modules()}
    try:
        with _unchanged_classes(decoder), _unchanged_on_error(decoder):
            # The decoder, not the classifier: some of Liger's functions refuse any class but those they know.
            patch(model=decoder, **{name: value for name, value in chosen.items() if name in known})
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        return f"Liger kernels: off ({config.model_type}: {first_line(error)})"
    patched = sorted(
        {module._get_name() for module, forward in before.items() if vars(module).get("forward") != forward}
    )
    return f"Liger kernels: on ({', '.join(patched)})"


@contextlib.contextmanager
def _unchanged_classes(decoder: nn.Module) -> Iterator[None]:
    """Restore the family's classes, which Liger replaces for all models built later. Its rotary embedding is a function
    that the layers look up at each call, and stays.
    """
    names = vars(sys.modules[type(decoder).__module__])
    classes = {name: value for name, value in names.items() if isinstance(value, type)}
    try:
        yield
    finally:
        names.update(classes)


@contextlib.contextmanager
def _unchanged_on_error(decoder: nn.Module) -> Iterator[None]:
    """Leave neither the modules nor the family's functions half patched."""
    owners: list[Any] = [sys.modules[type(decoder).__module__], *decoder.modules()]
    before = [(vars(owner), dict(vars(owner))) for owner in owners]
    try:
        yield
    except BaseException:
        for values, old in before:
            values.clear()
            values.update(old)
        raise
