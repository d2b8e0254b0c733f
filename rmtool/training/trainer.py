"""The training loop: the engine that runs a step, optimizer steps, evaluations, and the best of them.

In: a model with its optimizer, a recipe and tokenized pairs. Out: trained weights, and metrics.
Cost per step: a forward and a backward pass over the unique tokens of its pairs, in packs of at most tokens_per_pack.
Shapes: N responses of a pack, B pairs of a pack.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from rmtool.config import Recipe
from rmtool.dataset.batches import BatchItem, count_pairs, plan_steps, run_steps
from rmtool.dataset.split import Split
from rmtool.dist import DistInfo
from rmtool.errors import RmtoolError
from rmtool.evaluation import evaluate as evaluation
from rmtool.evaluation.metrics import EVAL_PREFIX, TRAIN_PREFIX, PairSums, describe
from rmtool.model.loss import pair_losses
from rmtool.model.reward_model import RewardModel
from rmtool.model.rewards import AbandonedError
from rmtool.model.weights import merged_weights
from rmtool.tokenization.tokenized_dataset import TokenizedDataset
from rmtool.training.engine import peak_memory
from rmtool.training.progress import Best, Progress
from rmtool.training.schedule import lr_multiplier
from rmtool.training.stopping import Stopping
from rmtool.training.tracking import Tracker
from rmtool.training.worker_status import EVALUATION_BAR, TRAINING_BAR
from rmtool.ui import Ui


@dataclass
class Trainer:
    """A recipe, and the engine that runs it."""

    recipe: Recipe
    engine: Engine

    @property
    def model(self) -> RewardModel:
        return self.engine.model


def training_step(trainer: Trainer, batch: Sequence[BatchItem], lr: float, step: int) -> tuple[PairSums, float]:
    """Take one optimizer step: pack, forward, loss, backward, update.

    The loss is the sum over the batch's pairs divided by their number, however they are split into packs and ranks.

    In: the batch, the same on every rank. Out: the sums over its pairs, and the gradient norm before clipping.

    Raises:
        RmtoolError: E0802 the loss or the gradient norm is NaN or inf.
    """
    model, engine, train, dist = trainer.model, trainer.engine, trainer.recipe.train, trainer.engine.dist
    packs = model.plan([item.group for item in batch], train.tokens_per_pack, dist.world_size)
    mine, sums = packs[dist.rank :: dist.world_size], PairSums()
    for number, indices in enumerate(mine, 1):
        last = number == len(mine)
        # All ranks must take part: one with an empty pack runs an item with weight zero.
        items = [batch[index] for index in indices] or batch[:1]
        weight = dist.world_size / count_pairs(batch) if indices else 0.0  # engines average gradients over ranks
        with engine.accumulating(last):
            rewards_N = engine.wrapped(model.collate([item.group for item in items]))
            pairs = PackedPairs.of(items)
            chosen_B, rejected_B = rewards_N[pairs.chosen], rewards_N[pairs.rejected]
            margins_B = rewards_N.new_tensor(pairs.margins) if train.use_margins else None
            losses_B = pair_losses(chosen_B, rejected_B, margins_B, train) * rewards_N.new_tensor(pairs.weights)
            engine.backward(losses_B.sum() * weight, last)
        if indices:
            sums += PairSums.of(chosen_B, rejected_B, losses_B)
    sums = sums.reduce(dist)
    require_finite_step(sums, 0.0, step, batch)
    grad_norm = engine.update(lr, lambda norm: require_finite_step(sums, norm, step, batch))
    return sums, grad_norm


@dataclass(frozen=True)
class PackedPairs:
    """The B pairs of a pack: indices into its rewards, margins (0 without one), and weights."""

    chosen: list[int]
    rejected: list[int]
    margins: list[float]
    weights: list[float]

    @classmethod
    def of(cls, items: Sequence[BatchItem]) -> PackedPairs:
        """Number the responses of a pack's items in the order of its rewards."""
        starts = itertools.accumulate((len(item.group.responses) for item in items), initial=0)
        pairs = [
            (start + winner, start + loser, margin, item.weight)
            for start, item in zip(starts, items, strict=False)
            for winner, loser, margin in item.preferences
        ]
        return cls(*(list(column) for column in zip(*pairs, strict=True)))


