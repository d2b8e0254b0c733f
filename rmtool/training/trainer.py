"""The training loop: optimizer steps, evaluations, and the best of them.

In: a trainer, a recipe and tokenized pairs. Out: trained weights, and metrics.
Cost: that of the steps (`step.py`), and a forward pass over the eval set per evaluation.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rmtool.config import TrainConfig
from rmtool.dataset.batches import BatchItem, count_pairs, epoch_steps, plan_steps
from rmtool.dataset.split import Split
from rmtool.evaluation import evaluate as evaluation
from rmtool.evaluation.metrics import EVAL_PREFIX, describe
from rmtool.model.out_of_memory import PackOutOfMemoryError
from rmtool.tokenization.tokenized_dataset import TokenizedDataset
from rmtool.training.engine import peak_memory
from rmtool.training.schedule import lr_multiplier
from rmtool.training.step import Trainer, training_step
from rmtool.training.tracking import Tracker
from rmtool.ui import Ui


@dataclass
class BestCheckpoint:
    """The best evaluation so far, and the number of evaluations since."""

    train: TrainConfig
    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    since: int = 0

    def update(self, step: int, metrics: dict[str, float]) -> bool:
        """Return whether these metrics are better than all before; equal ones are not."""
        name = f"{EVAL_PREFIX}/{self.train.metric_for_best}"
        sign = 1 if self.train.metric_for_best == "accuracy" else -1
        better = not self.metrics or sign * metrics[name] > sign * self.metrics[name]
        self.since = 0 if better else self.since + 1
        if better:
            self.step, self.metrics = step, metrics
        return better

    @property
    def should_stop(self) -> bool:
        """Whether early stopping ends the run."""
        limit = self.train.early_stopping_patience
        return limit is not None and self.since >= limit


def train_loop(
    trainer: Trainer,
    split: Split,
    tracker: Tracker | None,
    ui: Ui,
    save: Callable[[BestCheckpoint], None] | None = None,
) -> dict[str, float]:
    """Train for all epochs, or until early stopping; return the metrics of the last evaluation, or of the best one
    where the recipe keeps the best checkpoint (empty without eval pairs).

    Args:
        save: called after each evaluation that is the best so far, where the recipe keeps the best checkpoint.
    """
    train, metadata, groups = trainer.recipe.train, split.train.metadata, split.train.groups
    pairs, best, metrics = count_pairs(metadata), BestCheckpoint(train), dict[str, float]()
    total = plan_steps(train.epochs, train.max_steps, pairs, train.batch_size)
    epochs = (epoch_steps(metadata, groups, train.seed, epoch, train.batch_size) for epoch in range(train.epochs))
    trainer.engine.wrapped.train()
    episode = 0
    with ui.progress("Training", total, "steps") as bar:
        for step, batch in zip(range(1, total + 1), itertools.chain.from_iterable(epochs), strict=False):
            numbers = _timed_step(trainer, batch, step, total)
            episode += count_pairs(batch)
            numbers = {"step": step, "episode": episode, "epoch": episode / pairs, **numbers}
            bar.advance(1, _note(numbers))
            if split.eval.metadata and (step == total or (train.eval_every and step % train.eval_every == 0)):
                metrics = run_eval(trainer, split.eval, ui)
                ui.say(f"step {step}, {EVAL_PREFIX}: {describe(metrics)}")
                numbers |= metrics
                if best.update(step, metrics) and train.keep == "best" and save:
                    save(best)
            if tracker:
                tracker.log(numbers)
            if best.should_stop:
                since = f"eval {train.metric_for_best} has not improved since step {best.step}"
                ui.say(f"early stopping at step {step}: {since}")
                break
    return best.metrics if train.keep == "best" else metrics


def _timed_step(trainer: Trainer, batch: Sequence[BatchItem], step: int, total: int) -> dict[str, float]:
    """Take one step; return its metrics."""
    train, started = trainer.recipe.train, time.monotonic()
    lr = train.learning_rate * lr_multiplier(train, step - 1, total)
    result = training_step(trainer, batch, lr, step)
    return {
        **result.metrics(),
        "train/rm/lr": lr,
        "step_seconds": time.monotonic() - started,
        "unique_tokens": sum(item.group.unique_tokens for item in batch),
        "peak_memory": peak_memory(trainer.model.device),  # bytes
    }


def _note(numbers: dict[str, Any]) -> str:
    """Describe a step in a few words."""
    if "skipped" in numbers:
        return "skipped (NaN or inf)"
    return f"loss {numbers['train/rm/loss']:.3f} acc {numbers['train/rm/accuracy']:.2f}"


def run_eval(trainer: Trainer, held_out: TokenizedDataset, ui: Ui) -> dict[str, float]:
    """Return the eval metrics; the ranks share the forward passes.

    Raises:
        RmtoolError: E0409 a reward is NaN or inf; E0503 out of memory, where smaller packs do not help.
    """
    while True:
        try:
            return _evaluate(trainer, held_out, ui)
        except PackOutOfMemoryError:
            smaller = trainer.tokens_per_pack // 2
        trainer.continue_with(smaller)


def _evaluate(trainer: Trainer, held_out: TokenizedDataset, ui: Ui) -> dict[str, float]:
    wrapped, limit = trainer.engine.wrapped, trainer.tokens_per_pack
    with ui.progress("Evaluating", len(held_out.metadata), "rows") as bar:
        result = evaluation.evaluate(
            *(trainer.model, held_out.metadata, held_out.groups, limit, bar),
            forward_module=wrapped,
            dist=trainer.engine.dist,
        )
    wrapped.train()
    return result.total.report(EVAL_PREFIX)
