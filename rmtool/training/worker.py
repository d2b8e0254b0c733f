"""One training process: what `accelerate launch` starts, once per device.

In: a run folder with config.yaml. Out, in the same folder: metrics.jsonl, held_out.jsonl, curves.png, model/, and
rank-R.json, since launchers lose a child's exit code.
Cost: the steps (`trainer.py`), and reading the data once per node.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from rmtool.checkpoint import (
    HELD_OUT_FILE,
    Manifest,
    public_name,
    resolve_checkpoint,
    write_folder,
    write_manifest,
)
from rmtool.config import Recipe
from rmtool.data.rejects import REJECTS_FILE, Rejects
from rmtool.dataset.report import build_report, example, write_report
from rmtool.dataset.split import Split, load_split, write_held_out
from rmtool.errors import ExitCode, RmtoolError, first_line
from rmtool.model.layout_choice import choose_layout
from rmtool.model.loading import training_encoder, training_model
from rmtool.model.precision import PRECISIONS, compute_precision
from rmtool.model.reward_model import RewardModel
from rmtool.model.rewards import out_of_memory
from rmtool.model.weights import meta_copy
from rmtool.packing.layers import compile_layers
from rmtool.packing.prefix_sharing import describe_sharing
from rmtool.recipe import CONFIG_FILE, as_dict, as_source, engine_of, load_recipe, recipe_hash, resolve
from rmtool.tokenization.encoder import Encoder
from rmtool.training.engine import Engine, require_agreement, start_accelerator
from rmtool.training.optim import build_optimizer
from rmtool.training.tracking import Tracker, draw_curves
from rmtool.training.trainer import BestCheckpoint, Trainer, train_loop
from rmtool.training.worker_status import DATA_READ_FILE, begin, end
from rmtool.ui import Ui, worker_ui

CONNECTION_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
)  # gloo's words, of no type of its own
BEST = "best-step-"  # the best checkpoint so far, until the run ends


def save_model(trainer: Trainer, encoder: Encoder, manifest: Manifest, folder: Path) -> None:
    """Write an ordinary transformers checkpoint, and the manifest, into a new `folder`. All ranks must call it."""
    model, dtype = trainer.model, PRECISIONS[trainer.recipe.train.save_dtype]
    weights = trainer.engine.weights(dtype)
    if weights is None:
        return
    classifier = meta_copy(model.classifier, dtype)

    def fill(target: Path) -> None:
        classifier.save_pretrained(target, state_dict=weights)
        encoder.tokenizer.save_pretrained(target)
        write_manifest(target, manifest)

    write_folder(folder, fill)


def _manifest(
    recipe: Recipe, encoder: Encoder, fingerprint: str, metrics: dict[str, float], reason: str | None
) -> Manifest:
    packages = ("rmtool", "torch", "transformers", "accelerate", "peft")
    return Manifest(
        fingerprint=fingerprint,
        max_length=encoder.max_length,
        precision=compute_precision(recipe.train.precision),
        on_long=encoder.on_long,
        on_empty=encoder.on_empty,
        recipe=recipe.name,
        base_model=public_name(recipe.model.path),
        train_data=[public_name(as_source(source).path) for source in recipe.data.train],
        padded_reason=reason,
        settings=as_dict(recipe)["train"] | {"lora": as_dict(recipe)["lora"]},
        metrics=metrics,
        versions={name: metadata.version(name) for name in packages},
    )


def _compile(model: RewardModel) -> str:
    """Compile the layers; says how many, or why none."""
    return str(compile_layers(model.backbone) or "none (no known stack of decoder layers)")


def run(recipe: Recipe, folder: Path, accelerator: Accelerator, ui: Ui) -> None:
    """Train as `recipe` says; what comes out is written by the main process, into `folder`."""
    source = resolve_checkpoint(resolve(recipe.model.path), recipe.model.revision, ui)
    encoder, notices = training_encoder(recipe, source)
    fingerprint = encoder.fingerprint()
    main = accelerator.is_main_process
    with _local_main_first(recipe, folder, accelerator):
        split = _read(recipe, folder, encoder, main, ui)
    require_agreement(_common(recipe, source, fingerprint, split))
    model, more = training_model(recipe, source, encoder)
    engine = Engine.prepare(accelerator, model, build_optimizer(model, recipe.train), recipe.train.max_grad_norm)
    reason = choose_layout(model, engine.wrapped, encoder.max_length).reason
    if recipe.train.compile:  # after the probe of both layouts, of which one is used
        more += [f"compiled layers: {_compile(model)}"]
    for notice in (*notices, *more):
        ui.say(notice)
    ui.facts("Plan: model", [("prefix sharing", describe_sharing(reason))])
    if main:
        write_held_out(folder / HELD_OUT_FILE, split)
    tracker = Tracker(folder, recipe.track, as_dict(recipe), ui) if main else None
    trainer = Trainer(recipe, engine)

    def save(metrics: dict[str, float], name: str) -> None:
        save_model(trainer, encoder, _manifest(recipe, encoder, fingerprint, metrics, reason), folder / name)

    def save_best(best: BestCheckpoint) -> None:
        save(best.metrics, f"{BEST}{best.step}")
        if main:
            for worse in set(folder.glob(f"{BEST}*")) - {folder / f"{BEST}{best.step}"}:
                shutil.rmtree(worse)

    try:
        metrics = train_loop(trainer, split, tracker, ui, save_best)
    finally:
        if tracker:
            tracker.close()
    ui.say("Saving the checkpoint")
    if recipe.train.keep == "last":
        save(metrics, "model")
    if main:
        for best in folder.glob(f"{BEST}*"):
            best.rename(folder / "model")
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
        ui.say(f"an example: {example(encoder, split.train.metadata[0], split.train.groups[0])}")
        write_report(report, split.train, folder)
    return split


@contextlib.contextmanager
def _local_main_first(recipe: Recipe, folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """A node's first process before its others, which find its token ids in the cache.

    By a file: others that wait in a collective call would be taken for hanging while a million rows are tokenized.
    """
    if accelerator.is_local_main_process or not recipe.data.cache:
        yield
        (folder / DATA_READ_FILE).touch()
        return
    while not (folder / DATA_READ_FILE).exists():
        time.sleep(0.2)  # the launcher ends this process where the first one fails
    yield


def _common(recipe: Recipe, source: Path, fingerprint: str, split: Split) -> dict[str, str]:
    """What must be the same on every rank, by name."""
    data = hashlib.sha256()
    for part in (split.train, split.held_out):
        for each, group in zip(part.metadata, part.groups, strict=True):
            data.update(repr((each.preferences, each.margins, each.weight)).encode())
            for ids in group.sequences():
                data.update(ids.tobytes())
    packages = ("rmtool", "torch", "transformers", "accelerate", "deepspeed")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return {
        "recipe": recipe_hash(recipe),
        "precision": compute_precision(recipe.train.precision),
        "engine": f"{engine_of(recipe.launch)}, offloaded: {recipe.launch.offload_optimizer}",
        "model": hashlib.sha256((source / "config.json").read_bytes()).hexdigest(),
        "tokenizer and chat template": fingerprint,
        "data": data.hexdigest(),
        "versions": versions,
    }


def _lost_others(error: Exception) -> RmtoolError | None:
    """What to say where this process failed only because another one is gone; None if that is not why."""
    told = first_line(error)
    by_type = isinstance(error, torch.distributed.DistNetworkError | torch.distributed.DistBackendError)
    if not by_type and not any(words in told for words in CONNECTION_LOST):
        return None
    hint = "look at what the other nodes say: the first process that failed knows why"
    return RmtoolError("E0805", "lost the connection to another process", hint, found=told)


def main() -> None:
    """Entry of a worker process: `python -m rmtool.training.worker RUN_FOLDER`."""
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
        full = out_of_memory("train.tokens_per_pack, or set train.gradient_checkpointing=true")
        status = {"exit": int(full.exit_code), "error": full.as_dict()}
    except torch._dynamo.exc.TorchDynamoException as error:
        traceback.print_exc()
        hint = "set train.compile=false; where a C++ compiler or Triton is missing, install it"
        failed = RmtoolError("E0504", f"torch cannot compile the layers here: {first_line(error)}", hint)
        status = {"exit": int(failed.exit_code), "error": failed.as_dict()}
    except Exception as error:  # noqa: BLE001 - the last line of defence: said, written down, and passed on
        traceback.print_exc()
        lost = _lost_others(error)
        status = {"exit": int(lost.exit_code if lost else ExitCode.BUG), "error": lost.as_dict() if lost else None}
    end(folder, rank, status["exit"], status["error"])
    sys.exit(status["exit"])


if __name__ == "__main__":
    main()
