"""A rank that takes steps with injected faults: `python step_ranks.py RECIPE FAULT...`; writes JSON lines.

A fault is put into one row of a step: NaN in its rewards ("forward"), or in their gradient ("gradient"), or a gradient
whose norm overflows ("norm"). "none" is a good step, "stop" a forward fault that must end the run.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rmtool.data.rejects import Rejects
from rmtool.dataset.batches import BatchItem, epoch_steps
from rmtool.dataset.split import load_split
from rmtool.errors import RmtoolError
from rmtool.model.loading import training_encoder, training_model
from rmtool.recipe import engine_of, load_recipe
from rmtool.training.engine import Engine, start_accelerator
from rmtool.training.optim import build_optimizer
from rmtool.training.step import Trainer, training_step
from rmtool.ui import SilentUi


def start(path: str, settings: list[tuple[str, Any]] = []) -> tuple[Trainer, list[list[BatchItem]]]:  # noqa: B006
    """A trainer as the worker builds it, and the batches of an epoch."""
    recipe = load_recipe(path, settings)
    accelerator = start_accelerator(recipe)
    source = Path(recipe.model.path)
    encoder, _ = training_encoder(recipe, source)
    split = load_split(recipe, encoder, Rejects(), SilentUi())
    model, _ = training_model(recipe, source, encoder)
    model.share_prompts(True)
    optimizer, name = build_optimizer(model, recipe.train), engine_of(recipe.launch)
    engine = Engine.prepare(accelerator, model, optimizer, recipe.train.max_grad_norm, name)
    engine.wrapped.train()
    batches = list(epoch_steps(split.train.metadata, split.train.groups, 0, 0, recipe.train.batch_size))
    return Trainer.start(recipe, engine, SilentUi(), Path(path).parent), batches


def state(engine: Engine) -> str:
    """Hash of the weights, the moments and the step count that this rank has."""
    inner = engine.optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    found = hashlib.sha256()
    for tensor in _tensors(engine, inner):
        value = tensor.detach()
        value = value.to_local() if isinstance(value, DTensor) else value
        found.update(value.cpu().numpy().tobytes())
    return found.hexdigest()


def _tensors(engine: Engine, inner: Any) -> Iterator[torch.Tensor]:
    for parameter in engine.model.parameters():
        yield getattr(parameter, "ds_tensor", parameter)
    for group in inner.param_groups:
        for parameter in group["params"]:
            yield parameter
            yield from (value for _, value in sorted(inner.state[parameter].items()))


class _Gradient(torch.autograd.Function):
    """Identity, with a gradient times `factor` in some places."""

    @staticmethod
    def forward(ctx: Any, rewards: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(factor)
        return rewards.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient * ctx.saved_tensors[0], None


class Fault:
    """A fault in the row of one item."""

    def __init__(self, trainer: Trainer, item: BatchItem, kind: str):
        self.item, self.kind, self.model = item, kind, trainer.model
        self.groups: Any = ()
        build = self.model.build_batch

        def remember(groups: Any) -> Any:
            self.groups = groups
            return build(groups)

        self.model.build_batch = remember  # type: ignore[method-assign]
        self.hook = self.model.register_forward_hook(self.apply)

    def apply(self, module: Any, args: Any, rewards: torch.Tensor) -> torch.Tensor:
        factor, at = torch.ones_like(rewards), 0
        value = {"norm": 1e30}.get(self.kind, math.nan)
        for group in self.groups:
            if group is self.item.group:
                factor[at : at + len(group.responses)] = value
            at += len(group.responses)
        if self.kind in ("forward", "stop"):
            return rewards + torch.where(factor.isnan(), factor, 0.0)  # NaN, whose own gradient is finite
        return _Gradient.apply(rewards, factor)

    def remove(self) -> None:
        self.hook.remove()
        del self.model.build_batch


def watch_gradients(engine: Engine) -> list[int]:
    """A list that gets, for each pack of the next step, the number of storages that hold gradients at its start."""
    storages, backward = list[int](), Engine.backward

    def watched(loss: torch.Tensor, last: bool) -> None:
        held = [p.grad for p in engine.model.parameters() if p.grad is not None and not isinstance(p.grad, DTensor)]
        storages.append(len({gradient.untyped_storage().data_ptr() for gradient in held}))
        backward(engine, loss, last)

    engine.backward = watched  # type: ignore[method-assign]
    return storages


def take(trainer: Trainer, batch: list[BatchItem], step: int, kind: str) -> dict[str, Any]:
    """Take a step with this fault in its last row; report what happened."""
    fault = Fault(trainer, batch[-1], kind) if kind != "none" else None
    before, rows, error = state(trainer.engine), (), None
    storages = watch_gradients(trainer.engine)
    try:
        result = training_step(trainer, batch, 1e-3, step)
        rows = result.skipped.rows if result.skipped else ()
    except RmtoolError as caught:
        error, rows = caught.what, caught.rows
    if fault:
        fault.remove()
    after = state(trainer.engine)
    report = {"kind": kind, "same": before == after, "state": after, "rows": rows, "error": error, "storages": storages}
    return report | {"place": str(batch[-1].metadata.place)}


def main() -> None:
    trainer, batches = start(sys.argv[1])
    for step, kind in enumerate(sys.argv[2:], 1):
        batch = batches[0] if kind == "none" else batches[1]
        sys.stdout.write(json.dumps(take(trainer, batch, step, kind)) + "\n")


if __name__ == "__main__":
    main()
