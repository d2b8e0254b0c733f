"""One training process, as `accelerate launch` starts it once per device.

In: a run folder with config.yaml. Out, in the same folder: metrics.jsonl, held_out.jsonl, curves.png, model/, and the
status and log of the process (`worker_status.py`).
Cost: the steps (`trainer.py`), and reading the data once per node.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator

from rmtool.checkpoint import HELD_OUT_FILE, resolve_checkpoint
from rmtool.config import Recipe
from rmtool.data.rejects import REJECTS_FILE, Rejects
from rmtool.dataset.batches import count_pairs
from rmtool.dataset.report import add_skipped_steps, build_report, example, write_report
from rmtool.dataset.split import Split, load_split, write_held_out
from rmtool.errors import ExitCode, RmtoolError, Stopped, first_line
from rmtool.model.compiling import choose_compiled, describe_failure, estimate_tokens
from rmtool.model.layout_choice import choose_layout
from rmtool.model.loading import training_encoder, training_model
from rmtool.model.out_of_memory import is_out_of_memory
from rmtool.model.precision import compute_precision, precision_notices
from rmtool.packing.prefix_sharing import describe_sharing
from rmtool.recipe import CONFIG_FILE, as_dict, engine_of, load_recipe, recipe_hash, resolve
from rmtool.redaction import redacted_output
from rmtool.tokenization.encoder import Encoder
from rmtool.training.checkpoint_writer import CheckpointWriter, build_manifest
from rmtool.training.engine import Engine, eval_precision, require_agreement, start_accelerator
from rmtool.training.optim import build_optimizer
from rmtool.training.resume import identity, require_unchanged
from rmtool.training.run_files import WRITTEN, move_to_previous
from rmtool.training.saver import Saver, read_progress
from rmtool.training.schedule import Schedule, require_reachable, schedule_rows
from rmtool.training.snapshots import Snapshot, Snapshots
from rmtool.training.step import Trainer
from rmtool.training.stopping import Stopping, deadline_of
from rmtool.training.system import system_figures, versions
from rmtool.training.tracking import Tracker, draw_curves
from rmtool.training.trainer import train_loop
from rmtool.training.worker_status import DATA_READ_FILE, mark_exited, mark_saves, mark_started
from rmtool.ui import Ui
from rmtool.ui.pipe import worker_ui

# gloo raises a plain RuntimeError with one of these.
CONNECTION_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def run(recipe: Recipe, folder: Path, accelerator: Accelerator, ui: Ui) -> None:
    """Train a reward model as the recipe says, from the newest snapshot if there is one; the main process writes the
    results to `folder`. All ranks must call it.

    Raises:
        RmtoolError: E02xx to E05xx for a recipe, data, model or machine that does not work, E0603 when the snapshot is
            of a different run, E0702 a tracker failed and is not allowed to, E0802 for NaN or inf.
        Stopped: when a signal or the time limit ended it.
    """
    main, base = accelerator.is_main_process, recipe.model
    snapshots = _open_snapshots(recipe, folder, accelerator)
    found = _find_snapshot(snapshots, ui)
    source = resolve_checkpoint(resolve(base.path), base.revision, ui, base.weights != "random")
    encoder, notices = training_encoder(recipe, source)
    with _local_main_first(recipe, folder, accelerator):
        split = _load_data(recipe, folder, encoder, main, ui)
    schedule = Schedule(recipe, count_pairs(split.train.metadata))  # of the pairs that are left
    ranks = _rank_fingerprint(recipe, source, encoder.fingerprint(), split)
    require_agreement(ranks)
    known = snapshots.on_main(lambda: identity(recipe, split.sources, source, ranks["data"]))
    if found:
        require_unchanged(read_progress(found.folder)["identity"], known, found.step)
    if main:
        write_held_out(folder / HELD_OUT_FILE, split)
    tokens = estimate_tokens(split.train.groups) * schedule.steps * recipe.train.batch_size / schedule.pairs
    engine, padded_reason = _prepare_engine(recipe, source, encoder, accelerator, notices, tokens, ui)
    manifest = build_manifest(recipe, encoder, encoder.fingerprint(), padded_reason)
    saver = Saver(snapshots, CheckpointWriter(folder, recipe, engine, encoder, manifest), known, ui)
    if found:
        saver.resume(found, schedule.steps)
    saver.start()
    trainer = Trainer.start(recipe, engine, ui, folder, saver.progress.skipped)
    _train(trainer, split, saver, folder, ui, found is not None)
    if main:
        add_skipped_steps(folder, [asdict(skipped) for skipped in trainer.skipped])
        _draw_curves(folder, ui)
    accelerator.wait_for_everyone()
    if saver.tracker:
        saver.tracker.require_logged()


def _open_snapshots(recipe: Recipe, folder: Path, accelerator: Accelerator) -> Snapshots:
    """Return the snapshots in the run folder, which is that of node 0."""
    run_folder = folder.parent if int(os.environ.get("GROUP_RANK", 0)) else folder
    return Snapshots(run_folder, recipe.train.keep_snapshots, accelerator.process_index, accelerator.num_processes)


def _find_snapshot(snapshots: Snapshots, ui: Ui) -> Snapshot | None:
    """Return the snapshot to resume from. If none of those there is valid, move what the run has written."""
    found = snapshots.find(ui.say)
    if found is None:
        run = snapshots.run
        moved = snapshots.on_main(lambda: snapshots.folder.exists() and move_to_previous(run, WRITTEN, replace=False))
        if moved:
            ui.say(
                f"no valid snapshot found: starting at step 1; the files of the interrupted run were moved to {moved}"
            )
    return found


def _prepare_engine(
    recipe: Recipe,
    source: Path,
    encoder: Encoder,
    accelerator: Accelerator,
    notices: Sequence[str],
    tokens: float,
    ui: Ui,
) -> tuple[Engine, str | None]:
    """Load the model and prepare it with its optimizer; return why batches are padded, too.

    Args:
        tokens: unique tokens of all steps.
    """
    name = engine_of(recipe.launch)
    whole = None if name in ("zero3", "fsdp2") else accelerator.device
    model, more = training_model(recipe, source, encoder, whole)
    optimizer = build_optimizer(model, recipe.train)
    engine = Engine.prepare(accelerator, model, optimizer, recipe.train.max_grad_norm, name)
    padded_reason = choose_layout(model, engine.wrapped, encoder.max_length, engine.dist).reason
    more += precision_notices(recipe.train.precision, padded_reason is None)
    for notice in (*notices, *more):
        ui.say(notice)
    # After choose_layout, which tries both layouts.
    setting = recipe.train.compile if name in ("single", "ddp") or recipe.train.compile is True else False
    compiled = choose_compiled(model, setting, tokens, encoder.max_length, engine.dist)
    ui.facts(
        "Plan: model",
        [
            ("prefix sharing", describe_sharing(padded_reason)),
            ("eval precision", eval_precision(recipe)),
            ("compiled layers", compiled),
        ],
    )
    return engine, padded_reason


def _train(trainer: Trainer, split: Split, saver: Saver, folder: Path, ui: Ui, resumed: bool) -> None:
    """Take the steps that are left, and save the checkpoint."""
    recipe, main = trainer.recipe, trainer.engine.accelerator.is_main_process
    config = as_dict(recipe) | {"system": system_figures(trainer.engine.accelerator)}
    given = (folder, recipe.track, config, ui, resumed, saver.progress.tracker_id)
    with (
        _open_stopping(folder, saver) as stopping,  # before wandb starts, where signals would be held back
        Tracker(*given) if main else nullcontext() as tracker,
    ):
        saver.tracker = tracker
        if tracker:
            tracker.require_started()
        save, progress, snapshot = saver.checkpoints.save_best, saver.progress, saver.save_if_due
        metrics = train_loop(trainer, split, tracker, ui, save, stopping, progress, snapshot)
        ui.say("Saving the checkpoint")
        saver.checkpoints.finish(metrics, progress.best)  # before the tracker is closed, which may take seconds
        saver.finish()
    saver.checkpoints.measure_fidelity(split.eval.groups, ui)


@contextlib.contextmanager
def _open_stopping(folder: Path, saver: Saver) -> Iterator[Stopping]:
    """Receive signals, and tell the launcher that this rank now saves before it leaves."""
    dist, deadline = saver.engine.dist, deadline_of(saver.train.time_limit, os.environ)
    with Stopping(dist.sum, saver.save_before_stop, deadline) as stopping:
        mark_saves(folder, dist.rank)
        yield stopping


def _draw_curves(folder: Path, ui: Ui) -> None:
    try:
        draw_curves(folder)
    except OSError as error:  # the checkpoint is complete
        ui.say(f"cannot draw the training curves: {error}")


def _load_data(recipe: Recipe, folder: Path, encoder: Encoder, main: bool, ui: Ui) -> Split:
    """Load the data; the main process also reports on it, and writes the invalid rows."""
    path = folder / REJECTS_FILE if recipe.data.on_bad_row == "skip" else None
    with Rejects(path if main or path is None else Path(os.devnull)) as rejects:
        split = load_split(recipe, encoder, rejects, ui)
    schedule = Schedule(recipe, count_pairs(split.train.metadata))  # of the pairs that are left
    require_reachable(recipe.train, schedule.steps)
    ui.facts("Schedule", schedule_rows(recipe, schedule))
    if main:
        report = build_report(split, recipe.train.batch_size, recipe.train.seed)
        ui.facts("Data", report.rows())
        ui.say(f"example conversation: {example(encoder, split.train.metadata[0], split.train.groups[0])}")
        write_report(report, split.train, folder)
    return split


@contextlib.contextmanager
def _local_main_first(recipe: Recipe, folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Run the block in a node's first process before the others, which then find its records and tokens in the cache.

    By a file: processes that wait in a collective call would look hung while a million rows are tokenized.
    """
    if accelerator.is_local_main_process or not recipe.data.cache:
        yield
        (folder / DATA_READ_FILE).touch()
        return
    while not (folder / DATA_READ_FILE).exists():
        time.sleep(0.2)  # the launcher ends this process if the first one fails
    yield


