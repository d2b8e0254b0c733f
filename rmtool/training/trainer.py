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
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from rmtool.config import Recipe, TrainConfig
from rmtool.dataset.batches import BatchItem, count_pairs, epoch_steps, plan_steps
from rmtool.dataset.split import Split
from rmtool.dist import DistInfo
from rmtool.errors import RmtoolError
from rmtool.evaluation import evaluate as evaluation
from rmtool.evaluation.metrics import EVAL_PREFIX, TRAIN_PREFIX, PairSums, describe
from rmtool.model.loss import pair_losses
from rmtool.model.reward_model import RewardModel
from rmtool.model.weights import merged_weights
from rmtool.tokenization.tokenized_dataset import TokenizedDataset
from rmtool.training.engine import peak_memory
from rmtool.training.schedule import lr_multiplier
from rmtool.training.tracking import Tracker
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
    with ui.training(trainer.recipe.name, total, ()) as board:
        for step, batch in zip(range(1, total + 1), itertools.chain.from_iterable(epochs), strict=False):
            numbers = _timed_step(trainer, batch, step, total)
            episode += count_pairs(batch)
            numbers = {"step": step, "episode": episode, "epoch": episode / pairs, **numbers}
            board.step(numbers)
            if split.eval.metadata and (step == total or (train.eval_every and step % train.eval_every == 0)):
                metrics = run_eval(trainer, split.eval, ui)
                ui.say(f"step {step}, {EVAL_PREFIX}: {describe(metrics)}")
                board.event("evaluation", f"step {step}: {describe(metrics)}")
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
    sums, grad_norm = training_step(trainer, batch, lr, step)
    return {
        **sums.report(TRAIN_PREFIX),
        "train/rm/lr": lr,
        "grad_norm": grad_norm,
        "step_seconds": time.monotonic() - started,
        "unique_tokens": sum(item.group.unique_tokens for item in batch),
        "tokens": sum(item.group.tokens for item in batch),  # without prefix sharing
        "peak_memory": peak_memory(trainer.model.device),  # bytes
    }


def run_eval(trainer: Trainer, held_out: TokenizedDataset, ui: Ui) -> dict[str, float]:
    """Return the eval metrics; the ranks share the forward passes."""
    wrapped, limit = trainer.engine.wrapped, trainer.recipe.train.tokens_per_pack
    with ui.progress("Evaluating", len(held_out.metadata), "rows") as bar:
        result = evaluation.evaluate(
            *(trainer.model, held_out.metadata, held_out.groups, limit, bar),
            forward_module=wrapped,
            dist=trainer.engine.dist,
        )
    wrapped.train()
    return result.total.report(EVAL_PREFIX)
