"""A run's optimizer steps and evaluations, and which of them is the best.

In: an `Engine`, a recipe and encoded pairs. Out: the trained weights, in the engine's model, and the metrics.
Cost per step: one forward and backward over the step's unique tokens, cut into packs of at most tokens_per_pack.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from rmtool.config import Recipe, TrainConfig
from rmtool.dataset.batches import BatchItem, count_pairs, epoch_steps, plan_steps
from rmtool.dataset.split import Split
from rmtool.errors import RmtoolError
from rmtool.evaluation import evaluate as evaluation
from rmtool.evaluation.metrics import PairSums
from rmtool.model.loss import pair_losses
from rmtool.model.reward_model import RewardModel
from rmtool.tokenization.tokenized_dataset import TokenizedDataset
from rmtool.training.engine import Engine, peak_memory
from rmtool.training.optim import lr_multiplier
from rmtool.training.tracking import Tracker
from rmtool.ui import Bar, Ui


@dataclass
class Trainer:
    """What a step needs."""

    recipe: Recipe
    engine: Engine

    @property
    def model(self) -> RewardModel:
        return self.engine.model

    def gradients(self, batch: Sequence[BatchItem]) -> PairSums:
        """One optimizer step's gradients, and the sums over all ranks' pairs.

        The loss is the sum over the step's pairs divided by their number, however they are cut into packs and ranks.
        """
        engine, dist = self.engine, self.engine.dist
        groups = [item.group for item in batch]
        packs = self.model.plan(groups, self.recipe.train.tokens_per_pack, dist.world_size)[
            dist.rank :: dist.world_size
        ]
        pairs = sum(len(item.preferences) for item in batch)
        sums = PairSums()
        for number, items in enumerate(packs, 1):
            last = number == len(packs)
            with engine.holding(last):
                # A rank without work in this round runs a unit with weight zero: all ranks must take part.
                pack_sums, loss = self._pack([batch[item] for item in items] or batch[:1])
                weight = dist.world_size / pairs if items else 0.0  # engines average gradients over ranks
                engine.backward(loss * weight, last)
            if items:
                sums += pack_sums
        return PairSums.from_vector(dist.sum(sums.vector()))

    def step(self, batch: Sequence[BatchItem], rate: float, number: int) -> tuple[PairSums, float]:
        """Gradients and the update; the sums over the step's pairs, and the gradient norm before clipping.

        Raises:
            RmtoolError: E0802 the loss or the gradient norm is not finite.
        """
        sums = self.gradients(batch)
        require_finite_step(sums, 0.0, number, batch)
        return sums, self.engine.update(rate, lambda norm: require_finite_step(sums, norm, number, batch))

    def _pack(self, batch: Sequence[BatchItem]) -> tuple[PairSums, torch.Tensor]:
        rewards = self.engine.wrapped(self.model.collate([item.group for item in batch]))
        start, winners, losers, margins, weights = 0, list[int](), list[int](), list[float](), list[float]()
        for item in batch:
            for winner, loser, margin in item.preferences:
                winners.append(start + winner)
                losers.append(start + loser)
                margins.append(margin)
                weights.append(item.weight)
            start += len(item.group.responses)
        chosen, rejected = rewards[winners], rewards[losers]
        taken_off = rewards.new_tensor(margins) if self.recipe.train.use_margins else None
        losses = pair_losses(chosen, rejected, taken_off, self.recipe.train) * rewards.new_tensor(weights)
        return PairSums.of(chosen, rejected, losses), losses.sum()

    def evaluate(self, held_out: TokenizedDataset, bar: Bar) -> dict[str, float]:
        """The eval metrics; the ranks share the forwards."""
        result = evaluation.evaluate(
            self.model,
            held_out.metadata,
            held_out.groups,
            self.recipe.train.tokens_per_pack,
            bar,
            forward_module=self.engine.wrapped,
            dist=self.engine.dist,
        )
        self.engine.wrapped.train()
        return result.total.report(evaluation.PREFIX)


@dataclass
class Best:
    """The best evaluation so far, and how many came since."""

    train: TrainConfig
    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    since: int = 0

    def take(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether these metrics are better than all before; equal ones are not."""
        name = f"{evaluation.PREFIX}/{self.train.metric_for_best}"
        sign = 1 if self.train.metric_for_best == "accuracy" else -1
        better = not self.metrics or sign * metrics[name] > sign * self.metrics[name]
        self.since = 0 if better else self.since + 1
        if better:
            self.step, self.metrics = step, metrics
        return better

    @property
    def should_stop(self) -> bool:
        return self.train.early_stopping_patience is not None and self.since >= self.train.early_stopping_patience


