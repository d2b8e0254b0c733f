"""Overflow of fp16: layers whose outputs leave its range are found, and computed with scaled inputs from then on.

In: a backbone, and forwards of it under fp16 autocast. Out: for each forward, whether every output of every layer with
a matrix was finite. What a layer makes of inf or NaN is inf or NaN, so that one which an activation function would hide
(relu of -inf) is found at the next layer at the latest, or here before it.
Scaling: each row of a linear layer's input is divided by a power of two, and its output in fp32 multiplied by it. Both
are exact, and by the Cauchy-Schwarz inequality |x . w| <= |x| |w|, so no output can overflow.
Cost: one read of each layer's output; of a scaled layer, some more passes over input and output.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rmtool.model.precision import FP16_MAX, fp32_weights

Ranges = list[tuple[str, tuple[torch.Tensor, torch.Tensor]]]  # of a forward: layer, its smallest and largest output


class OverflowGuard:
    """The fp16 overflows of a model.

    Attributes:
        forwards: watched forwards.
        repeated: those with inf or NaN, which were computed again in fp32.
        adapted: names of the layers that overflowed and their siblings (gate, up and down projection), which are
            computed with scaled inputs, or, if they are not linear layers, in fp32.
    """

    def __init__(self, backbone: nn.Module):
        self._layers = [
            (name, module)
            for name, module in backbone.named_modules()
            if not isinstance(module, nn.Embedding) and any(p.dim() > 1 for p in module.parameters(recurse=False))
        ]
        self.forwards = self.repeated = 0
        self.adapted: list[str] = []
        self._before: list[tuple[nn.Module, Any]] = []  # adapted modules and their own forwards, None for their class's

    @contextlib.contextmanager
    def watch(self) -> Iterator[Ranges]:
        """Collect the ranges of all layers of a forward inside the context, in the order in which they run."""
        ranges, self.forwards = Ranges(), self.forwards + 1

        def note(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
            for part in output if isinstance(output, tuple) else (output,):
                if isinstance(part, torch.Tensor) and part.is_floating_point() and part.numel():
                    ranges.append((name, part.detach().aminmax()))

        hooks = [module.register_forward_hook(functools.partial(note, name)) for name, module in self._layers]
        try:
            yield ranges
        finally:
            for hook in hooks:
                hook.remove()

    def adapt(self, ranges: Ranges) -> None:
        """Adapt the layer that was the first to overflow in a forward, and its siblings."""
        first = next((name for name, bounds in ranges if not all(bound.isfinite() for bound in bounds)), None)
        if first is None:
            return
        parent = first.rpartition(".")[0]
        for name, module in self._layers:
            if name.rpartition(".")[0] == parent and name not in self.adapted:
                self.adapted.append(name)
                self._before.append((module, vars(module).get("forward")))
                _adapt(module)

    def describe(self) -> str:
        """Say how many forwards were repeated, and which layers are adapted."""
        layers = f"; from then on scaled: {', '.join(self.adapted)}" if self.adapted else ""
        return f"inf or NaN in fp16 in {self.repeated} of {self.forwards} packs, computed again in fp32{layers}"

    def release(self) -> None:
        """Let the adapted layers compute as before: those of a model in training get new weights, and other forwards
        than fp16's must not change.
        """
        for module, forward in self._before:
            del module.forward
            if forward is not None:
                setattr(module, "forward", forward)  # noqa: B010 - mypy takes it for a method
        self._before.clear()
        self.adapted.clear()


def all_finite(ranges: Ranges) -> torch.Tensor:
    """bool[], on the device: whether no layer of a forward had an output of inf or NaN."""
    return torch.stack([bound for _, bounds in ranges for bound in bounds]).isfinite().all()


def beyond_fp16(backbone: nn.Module) -> list[str]:
    """List the matrices with a weight that fp16 cannot hold: beyond its range, or inf where it was cast already. Those
    with NaN are not listed: no precision helps.
    """
    return [
        name
        for name, weight in backbone.named_parameters()
        if weight.dim() > 1 and max(map(abs, torch.stack(weight.detach().aminmax()).tolist())) > FP16_MAX
    ]


def _adapt(module: nn.Module) -> None:
    if type(module) is nn.Linear:
        largest = float(module.weight.detach().float().norm(dim=1).max())
        adapted: Callable[..., Any] = functools.partial(_scaled_linear, module, max(largest, 1.0))
    else:
        adapted = functools.partial(_fp32_forward, module, module.forward)
    setattr(module, "forward", adapted)  # noqa: B010 - mypy takes it for a method


def _scaled_linear(layer: nn.Linear, largest: float, x: torch.Tensor) -> torch.Tensor:
    """The layer's output in fp32; `largest` is the length of its longest row of weights, or 1."""
    if not torch.is_autocast_enabled(x.device.type):
        return F.linear(x, layer.weight, layer.bias)
    x = x.float()
    bound = x.norm(dim=-1, keepdim=True) * (largest / (FP16_MAX / 2))
    scale = torch.exp2(bound.clamp_min(1.0).log2().ceil())
    output = F.linear(x / scale, layer.weight).float() * scale
    return output if layer.bias is None else output + layer.bias


def _fp32_forward(module: nn.Module, forward: Callable[..., Any], *args: Any, **given: Any) -> Any:
    device = next(module.parameters()).device.type
    if not torch.is_autocast_enabled(device):
        return forward(*args, **given)
    with torch.autocast(device, enabled=False), fp32_weights(module):
        return forward(*map(_as_fp32, args), **{name: _as_fp32(value) for name, value in given.items()})


def _as_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
