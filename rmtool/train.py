"""One training process: what `accelerate launch` starts, once per device.

In: a run folder with config.yaml. Out, in the same folder: metrics.jsonl, held_out.jsonl, curves.png, model/, and
exit-RANK.json, since launchers lose a child's exit code.
Cost per step: one forward and backward over the step's unique tokens, cut into packs of at most tokens_per_pack.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from rmtool import evaluate as evaluation
from rmtool import model as models
from rmtool.checkpoint import HELD_OUT_FILE, Manifest, public_name, resolve_checkpoint, write_folder, write_manifest
from rmtool.config import Recipe
from rmtool.data.encode import Encoded, Encoder
from rmtool.data.rejects import REJECTS_FILE, Rejects
from rmtool.engine import Engine, start_accelerator
from rmtool.errors import ExitCode, RmtoolError
from rmtool.layers import compile_layers
from rmtool.loading import merge_adapters, training_encoder, training_model
from rmtool.loss import bradley_terry
from rmtool.metrics import PairSums
from rmtool.model import PRECISIONS, RewardModel
from rmtool.optim import build_optimizer, schedule_factor
from rmtool.recipe import CONFIG_FILE, as_dict, as_source, load_recipe, recipe_hash, resolve
from rmtool.report import build_report, example, write_report
from rmtool.split import Split, load_split, write_held_out
from rmtool.status import begin, end
from rmtool.steps import Unit, count_pairs, epoch_steps, plan_steps
from rmtool.tracking import Tracker, draw_curves
from rmtool.ui import Bar, Ui, worker_ui

DATA_READ_FILE = ".data-read"


@dataclass
class Trainer:
    """What a step needs."""

    recipe: Recipe
    engine: Engine

    @property
    def model(self) -> RewardModel:
        return self.engine.model

    def gradients(self, units: Sequence[Unit]) -> PairSums:
        """One optimiser step's gradients, and the sums over all ranks' pairs.

        The loss is the sum over the step's pairs divided by their number, however they are cut into packs and ranks.
        """
        engine, ranks = self.engine, self.engine.ranks
        trees = [unit.tree for unit in units]
        packs = self.model.plan(trees, self.recipe.train.tokens_per_pack, ranks.world)[ranks.rank :: ranks.world]
        pairs = sum(len(unit.preferences) for unit in units)
        sums = PairSums()
        for number, items in enumerate(packs, 1):
            last = number == len(packs)
            with engine.holding(last):
                # A rank without work in this round runs a unit with weight zero: all ranks must take part.
                pack_sums, loss = self._pack([units[item] for item in items] or units[:1])
                weight = ranks.world / pairs if items else 0.0  # engines average gradients over ranks
                engine.backward(loss * weight, last)
            if items:
                sums += pack_sums
        return PairSums.from_vector(ranks.sum(sums.vector()))

    def step(self, units: Sequence[Unit], rate: float, number: int) -> tuple[PairSums, float]:
        """Gradients and the update; the sums over the step's pairs, and the gradient norm before clipping.

        Raises:
            RmtoolError: E0802 the loss or the gradient norm is not finite.
        """
        sums = self.gradients(units)
        require_finite_step(sums, 0.0, number, units)
        return sums, self.engine.update(rate, lambda norm: require_finite_step(sums, norm, number, units))

    def _pack(self, units: Sequence[Unit]) -> tuple[PairSums, torch.Tensor]:
        rewards = self.engine.wrapped(self.model.collate([unit.tree for unit in units]))
        start, winners, losers, margins, weights = 0, list[int](), list[int](), list[float](), list[float]()
        for unit in units:
            for winner, loser, margin in unit.preferences:
                winners.append(start + winner)
                losers.append(start + loser)
                margins.append(margin)
                weights.append(unit.weight)
            start += len(unit.tree.responses)
        chosen, rejected = rewards[winners], rewards[losers]
        taken_off = rewards.new_tensor(margins) if self.recipe.train.use_margins else None
        losses = bradley_terry(chosen, rejected, taken_off) * rewards.new_tensor(weights)
        return PairSums.of(chosen, rejected, losses), losses.sum()

    def evaluate(self, held_out: Encoded, bar: Bar) -> dict[str, float]:
        """The eval metrics; the ranks share the forwards."""
        result = evaluation.evaluate(
            self.model,
            held_out.labels,
            held_out.trees,
            self.recipe.train.tokens_per_pack,
            bar,
            run=self.engine.wrapped,
            ranks=self.engine.ranks,
        )
        self.engine.wrapped.train()
        return result.total.report(evaluation.PREFIX)


def train_loop(trainer: Trainer, split: Split, tracker: Tracker | None, ui: Ui) -> dict[str, float]:
    """All steps of all epochs; returns the last eval metrics (empty without held-out pairs)."""
    train, labels, trees = trainer.recipe.train, split.train.labels, split.train.trees
    pairs = count_pairs(labels)
    total = plan_steps(train.epochs, train.max_steps, pairs, train.batch_size)
    step, episode, metrics = 0, 0, dict[str, float]()
    trainer.model.train()
    with ui.progress("Training", total, "steps") as bar:
        for epoch in range(train.epochs):
            for units in epoch_steps(labels, trees, train.seed, epoch, train.batch_size):
                if step == total:
                    break
                rate = train.learning_rate * schedule_factor(train, step, total)
                started = time.monotonic()
                sums, norm = trainer.step(units, rate, step + 1)
                step, episode = step + 1, episode + int(sums.pairs)
                numbers = {
                    "step": step,
                    "episode": episode,
                    "epoch": episode / pairs,
                    **sums.report("train/rm"),
                    "train/rm/lr": rate,
                    "grad_norm": norm,
                    "step_seconds": time.monotonic() - started,
                    "unique_tokens": sum(unit.tree.unique_tokens for unit in units),
                }
                bar.advance(1, f"loss {numbers['train/rm/loss']:.3f} acc {numbers['train/rm/accuracy']:.2f}")
                if split.held_out.labels and (step == total or (train.eval_every and step % train.eval_every == 0)):
                    metrics = run_eval(trainer, split.held_out, ui)
                    ui.say(f"step {step}, {evaluation.PREFIX}: {describe(metrics)}")
                    numbers |= metrics
                if tracker:
                    tracker.log(numbers)
    return metrics


def run_eval(trainer: Trainer, held_out: Encoded, ui: Ui) -> dict[str, float]:
    with ui.progress("Evaluating", len(held_out.labels), "pairs") as bar:
        return trainer.evaluate(held_out, bar)


def describe(metrics: dict[str, float]) -> str:
    """Eval metrics as one short line of words."""
    return ", ".join(f"{name.rpartition('/')[2]} {value:.4f}" for name, value in metrics.items())


def require_finite_step(sums: PairSums, norm: float, step: int, units: Sequence[Unit]) -> None:
    """Stop before a bad gradient reaches the weights."""
    if math.isfinite(sums.loss) and math.isfinite(norm):
        return
    places = ", ".join(str(unit.labels.place) for unit in units[:4])
    raise RmtoolError(
        "E0802",
        f"step {step}: the loss ({sums.loss / max(sums.pairs, 1)}) or gradient norm ({norm}) is not a finite number",
        "lower train.learning_rate, or set train.precision=fp32; the rows of this step are named above",
        found=f"rows {places}{', ...' if len(units) > 4 else ''}",
    )


def save_model(trainer: Trainer, encoder: Encoder, manifest: Manifest, folder: Path) -> None:
    """Write model/: an ordinary transformers checkpoint, and the manifest. All ranks must call it."""
    recipe, model = trainer.recipe, trainer.model
    if recipe.lora.rank:
        merge_adapters(model.classifier)
    model.share_prompts(False)  # back to the stock attention, which any tool knows
    dtype = PRECISIONS[recipe.train.save_dtype]
    weights = trainer.engine.weights(dtype)
    if weights is None:
        return
    model.classifier.config.dtype = dtype

    def fill(target: Path) -> None:
        model.classifier.save_pretrained(target, state_dict=weights)
        encoder.tokenizer.save_pretrained(target)
        write_manifest(target, manifest)

    write_folder(folder / "model", fill)


def _manifest(
    recipe: Recipe, encoder: Encoder, fingerprint: str, metrics: dict[str, float], reason: str | None
) -> Manifest:
    packages = ("rmtool", "torch", "transformers", "accelerate", "peft")
    return Manifest(
        fingerprint=fingerprint,
        max_length=encoder.max_length,
        precision=recipe.train.precision,
        on_long=encoder.on_long,
        on_empty=encoder.on_empty,
        recipe=recipe.name,
        base_model=public_name(recipe.model.path),
        train_data=[public_name(as_source(source).path) for source in recipe.data.train],
        layout=f"padded: {reason}" if reason else "shared",
        settings=as_dict(recipe)["train"] | {"lora": as_dict(recipe)["lora"]},
        metrics=metrics,
        versions={name: metadata.version(name) for name in packages},
    )


def _compile(model: RewardModel) -> str:
    """Compile the layers; says how many, or why none."""
    if not isinstance(model.products(), contextlib.nullcontext):
        return "none, because torch compiles nothing where bf16 products are computed in fp32"
    return str(compile_layers(model.backbone) or "none, because there is no stack of several layers that is known")


def run(recipe: Recipe, folder: Path, accelerator: Accelerator, ui: Ui) -> None:
    """Train as `recipe` says; what comes out is written by the main process, into `folder`."""
    source = resolve_checkpoint(resolve(recipe.model.path), recipe.model.revision, ui)
    encoder, notices = training_encoder(recipe, source)
    fingerprint = encoder.fingerprint()
    main = accelerator.is_main_process
    with _one_after_the_other(recipe, folder, accelerator):
        split = _read(recipe, folder, encoder, main, ui)
    model, more = training_model(recipe, source, encoder)
    engine = Engine.prepare(accelerator, model, build_optimizer(model, recipe.train), recipe.train.max_grad_norm)
    engine.require_agreement(_common(recipe, fingerprint, split))
    reason = models.choose_layout(model, engine.wrapped, encoder.max_length)
    if recipe.train.compile:  # after the trials of both layouts, of which one is used
        more += [f"compiled layers: {_compile(model)}"]
    sharing = f"padded, because {reason}" if reason else "computed once for both responses of a pair"
    for notice in (*notices, *more, f"prompts: {sharing}"):
        ui.say(notice)
    if main:
        write_held_out(folder / HELD_OUT_FILE, split)
    tracker = Tracker(folder, recipe.track, as_dict(recipe), ui) if main else None
    trainer = Trainer(recipe, engine)
    try:
        metrics = train_loop(trainer, split, tracker, ui)
    finally:
        if tracker:
            tracker.close()
    ui.say("Saving the checkpoint")
    save_model(trainer, encoder, _manifest(recipe, encoder, fingerprint, metrics, reason), folder)
    if main:
        draw_curves(folder)
    accelerator.wait_for_everyone()


def _read(recipe: Recipe, folder: Path, encoder: Encoder, main: bool, ui: Ui) -> Split:
    """The data, and the report on it."""
    aside = folder / REJECTS_FILE if recipe.data.on_bad_row == "skip" else None
    with Rejects(aside if main or aside is None else Path(os.devnull)) as rejects:
        split = load_split(recipe, encoder, rejects, ui)
    if main:
        report = build_report(split, recipe.train.batch_size, recipe.train.seed)
        ui.facts("Data", report.rows())
        ui.say(f"an example: {example(encoder, split.train.labels[0], split.train.trees[0])}")
        write_report(report, split.train, folder)
    return split


@contextlib.contextmanager
def _one_after_the_other(recipe: Recipe, folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """A node's first process before its others, which find its token ids in the cache.

    By a file: others that wait in a collective call would be taken for hanging while a million rows are tokenised.
    """
    if accelerator.is_local_main_process or not recipe.data.cache:
        yield
        (folder / DATA_READ_FILE).touch()
        return
    while not (folder / DATA_READ_FILE).exists():
        time.sleep(0.2)  # the launcher ends this process where the first one fails
    yield


def _common(recipe: Recipe, fingerprint: str, split: Split) -> dict[str, str]:
    """What must be the same on every rank, by name."""
    data = hashlib.sha256()
    for part in (split.train, split.held_out):
        for labels, tree in zip(part.labels, part.trees, strict=True):
            data.update(repr((labels.preferences, labels.margins, labels.weight)).encode())
            for ids in tree.sequences():
                data.update(ids.tobytes())
    packages = ("rmtool", "torch", "transformers", "accelerate", "deepspeed")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return {
        "recipe": recipe_hash(recipe),
        "tokenizer and chat template": fingerprint,
        "data": data.hexdigest(),
        "versions": versions,
    }


def main() -> None:
    """Entry of a worker process: `python -m rmtool.train RUN_FOLDER`."""
    folder, rank = Path(sys.argv[1]), int(os.environ.get("RANK", 0))
    begin(folder, rank)
    status: dict[str, Any] = {"exit": int(ExitCode.OK), "error": None}
    try:
        recipe = load_recipe(str(folder / CONFIG_FILE))
        accelerator = start_accelerator(recipe)
        run(recipe, folder, accelerator, worker_ui(accelerator.is_main_process))
    except RmtoolError as error:
        status = {"exit": int(error.exit_code), "error": error.as_dict()}
    except torch.OutOfMemoryError:
        traceback.print_exc()
        full = models.out_of_memory("train.tokens_per_pack, or set train.gradient_checkpointing=true")
        status = {"exit": int(full.exit_code), "error": full.as_dict()}
    except torch._dynamo.exc.TorchDynamoException as error:
        traceback.print_exc()
        hint = "set train.compile=false; where a C++ compiler or Triton is missing, install it"
        failed = RmtoolError("E0504", f"torch cannot compile the layers here: {models.first_line(error)}", hint)
        status = {"exit": int(failed.exit_code), "error": failed.as_dict()}
    except Exception:  # noqa: BLE001 - the last line of defence: said, written down, and passed on as a bug
        traceback.print_exc()
        status = {"exit": int(ExitCode.BUG), "error": None}
    end(folder, rank, status["exit"], status["error"])
    sys.exit(status["exit"])


if __name__ == "__main__":
    main()