def train_loop(
    trainer: Trainer, split: Split, tracker: Tracker | None, ui: Ui, save: Callable[[Best], None] | None = None
) -> dict[str, float]:
    """All steps of all epochs, or until patience ends; returns the metrics of the last evaluation, or of the best one
    where the recipe keeps that (empty without held-out pairs).

    Args:
        save: called after each evaluation that is the best so far, where the recipe keeps the best.
    """
    train, metadata, groups = trainer.recipe.train, split.train.metadata, split.train.groups
    pairs, best, metrics = count_pairs(metadata), Best(train), dict[str, float]()
    total = plan_steps(train.epochs, train.max_steps, pairs, train.batch_size)
    epochs = (epoch_steps(metadata, groups, train.seed, epoch, train.batch_size) for epoch in range(train.epochs))
    trainer.engine.wrapped.train()
    episode = 0
    with ui.progress("Training", total, "steps") as bar:
        for step, batch in zip(range(1, total + 1), itertools.chain.from_iterable(epochs), strict=False):
            numbers, seen = _timed_step(trainer, batch, step, total)
            episode += seen
            numbers = {"step": step, "episode": episode, "epoch": episode / pairs, **numbers}
            bar.advance(1, f"loss {numbers['train/rm/loss']:.3f} acc {numbers['train/rm/accuracy']:.2f}")
            if split.held_out.metadata and (step == total or (train.eval_every and step % train.eval_every == 0)):
                metrics = run_eval(trainer, split.held_out, ui)
                ui.say(f"step {step}, {evaluation.PREFIX}: {describe(metrics)}")
                numbers |= metrics
                if best.take(step, metrics) and train.keep == "best" and save:
                    save(best)
            if tracker:
                tracker.log(numbers)
            if best.should_stop:
                ui.say(f"stopped after step {step}: no better {train.metric_for_best} since step {best.step}")
                break
    return best.metrics if train.keep == "best" else metrics


def _timed_step(trainer: Trainer, batch: Sequence[BatchItem], step: int, total: int) -> tuple[dict[str, float], int]:
    """One step; its numbers, and the pairs it saw."""
    train, started = trainer.recipe.train, time.monotonic()
    rate = train.learning_rate * lr_multiplier(train, step - 1, total)
    sums, norm = trainer.step(batch, rate, step)
    numbers = {
        **sums.report("train/rm"),
        "train/rm/lr": rate,
        "grad_norm": norm,
        "step_seconds": time.monotonic() - started,
        "unique_tokens": sum(item.group.unique_tokens for item in batch),
        "peak_memory": peak_memory(trainer.model.device),  # bytes
    }
    return numbers, int(sums.pairs)


def run_eval(trainer: Trainer, held_out: TokenizedDataset, ui: Ui) -> dict[str, float]:
    with ui.progress("Evaluating", len(held_out.metadata), "pairs") as bar:
        return trainer.evaluate(held_out, bar)


def describe(metrics: dict[str, float]) -> str:
    """Eval metrics as one short line of words."""
    return ", ".join(f"{name.rpartition('/')[2]} {value:.4f}" for name, value in metrics.items())


def require_finite_step(sums: PairSums, norm: float, step: int, batch: Sequence[BatchItem]) -> None:
    """Stop before a bad gradient reaches the weights."""
    if math.isfinite(sums.loss) and math.isfinite(norm):
        return
    places = ", ".join(str(item.metadata.place) for item in batch[:4])
    raise RmtoolError(
        "E0802",
        f"step {step}: the loss ({sums.loss / max(sums.pairs, 1)}) or gradient norm ({norm}) is not a finite number",
        "lower train.learning_rate, or set train.precision=fp32; the rows of this step are named above",
        found=f"rows {places}{', ...' if len(batch) > 4 else ''}",
    )