def _rank_fingerprint(recipe: Recipe, source: Path, fingerprint: str, split: Split) -> dict[str, str]:
    """Fingerprints of what must be the same on every rank, by name."""
    data = hashlib.sha256()
    for part in (split.train, split.eval):
        for each, group in zip(part.metadata, part.groups, strict=True):
            data.update(repr((each.preferences, each.margins, each.weight)).encode())
            for ids in group.sequences():
                data.update(ids.tobytes())
    return {
        "recipe": recipe_hash(recipe),
        "precision": compute_precision(recipe.train.precision),
        "engine": f"{engine_of(recipe.launch)}, offloaded: {recipe.launch.offload_optimizer}",
        "model": hashlib.sha256((source / "config.json").read_bytes()).hexdigest(),
        "tokenizer and chat template": fingerprint,
        "data": data.hexdigest(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def _known_error(error: Exception) -> RmtoolError | None:
    """The user's error behind an exception of torch; None for a bug in rmtool."""
    message = first_line(error)
    if is_out_of_memory(error):  # outside of a pack
        hint = "lower train.tokens_per_pack, or set train.gradient_checkpointing=true"
        return RmtoolError("E0503", "out of memory", hint, found=message)
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):
        hint = "set train.compile=false, or install a C++ compiler and Triton"
        return RmtoolError("E0504", describe_failure(error), hint)
    lost = isinstance(error, torch.distributed.DistNetworkError | torch.distributed.DistBackendError)
    if lost or any(words in message for words in CONNECTION_LOST):
        hint = "check the logs of the other nodes: the first process that failed has the cause"
        return RmtoolError("E0805", "lost the connection to another rank", hint, found=message)
    return None


def main() -> None:
    """Run a training process: `python -m rmtool.training.worker RUN_FOLDER`."""
    folder, rank = Path(sys.argv[1]), int(os.environ.get("RANK", 0))
    mark_started(folder, rank)
    with redacted_output():
        code = _run_in(folder, rank)
    sys.exit(code)


def _run_in(folder: Path, rank: int) -> int:
    """Train in a run folder, and leave what happened in the status of the process; return its exit code."""
    code, failure, ui = int(ExitCode.OK), None, None
    try:
        recipe = load_recipe(str(folder / CONFIG_FILE))
        accelerator = start_accelerator(recipe)
        ui = worker_ui(accelerator.is_main_process)
        run(recipe, folder, accelerator, ui)
        accelerator.end_training()  # closes the process group, which torch would warn of
    except Stopped as stopped:
        code = stopped.exit_code
        if ui:
            ui.say(str(stopped))
    except RmtoolError as error:
        code, failure = error.exit_code, error
    except Exception as error:  # noqa: BLE001 - the launcher shows it, the log has the traceback
        with contextlib.suppress(OSError):  # the disk may be full
            traceback.print_exc()
        failure = _known_error(error)
        code = failure.exit_code if failure else ExitCode.BUG
    mark_exited(folder, rank, int(code), failure.as_dict() if failure else None)
    return int(code)


if __name__ == "__main__":
    main()
