"""One optimizer step: pack, forward, loss, backward, update.

In: a batch, the same on every rank. Out: weights that have moved, the sums over the batch's pairs, the gradient norm.
Cost: a forward and a backward pass over the unique tokens of the pairs, in packs of at most `Trainer.tokens_per_pack`.
Shapes: N responses of a pack, B pairs of a pack.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import gather_object

from rmtool.config import Recipe
from rmtool.dataset.batches import BatchItem, count_pairs
from rmtool.evaluation.metrics import TRAIN_PREFIX, PairSums
from rmtool.model.loss import pair_losses
from rmtool.model.out_of_memory import row_out_of_memory, unless_out_of_memory
from rmtool.model.reward_model import RewardModel
from rmtool.training.engine import Engine
from rmtool.training.nonfinite import SkippedStep, input_gradient_norm, nan_unless_finite, stop_or_skip, trace_step
from rmtool.training.pack_budget import ended_out_of_memory, read_pack_budget, smaller_budget
from rmtool.ui import Ui


@dataclass
class Trainer:
    """A recipe, the engine that runs it, and what a run remembers of its steps.

    tokens_per_pack: the recipe's, or less after the device was out of memory
    skipped:         the steps that were not taken, with their rows
    """

    recipe: Recipe
    engine: Engine
    ui: Ui
    folder: Path
    tokens_per_pack: int
    skipped: list[SkippedStep] = field(default_factory=list)

    @classmethod
    def start(
        cls, recipe: Recipe, engine: Engine, ui: Ui, folder: Path, skipped: list[SkippedStep] | None = None
    ) -> Trainer:
        """Start with the pack budget that an earlier run in this folder left. All ranks must call it.

        Args:
            skipped: of the steps before a resume; further ones are added to this list.
        """
        wanted = recipe.train.tokens_per_pack
        budget = min(gather_object([read_pack_budget(folder, wanted)]))  # nodes may not share the folder
        if budget < wanted:
            ui.say(f"an earlier run was out of memory: {budget:,} tokens per pack instead of {wanted:,}")
        return cls(recipe, engine, ui, folder, budget, [] if skipped is None else skipped)

    @property
    def model(self) -> RewardModel:
        return self.engine.model

    def plan(self, batch: Sequence[BatchItem], tokens_per_pack: int) -> list[list[int]]:
        """Plan the packs of a step."""
        return self.model.plan([item.group for item in batch], tokens_per_pack, self.engine.dist.world_size)

    def use_smaller_packs(self, batch: Sequence[BatchItem], failed: Sequence[BatchItem]) -> None:
        """Discard the gradients of half a step, and halve the pack budget.

        Raises:
            RmtoolError: E0503 the failed pack has one row, or other ranks wait for this one.
        """
        if len(failed) == 1:
            raise row_out_of_memory(failed[0].metadata.place, failed[0].group.unique_tokens)
        smaller = smaller_budget(functools.partial(self.plan, batch), self.tokens_per_pack)
        self.continue_with(smaller)

    def continue_with(self, smaller: int) -> None:
        """Set a smaller pack budget for the rest of the run.

        Raises:
            RmtoolError: E0503 other ranks wait for this one.
        """
        budget = self.tokens_per_pack
        assert 0 < smaller < budget
        if not self.engine.can_retry:
            raise ended_out_of_memory(self.folder, self.recipe.train.tokens_per_pack, budget, smaller)
        self.engine.discard_gradients()
        self.ui.say(
            f"out of memory at {budget:,} tokens per pack: continuing with {smaller:,} (the steps stay the same)"
        )
        self.tokens_per_pack = smaller


@dataclass(frozen=True)
class StepResult:
    """The sums over a step's pairs, and the gradient norm before clipping; `skipped` if the weights have not moved."""

    sums: PairSums
    grad_norm: float
    skipped: SkippedStep | None = None

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the step; of a skipped one there are none, only that it was skipped."""
        if self.skipped:
            return {"skipped": True}
        return {**self.sums.report(TRAIN_PREFIX), "grad_norm": self.grad_norm}


def training_step(trainer: Trainer, batch: Sequence[BatchItem], lr: float, step: int) -> StepResult:
    """Take one optimizer step, or none if a loss or the gradient norm is NaN or inf; all ranks do the same.

    Raises:
        RmtoolError: E0802 NaN or inf, unless the recipe lets this step be skipped; E0503 out of memory. The weights and
            the optimizer's state are as they were.
    """
    gradients = accumulate_gradients(trainer, batch)
    while gradients.out_of_memory:
        trainer.use_smaller_packs(batch, gradients.out_of_memory)
        gradients = accumulate_gradients(trainer, batch)
    sums = gradients.sums.reduce(trainer.engine.dist)
    grad_norm = trainer.engine.update(lr)
    if math.isfinite(grad_norm):
        return StepResult(sums, grad_norm)
    alone = functools.partial(has_finite_gradient, trainer)
    trainer.skipped.append(trace_step(step, gradients.nonfinite, gradients.own, batch[0], alone))
    stop_or_skip(trainer.recipe.train, trainer.skipped)
    trainer.ui.say(f"skipped {trainer.skipped[-1]}")
    return StepResult(sums, grad_norm, trainer.skipped[-1])


@dataclass
class Gradients:
    """What the packs of this rank gave, besides the gradients on the engine.

    own:           the items of its packs
    nonfinite:     those whose reward or loss is NaN or inf
    out_of_memory: the items of the pack that ended the step; empty if none did
    """

    sums: PairSums = field(default_factory=PairSums)
    own: list[BatchItem] = field(default_factory=list)
    nonfinite: list[BatchItem] = field(default_factory=list)
    out_of_memory: list[BatchItem] = field(default_factory=list)


def accumulate_gradients(trainer: Trainer, batch: Sequence[BatchItem]) -> Gradients:
    """Pack, forward, loss, backward.

    The loss is the sum over the batch's pairs divided by their number, however they are split into packs and ranks.
    """
    dist, found = trainer.engine.dist, Gradients()
    mine = trainer.plan(batch, trainer.tokens_per_pack)[dist.rank :: dist.world_size]
    for number, indices in enumerate(mine, 1):
        # All ranks must take part: one with an empty pack runs an item with weight zero.
        items = [batch[index] for index in indices] or list(batch[:1])
        weight = dist.world_size / count_pairs(batch) if indices else 0.0  # engines average gradients over ranks
        run = functools.partial(run_pack, trainer, items, weight, number == len(mine))
        pack = unless_out_of_memory(run)
        if pack is None:
            return Gradients(out_of_memory=items)
        if indices:
            found.sums += pack[0]
            found.nonfinite += pack[1]
            found.own += items
    return found


def run_pack(
    trainer: Trainer, items: Sequence[BatchItem], weight: float, last: bool
) -> tuple[PairSums, list[BatchItem]]:
    """Forward, loss and backward of one pack; return its sums, and the items whose reward or loss is NaN or inf."""
    engine = trainer.engine
    with engine.accumulating(last):
        rewards_N = engine.wrapped(trainer.model.collate([item.group for item in items]))
        pairs = PackedPairs.of(items)
        chosen_B, rejected_B = rewards_N[pairs.chosen], rewards_N[pairs.rejected]
        losses_B = weighted_losses(trainer, pairs, rewards_N)
        engine.backward(losses_B.sum() * weight + nan_unless_finite(rewards_N, losses_B), last)
    sums = PairSums.of(chosen_B, rejected_B, losses_B)
    finite_B = (chosen_B + rejected_B + losses_B).isfinite().tolist() if not sums.finite else []
    bad = {index for index, finite in zip(pairs.items, finite_B, strict=False) if not finite}
    return sums, [items[index] for index in sorted(bad)]


def weighted_losses(trainer: Trainer, pairs: PackedPairs, rewards_N: torch.Tensor) -> torch.Tensor:
    """Return the recipe's loss of each pair, times its weight."""
    train = trainer.recipe.train
    margins_B = rewards_N.new_tensor(pairs.margins) if train.use_margins else None
    losses_B = pair_losses(rewards_N[pairs.chosen], rewards_N[pairs.rejected], margins_B, train)
    return losses_B * rewards_N.new_tensor(pairs.weights)


def has_finite_gradient(trainer: Trainer, item: BatchItem) -> bool:
    """Whether the gradient of this item alone is finite."""

    def loss() -> torch.Tensor:
        rewards_N = trainer.model(trainer.model.collate([item.group]))
        return weighted_losses(trainer, PackedPairs.of([item]), rewards_N).sum()

    return math.isfinite(input_gradient_norm(trainer.model.backbone.get_input_embeddings(), loss))


@dataclass(frozen=True)
class PackedPairs:
    """The B pairs of a pack: indices into its items and its rewards, margins (0 without one), and weights."""

    items: list[int]
    chosen: list[int]
    rejected: list[int]
    margins: list[float]
    weights: list[float]

    @classmethod
    def of(cls, items: Sequence[BatchItem]) -> PackedPairs:
        """Number the responses of a pack's items in the order of its rewards."""
        starts = itertools.accumulate((len(item.group.responses) for item in items), initial=0)
        pairs = [
            (index, start + winner, start + loser, margin, item.weight)
            for index, (start, item) in enumerate(zip(starts, items, strict=False))
            for winner, loser, margin in item.preferences
        ]
        return cls(*(list(column) for column in zip(*pairs, strict=True)))
