"""The training loop: optimizer steps, evaluations and the best of them, snapshots.

In: a recipe with its engine (`Trainer`), tokenized pairs, and where the run is. Out: trained weights, and metrics.
Cost: that of the steps (`step.py`), and of the evaluations.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rmtool.dataset.batches import BatchItem, count_pairs, plan_steps, run_steps
from rmtool.dataset.split import Split
from rmtool.evaluation import evaluate as evaluation
from rmtool.evaluation.evaluate import EvalResult, Samples
from rmtool.evaluation.metrics import EVAL_PREFIX, describe
from rmtool.model.out_of_memory import PackOutOfMemoryError
from rmtool.model.rewards import AbandonedError, compute_rewards
from rmtool.tokenization.tokenized_dataset import TokenizedDataset
from rmtool.training.engine import peak_memory
from rmtool.training.eval_samples import SAMPLES, sample_rows
from rmtool.training.progress import Best, Progress
from rmtool.training.schedule import lr_multiplier
from rmtool.training.step import Trainer, training_step
from rmtool.training.stopping import Stopping
from rmtool.training.tracking import Tracker
from rmtool.training.worker_status import EVALUATION_BAR
from rmtool.ui import Board, Ui


def train_loop(
    trainer: Trainer,
    split: Split,
    tracker: Tracker | None,
    ui: Ui,
    save: Callable[[Best], None] | None = None,
    stopping: Stopping | None = None,
    progress: Progress | None = None,
    snapshot: Callable[[], tuple[float, str]] | None = None,
) -> dict[str, float]:
    """Train for all epochs, or until early stopping; return the last eval metrics, or the best where that is kept.

    Args:
        save: called after each evaluation that is the best so far, where the recipe keeps the best checkpoint.
        progress: where the run is, updated after each step; default: at its start.
        snapshot: called after each step but the last; returns the seconds that the last snapshot took, and what was
            written now.
        stopping: asked after each step and between the forwards of an evaluation; it saves and raises `Stopped`.
    """
    train, data, progress = trainer.recipe.train, split.train, progress or Progress()
    pairs = count_pairs(data.metadata)
    total = plan_steps(train.epochs, train.max_steps, pairs, train.batch_size)
    trainer.engine.wrapped.train()
    pending, progress.pending = progress.pending, None
    steps = run_steps(data.metadata, data.groups, train.seed, train.batch_size, progress.step)
    batches = _Batches(trainer, itertools.islice(steps, total - progress.step))
    with ui.training(trainer.recipe.name, total, tracker.past if tracker else ()) as board:
        after = _AfterStep(trainer, split, tracker, ui, board, save, stopping, progress, total)
        ended = pending is not None and not after.complete(pending)
        while progress.step < total and not ended:
            batch = batches.take()
            step = progress.step + 1
            numbers = _timed_step(trainer, batch, step, total, batches.prepare)
            progress.step, progress.episode = step, progress.episode + count_pairs(batch)
            numbers = {"step": step, "episode": progress.episode, "epoch": progress.episode / pairs, **numbers}
            ended = not after.complete(numbers) or step == total
            if not ended:
                after.snapshot_or_stop(snapshot, numbers["step_seconds"])
    return progress.best.metrics if train.keep == "best" else progress.metrics


@dataclass
class _Batches:
    """The batches of the steps that are left; the next one is planned while a step is on the device."""

    trainer: Trainer
    batches: Iterator[list[BatchItem]]
    following: list[BatchItem] | None = None

    def take(self) -> list[BatchItem]:
        batch, self.following = self.following or next(self.batches), None
        return batch

    def prepare(self) -> None:
        """Plan the step that follows the one that was taken, if one does."""
        self.following = next(self.batches, None)
        if self.following:
            self.trainer.prepare(self.following)


@dataclass(frozen=True)
class _AfterStep:
    """What follows an optimizer step; the fields are arguments of `train_loop`."""

    trainer: Trainer
    split: Split
    tracker: Tracker | None
    ui: Ui
    board: Board
    save: Callable[[Best], None] | None
    stopping: Stopping | None
    progress: Progress
    total: int

    def complete(self, numbers: dict[str, float]) -> bool:
        """Evaluate if it is time, and log the step; return whether to go on, without early stopping."""
        train, progress, step = self.trainer.recipe.train, self.progress, self.progress.step
        self.board.step(numbers)
        due = step == self.total or (train.eval_every and step % train.eval_every == 0)
        if self.split.eval.metadata and due:
            metrics = run_eval(self.trainer, self.split.eval, self.ui, self.stopping, self._log_samples)
            if not metrics and self.stopping:
                self.stopping.leave(step, self.total, numbers)
            self.ui.say(f"step {step}, {EVAL_PREFIX}: {describe(metrics)}")
            self.board.event("evaluation", f"step {step}: {describe(metrics)}")
            numbers, progress.metrics = numbers | metrics, metrics
            if progress.best.update(train, step, metrics) and train.keep == "best" and self.save:
                self.save(progress.best)
        if self.tracker:
            self.tracker.log(numbers)
        if progress.best.should_stop(train):
            self.ui.say(f"early stopping at step {step}: {progress.best.since_when(train)}")
        return not progress.best.should_stop(train)

    def _log_samples(self, samples: Samples) -> None:
        if self.tracker:
            self.tracker.log_samples(sample_rows(self.split, samples, self.progress.step))

    def snapshot_or_stop(self, snapshot: Callable[[], tuple[float, str]] | None, step_seconds: float) -> None:
        """Save a snapshot if one is due, and leave if that is requested."""
        save_seconds, written = snapshot() if snapshot else (0.0, "")
        if written:
            self.board.event("snapshot", written)
        if self.stopping:
            self.stopping.save_seconds = save_seconds
            self.stopping.after_step(self.progress.step, self.total, step_seconds)


def _timed_step(
    trainer: Trainer, batch: Sequence[BatchItem], step: int, total: int, meanwhile: Callable[[], None]
) -> dict[str, float]:
    """Take one step; return its metrics."""
    train, started = trainer.recipe.train, time.monotonic()
    lr = train.learning_rate * lr_multiplier(train, step - 1, total)
    result = training_step(trainer, batch, lr, step, meanwhile)
    return {
        **result.metrics(),
        "train/rm/lr": lr,
        "step_seconds": time.monotonic() - started,
        "unique_tokens": sum(item.group.unique_tokens for item in batch),
        "tokens": sum(item.group.tokens for item in batch),  # without prefix sharing
        "peak_memory": peak_memory(trainer.model.device),  # bytes
    }


def run_eval(
    trainer: Trainer,
    held_out: TokenizedDataset,
    ui: Ui,
    stopping: Stopping | None = None,
    log_samples: Callable[[Samples], None] = lambda samples: None,
) -> dict[str, float]:
    """Return the eval metrics; the ranks share the forward passes. Without any if the ranks are to stop.

    Args:
        log_samples: called with rows drawn at random, the same in each evaluation, and their rewards.

    Raises:
        RmtoolError: E0409 a reward is NaN or inf; E0503 out of memory, where smaller packs do not help.
    """
    while True:
        try:
            result = _evaluate(trainer, held_out, ui, stopping)
            log_samples(result.samples)
            return result.total.report(EVAL_PREFIX)
        except AbandonedError:
            return {}
        except PackOutOfMemoryError:
            smaller = trainer.tokens_per_pack // 2
        trainer.continue_with(smaller)


def _evaluate(trainer: Trainer, held_out: TokenizedDataset, ui: Ui, stopping: Stopping | None) -> EvalResult:
    wrapped, limit = trainer.engine.wrapped, trainer.tokens_per_pack
    try:
        with ui.progress(EVALUATION_BAR, len(held_out.metadata), "rows") as bar:
            interrupt = stopping.requested if stopping else None
            given = (trainer.model, held_out.groups, limit, bar, wrapped, trainer.engine.dist, interrupt)
            with trainer.evaluating():
                return evaluation.evaluate(
                    held_out.metadata, lambda: (compute_rewards(*given), None), SAMPLES, trainer.recipe.train.seed
                )
    finally:
        wrapped.train()
