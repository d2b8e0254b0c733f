"""NaN and inf in a step: kept from the weights on every engine, and traced to their rows.

In: rewards, losses and gradients. Out: gradients of NaN, with which no engine takes a step; an error or a note that
names the step, its rows and their ranks.
Cost: two small kernels per pack. Tracing takes a forward and a backward per row, and happens only in a step that fails.
Shapes: N responses and B pairs of a pack, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch import nn

from rmtool.config import TrainConfig
from rmtool.dataset.batches import BatchItem
from rmtool.errors import RmtoolError

_SHOWN = 4  # rows in a message


@dataclass(frozen=True)
class SkippedStep:
    """A step that was not taken: what was NaN or inf, and in which rows (`file:line`, with the rank if several)."""

    step: int
    what: str
    rows: tuple[str, ...]

    def __str__(self) -> str:
        more = f" and {len(self.rows) - _SHOWN:,} more" if len(self.rows) > _SHOWN else ""
        return f"step {self.step}: the {self.what} is NaN or inf in {', '.join(self.rows[:_SHOWN])}{more}"


def nan_unless_finite(rewards_N: torch.Tensor, losses_B: torch.Tensor) -> torch.Tensor:
    """Return a term for the loss: zero, but NaN with NaN gradients if a reward or loss is NaN or inf.

    Engines check the gradient norm before they touch weights and optimizer states, DeepSpeed only that. A loss of NaN
    alone may leave no trace in it: the hinge has no gradient at NaN.
    """
    finite = rewards_N.isfinite().all() & losses_B.isfinite().all()
    return rewards_N.sum() * torch.where(finite, 0.0, math.nan)


def trace_step(
    step: int,
    bad: Sequence[BatchItem],
    own: Sequence[BatchItem],
    stand_in: BatchItem,
    has_finite_gradient: Callable[[BatchItem], bool],
) -> SkippedStep:
    """Find the rows that are the cause. All ranks must call it; all get the same.

    Args:
        bad: items of this rank whose reward or loss is NaN or inf.
        own: all items of this rank; `stand_in` is run in place of those that other ranks have more.
        has_finite_gradient: of an item alone; all ranks call it together.
    """
    rows = _gather_rows(bad)
    if rows:
        return SkippedStep(step, "loss", rows)
    most = max(gather_object([len(own)]))
    finite = [has_finite_gradient(item) for item in (*own, *[stand_in] * (most - len(own)))]
    rows = _gather_rows([item for item, fine in zip(own, finite, strict=False) if not fine])
    return SkippedStep(step, "gradient norm", rows or _gather_rows(own))  # no row alone: their sum is too large


def _gather_rows(items: Sequence[BatchItem]) -> tuple[str, ...]:
    """The places of all ranks' items."""
    ranks = gather_object([[str(item.metadata.place) for item in items]])
    name = (lambda place, rank: f"{place} (rank {rank})") if len(ranks) > 1 else (lambda place, _: place)
    return tuple(name(place, rank) for rank, places in enumerate(ranks) for place in dict.fromkeys(places))


def input_gradient_norm(embedding: nn.Module, loss: Callable[[], torch.Tensor]) -> float:
    """Return the norm of this loss's gradient with respect to the embedded tokens [.., T, D].

    No weight gets a gradient, so no engine reduces or keeps any.
    """
    outputs = list[torch.Tensor]()

    def keep(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        outputs.append(output if output.requires_grad else output.requires_grad_())  # frozen weights need none
        return outputs[-1]

    handle = embedding.register_forward_hook(keep)
    try:
        (gradient,) = torch.autograd.grad(loss(), outputs)
    finally:
        handle.remove()
    return float(gradient.float().norm())


def stop_or_skip(train: TrainConfig, skipped: Sequence[SkippedStep]) -> None:
    """Stop, unless the recipe lets this many steps be skipped; the last one is the step at hand.

    Raises:
        RmtoolError: E0802.
    """
    if train.on_nonfinite == "skip" and len(skipped) <= train.max_skips:
        return
    last = skipped[-1]
    what = f"step {last.step}: the {last.what} is NaN or inf"
    if train.on_nonfinite == "skip":
        what += f", and {train.max_skips:,} steps before it were skipped (train.max_skips)"
    hint = "lower train.learning_rate, or set train.precision=fp32; check the rows of this step"
    if train.on_nonfinite == "stop":
        hint += ", or set train.on_nonfinite=skip"
    more = max(0, len(last.rows) - _SHOWN)
    raise RmtoolError("E0802", what, hint, rows=last.rows[:_SHOWN], more=more)