def require_finite_step(sums: PairSums, norm: float, step: int, batch: Sequence[BatchItem]) -> None:
    """Stop before NaN or inf reaches the weights.

    Raises:
        RmtoolError: E0802 the loss or the gradient norm is NaN or inf.
    """
    if math.isfinite(sums.loss) and math.isfinite(norm):
        return
    rows = ", ".join(str(item.metadata.place) for item in batch[:4])
    raise RmtoolError(
        "E0802",
        f"step {step}: the loss ({sums.loss / max(sums.pairs, 1)}) or gradient norm ({norm}) is NaN or inf",
        "lower train.learning_rate, or set train.precision=fp32; check the rows of this step",
        found=f"rows {rows}{', ...' if len(batch) > 4 else ''}",
    )


@dataclass
class Engine:
    """A model and its optimizer, prepared by accelerate.

    In: a model (`model`; `wrapped` is what accelerate made of it). Out: gradients, updates, sums over all ranks and the
    full state dict, with the same calls on every engine.
    """

    accelerator: Accelerator
    model: RewardModel
    wrapped: Any
    optimizer: Any
    max_grad_norm: float | None

    @classmethod
    def prepare(
        cls, accelerator: Accelerator, model: RewardModel, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
    ) -> Engine:
        """Wrap the model and its optimizer for the engine of this process group."""
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        return cls(accelerator, model, wrapped, optimizer, max_grad_norm)

    @property
    def deepspeed(self) -> bool:
        """Whether the engine is DeepSpeed's."""
        return hasattr(self.wrapped, "set_gradient_accumulation_boundary")

    @property
    def dist(self) -> DistInfo:
        """Rank, world size and sum, for code that divides work over ranks."""
        return DistInfo(self.accelerator.process_index, self.accelerator.num_processes, self.sum)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks; the result is on the CPU."""
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum").cpu()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate the gradients of this loss; after the `last` loss of a step, average them over all ranks."""
        if self.deepspeed:
            self.wrapped.set_gradient_accumulation_boundary(last)
            self.wrapped.backward(loss)
        else:
            self.accelerator.backward(loss)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context for forward and backward: DDP reduces gradients only in the `last` pack of a step."""
        no_sync = not last and not self.deepspeed
        return self.accelerator.no_sync(self.wrapped) if no_sync else contextlib.nullcontext()

    def update(self, rate: float, check_norm: Callable[[float], None]) -> float:
        """Clip the gradients and step the optimizer at this learning rate; return the norm before clipping.

        `check_norm` gets that norm, and raises to prevent the step; DeepSpeed computes the norm in its step, so there
        the check follows it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.deepspeed:
            self.wrapped.step()
            norm = float(self.wrapped.get_global_grad_norm())
            check_norm(norm)
            return norm
        norm = self.clip()
        check_norm(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def clip(self) -> float:
        """Clip the gradients and return their norm before; not for DeepSpeed, which clips in its step."""
        return float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm or math.inf))

    def full_state_dict(self, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        """Gather the classifier's state dict in `dtype` on the CPU of the main process; None on the others.

        All ranks must call it.
        """
        main, weights = self.accelerator.is_main_process, dict[str, torch.Tensor]()
        for name, value in merged_weights(self.model.classifier, dtype):
            if main:
                weights[name] = value
        return weights if main else None


def train_loop(
    trainer: Trainer,
    split: Split,
    tracker: Tracker | None,
    ui: Ui,
    save: Callable[[Best], None] | None = None,
    stopping: Stopping | None = None,
    progress: Progress | None = None,
    snapshot: Callable[[], float] | None = None,
) -> dict[str, float]:
    """Train for all epochs, or until early stopping; return the last eval metrics, or the best where that is kept.

    Args:
        save: called after each evaluation that is the best so far, where the recipe keeps the best checkpoint.
        progress: where the run is, updated after each step; default: at its start.
        snapshot: called after each step but the last; returns the seconds that the last snapshot took.
        stopping: asked after each step and between the forwards of an evaluation; it saves and raises `Stopped`.
    """
    train, data, progress = trainer.recipe.train, split.train, progress or Progress()
    pairs = count_pairs(data.metadata)
    total = plan_steps(train.epochs, train.max_steps, pairs, train.batch_size)
    after = _AfterStep(trainer, split, tracker, ui, save, stopping, progress, total)
    trainer.engine.wrapped.train()
    pending, progress.pending = progress.pending, None
    ended = pending is not None and not after.complete(pending)
    batches = run_steps(data.metadata, data.groups, train.seed, train.batch_size, progress.step)
    with ui.progress(TRAINING_BAR, total - progress.step, "steps") as bar:
        while progress.step < total and not ended:
            batch = next(batches)
            step = progress.step + 1
            numbers = _timed_step(trainer, batch, step, total)
            progress.step, progress.episode = step, progress.episode + count_pairs(batch)
            numbers = {"step": step, "episode": progress.episode, "epoch": progress.episode / pairs, **numbers}
            bar.advance(1, f"loss {numbers['train/rm/loss']:.3f} acc {numbers['train/rm/accuracy']:.2f}")
            ended = not after.complete(numbers) or step == total
            if not ended:
                after.snapshot_or_stop(snapshot, numbers["step_seconds"])
    return progress.best.metrics if train.keep == "best" else progress.metrics


@dataclass(frozen=True)
class _AfterStep:
    """What follows an optimizer step; the fields are arguments of `train_loop`."""

    trainer: Trainer
    split: Split
    tracker: Tracker | None
    ui: Ui
    save: Callable[[Best], None] | None
    stopping: Stopping | None
    progress: Progress
    total: int

    def complete(self, numbers: dict[str, float]) -> bool:
        """Evaluate if it is time, and log the step; return whether to go on, without early stopping."""
        train, progress, step = self.trainer.recipe.train, self.progress, self.progress.step
        due = step == self.total or (train.eval_every and step % train.eval_every == 0)
        if self.split.eval.metadata and due:
            metrics = run_eval(self.trainer, self.split.eval, self.ui, self.stopping)
            if not metrics and self.stopping:
                self.stopping.leave(step, self.total, numbers)
            self.ui.say(f"step {step}, {EVAL_PREFIX}: {describe(metrics)}")
            numbers, progress.metrics = numbers | metrics, metrics
            if progress.best.update(train, step, metrics) and train.keep == "best" and self.save:
                self.save(progress.best)
        if self.tracker:
            self.tracker.log(numbers)
        if progress.best.should_stop(train):
            self.ui.say(f"early stopping at step {step}: {progress.best.since_when(train)}")
        return not progress.best.should_stop(train)

    def snapshot_or_stop(self, snapshot: Callable[[], float] | None, step_seconds: float) -> None:
        """Save a snapshot if one is due, and leave if that is requested."""
        save_seconds = snapshot() if snapshot else 0.0
        if self.stopping:
            self.stopping.save_seconds = save_seconds
            self.stopping.after_step(self.progress.step, self.total, step_seconds)


def _timed_step(trainer: Trainer, batch: Sequence[BatchItem], step: int, total: int) -> dict[str, float]:
    """Take one step; return its metrics."""
    train, started = trainer.recipe.train, time.monotonic()
    lr = train.learning_rate * lr_multiplier(train, step - 1, total)
    sums, grad_norm = training_step(trainer, batch, lr, step)
    return {
        **sums.report(TRAIN_PREFIX),
        "train/rm/lr": lr,
        "grad_norm": grad_norm,
        "step_seconds": time.monotonic() - started,
        "unique_tokens": sum(item.group.unique_tokens for item in batch),
        "peak_memory": peak_memory(trainer.model.device),  # bytes
    }


def run_eval(
    trainer: Trainer, held_out: TokenizedDataset, ui: Ui, stopping: Stopping | None = None
) -> dict[str, float]:
    """Return the eval metrics; the ranks share the forward passes. Without any if the ranks are to stop."""
    wrapped, limit, metrics = trainer.engine.wrapped, trainer.recipe.train.tokens_per_pack, dict[str, float]()
    with ui.progress(EVALUATION_BAR, len(held_out.metadata), "rows") as bar, contextlib.suppress(AbandonedError):
        result = evaluation.evaluate(
            *(trainer.model, held_out.metadata, held_out.groups, limit, bar),
            forward_module=wrapped,
            dist=trainer.engine.dist,
            interrupt=stopping.requested if stopping else None,
        )
        metrics = result.total.report(EVAL_PREFIX)
    wrapped.train()
    return metrics
