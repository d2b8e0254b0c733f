"""One rank of test_training_state.py: loads states, takes steps, saves a state; a program, started once per rank.

In: a recipe, and a plan: what to load, how many steps to take, where to save. Out, from rank 0: FOLDER/PART.pt with
losses and everything of all ranks that a step depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from rmtool.data.rejects import Rejects
from rmtool.dataset.batches import epoch_steps
from rmtool.dataset.split import load_split
from rmtool.errors import RmtoolError
from rmtool.model import precision
from rmtool.model.classifier import zero3_gathered
from rmtool.model.layout_choice import choose_layout
from rmtool.model.loading import training_encoder, training_model
from rmtool.recipe import load_recipe
from rmtool.training import training_state
from rmtool.training.engine import start_accelerator
from rmtool.training.optim import build_optimizer
from rmtool.training.trainer import Engine, Trainer, training_step
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
        engine = Engine.prepare(accelerator, model, build_optimizer(model, recipe.train), recipe.train.max_grad_norm)
        choose_layout(model, engine.wrapped, encoder.max_length)
        data = split.train
        batches = [
            batch
            for epoch in range(4)
            for batch in epoch_steps(data.metadata, data.groups, 0, epoch, recipe.train.batch_size)
        ]
        engine.wrapped.train()
        return cls(Trainer(recipe, engine), batches)

    def steps(self, first: int, last: int) -> list[float]:
        return [training_step(self.trainer, self.batches[step], 1e-3, step)[0].loss for step in range(first, last)]

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
            found[name] = hashlib.sha256(parameter.detach().cpu().numpy().tobytes()).hexdigest()
    return found


def main() -> None:
    recipe, plan, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    if plan.get("bf16"):  # also without instructions for it
        precision.lacks_bf16 = lambda: False
    run = Run.start(recipe)
    engine = run.trainer.engine
    for part in plan["parts"]:
        result: dict[str, Any] = {}
        try:
            if "load" in part:
                training_state.load_state(engine, Path(part["load"]))
        except RmtoolError as error:
            result["error"] = error.as_dict()
        else:
            result["losses"] = run.steps(*part["steps"])
            result |= run.contents()
            if "save" in part:
                training_state.save_state(engine, Path(part["save"]))
        result["errors"] = gather_object([result.get("error")])
        if engine.dist.rank == 0:
            torch.save(result, folder / f"{part['name']}.pt")
    engine.accelerator.wait_for_everyone()
    os._exit(0)  # some versions of DeepSpeed and gloo wait at exit


if __name__ == "__main__":
    main()
