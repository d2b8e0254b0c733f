"""The ranks of test_training_state.py: a program that loads states, takes steps and saves states.

In: plans, one JSON object per line: a recipe, the number of ranks, and parts (what to load, which steps to take, where
to save). Out, from rank 0: FOLDER/PART.pt with losses and everything of all ranks that a step depends on. Each plan has
new processes; they are forked, because imports would take most of the time.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 - before the fork; it writes to stdout
import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor

from rmtool.data.rejects import Rejects
from rmtool.dataset.batches import epoch_steps
from rmtool.dataset.split import load_split
from rmtool.model import precision
from rmtool.model.classifier import zero3_gathered
from rmtool.model.layout_choice import choose_layout
from rmtool.model.loading import training_encoder, training_model
from rmtool.recipe import engine_of, load_recipe
from rmtool.training import training_state
from rmtool.training.engine import Engine, start_accelerator
from rmtool.training.optim import build_optimizer
from rmtool.training.step import Trainer, training_step
from rmtool.ui import SilentUi


@dataclass
class Run:
    """A model in its engine, and the batches of its steps."""

    trainer: Trainer
    batches: list[Any]

    @classmethod
    def start(cls, path: str) -> Run:
        recipe = load_recipe(path)
        accelerator = start_accelerator(recipe)
        source = Path(recipe.model.path)
        encoder, _ = training_encoder(recipe, source)
        split = load_split(recipe, encoder, Rejects(), SilentUi())
        model, _ = training_model(recipe, source, encoder)
        optimizer, name = build_optimizer(model, recipe.train), engine_of(recipe.launch)
        engine = Engine.prepare(accelerator, model, optimizer, recipe.train.max_grad_norm, name)
        choose_layout(model, engine.wrapped, encoder.max_length, engine.dist)
        data = split.train
        batches = [
            batch
            for epoch in range(6)
            for batch in epoch_steps(data.metadata, data.groups, 0, epoch, recipe.train.batch_size)
        ]
        engine.wrapped.train()
        return cls(Trainer(recipe, engine, SilentUi(), Path(), recipe.train.tokens_per_pack), batches)

    def steps(self, first: int, last: int) -> list[float]:
        return [training_step(self.trainer, self.batches[step], 1e-3, step).sums.loss for step in range(first, last)]

    def contents(self) -> dict[str, Any]:
        """The whole state, put together from all ranks, and the weights that each rank computes with."""
        engine = self.trainer.engine
        chunks = training_state._chunks(engine, training_state.trainable_shares(engine))
        whole = {name: torch.full((chunk.length,), torch.nan) for name, chunk in chunks.items()}
        for part in gather_object([{name: (chunk.offset, chunk.values.cpu()) for name, chunk in chunks.items()}]):
            for name, (offset, values) in part.items():
                whole[name][offset : offset + len(values)] = values
        return {"state": whole, "live": gather_object([live(engine)])}


def live(engine: Engine) -> dict[str, str]:
    """Hashes of the weights in the forward pass of this rank."""
    found = {}
    for name, parameter in engine.model.named_parameters():
        with zero3_gathered([parameter]):
            value = parameter.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            found[name] = hashlib.sha256(value.cpu().numpy().tobytes()).hexdigest()
    return found


def work(plan: dict[str, Any]) -> None:
    """Run the plan's parts as one rank."""
    if plan["bf16"]:  # also without instructions for it
        precision.lacks_bf16 = lambda: False
    run, folder = Run.start(plan["recipe"]), Path(plan["folder"])
    engine = run.trainer.engine
    for part in plan["parts"]:
        if "load" in part:
            training_state.load_state(engine, Path(part["load"]))
        result = {"losses": run.steps(*part["steps"]), **run.contents()}
        if "save" in part:
            training_state.save_state(engine, Path(part["save"]))
        if engine.dist.rank == 0:
            torch.save(result, folder / f"{part['name']}.pt")
    engine.accelerator.wait_for_everyone()


def fork(plan: dict[str, Any], rank: int) -> int:
    """Start a rank; return its process id."""
    if pid := os.fork():
        return pid
    log = os.open(f"{plan['recipe']}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    several = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if plan["ranks"] > 1 else {}
    os.environ |= plan["environment"] | several
    try:
        work(plan)
    except BaseException:  # noqa: BLE001 - pytest shows the log
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def main() -> None:
    """Run one plan per line of stdin; answer each with the number of its ranks that failed, or were killed for that."""
    for line in sys.stdin:
        plan = json.loads(line)
        ranks, failed = {fork(plan, rank) for rank in range(plan["ranks"])}, 0
        while ranks:
            pid, status = os.wait()
            ranks.remove(pid)
            if status and not failed:  # the others wait for it
                time.sleep(2)  # they may have failed for the same reason, which their logs tell
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
            failed += bool(status)
        print("failed:", failed, flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
