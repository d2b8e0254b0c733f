"""One optimizer step: pack, forward, loss, backward, update.

In: a batch, the same on every rank. Out: weights that have moved, the sums over the batch's pairs, the gradient norm.
Cost: a forward and a backward pass over the unique tokens of the pairs, in packs of at most `Trainer.tokens_per_pack`.
Shapes: N responses of a pack, B pairs of a pack.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from accelerate.utils import gather_object

from rmtool.config import Recipe
from rmtool.dataset.batches import BatchItem, count_pairs
from rmtool.evaluation.metrics import TRAIN_PREFIX, PairSums, sum_pairs
from rmtool.model.loss import pair_losses
from rmtool.model.out_of_memory import row_out_of_memory, unless_out_of_memory
from rmtool.model.reward_model import RewardModel
from rmtool.packing.transfer import to_device
from rmtool.training.engine import Engine, eval_precision
from rmtool.training.nonfinite import SkippedStep, input_gradient_norm, nan_unless_finite, stop_or_skip, trace_step
from rmtool.training.pack_budget import ended_out_of_memory, read_pack_budget, smaller_budget
from rmtool.training.training_pack import PackedPairs, StepPlan, TrainingPack
from rmtool.ui import Ui


@dataclass
class Trainer:
    """A recipe, the engine that runs it, and what a run remembers of its steps.

    tokens_per_pack: the recipe's, or less after the device was out of memory
    skipped:         the steps that were not taken, with their rows
    prepared:        the plan of the next step, where there is one
    """

    recipe: Recipe
    engine: Engine
    ui: Ui
    folder: Path
    tokens_per_pack: int
    skipped: list[SkippedStep] = field(default_factory=list)
    prepared: StepPlan | None = None

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

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Compute in the precision of evaluations inside the context; steps after it are as without it."""
        guard = self.model.overflow_guard
        training, self.model.precision = self.model.precision, eval_precision(self.recipe)
        guard.forwards = guard.repeated = 0
        try:
            yield
            if guard.repeated:
                self.ui.say(guard.describe())
        finally:
            self.model.precision = training
            guard.release()

    def plan(self, batch: Sequence[BatchItem], tokens_per_pack: int) -> list[list[int]]:
        """Plan the packs of a step."""
        return self.model.plan([item.group for item in batch], tokens_per_pack, self.engine.dist.world_size)

    def prepare(self, batch: Sequence[BatchItem]) -> None:
        """Plan the step of this batch, and build the first of this rank's packs; the device may be at work."""
        dist = self.engine.dist
        own = self.plan(batch, self.tokens_per_pack)[dist.rank :: dist.world_size]
        packs = [[batch[index] for index in indices] for indices in own]
        first = TrainingPack.build(self.model, packs[0] or batch[:1])
        self.prepared = StepPlan(batch, self.tokens_per_pack, packs, first)

    def take_plan(self, batch: Sequence[BatchItem]) -> StepPlan:
        """Return the plan of this batch's step: the prepared one, unless the pack budget has changed since."""
        plan, self.prepared = self.prepared, None
        if plan is None or plan.batch is not batch or plan.tokens_per_pack != self.tokens_per_pack:
            self.prepare(batch)
            plan, self.prepared = self.prepared, None
        assert plan is not None
        return plan

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


def training_step(
    trainer: Trainer, batch: Sequence[BatchItem], lr: float, step: int, meanwhile: Callable[[], None] = lambda: None
) -> StepResult:
    """Take one optimizer step, or none if a loss or the gradient norm is NaN or inf; all ranks do the same.

    Args:
        meanwhile: called while the device computes the gradients.

    Raises:
        RmtoolError: E0802 NaN or inf, unless the recipe lets this step be skipped; E0503 out of memory. The weights and
            the optimizer's state are as they were.
    """
    gradients = accumulate_gradients(trainer, batch)
    while gradients.out_of_memory:
        trainer.use_smaller_packs(batch, gradients.out_of_memory)
        gradients = accumulate_gradients(trainer, batch)
    meanwhile()
    sums = PairSums.reduce(gradients.sums, trainer.engine.dist)  # waits for the device
    grad_norm = trainer.engine.update(lr)
    if math.isfinite(grad_norm):
        return StepResult(sums, grad_norm)
    alone = functools.partial(has_finite_gradient, trainer)
    trainer.skipped.append(trace_step(step, gradients.nonfinite(), gradients.own, batch[0], alone))
    stop_or_skip(trainer.recipe.train, trainer.skipped)
    trainer.ui.say(f"skipped {trainer.skipped[-1]}")
    return StepResult(sums, grad_norm, trainer.skipped[-1])


@dataclass
class Gradients:
    """What the packs of this rank gave, besides the gradients on the engine; its tensors are on the device.

    sums:          what `sum_pairs` returns, of all packs
    own:           the items of its packs
    finite:        per pack, its items, the item of each pair, and whether the pair's rewards and loss are finite
    out_of_memory: the items of the pack that ended the step; empty if none did
    """

    sums: torch.Tensor
    own: list[BatchItem] = field(default_factory=list)
    finite: list[tuple[Sequence[BatchItem], Sequence[int], torch.Tensor]] = field(default_factory=list)
    out_of_memory: list[BatchItem] = field(default_factory=list)

    def nonfinite(self) -> list[BatchItem]:
        """The items whose reward or loss is NaN or inf."""
        found = list[BatchItem]()
        for items, item_of_pair, finite_B in self.finite:
            bad = {index for index, finite in zip(item_of_pair, finite_B.tolist(), strict=True) if not finite}
            found += [items[index] for index in sorted(bad)]
        return found


def accumulate_gradients(trainer: Trainer, batch: Sequence[BatchItem]) -> Gradients:
    """Pack, forward, loss, backward, without waiting for the device.

    The loss is the sum over the batch's pairs divided by their number, however they are split into packs and ranks.
    """
    world_size, plan = trainer.engine.dist.world_size, trainer.take_plan(batch)
    found = Gradients(torch.zeros(len(fields(PairSums)), dtype=torch.float64, device=trainer.model.device))
    for number, own in enumerate(plan.packs, 1):
        # All ranks must take part: one with an empty pack runs an item with weight zero.
        items = own or list(batch[:1])
        weight = world_size / count_pairs(batch) if own else 0.0  # engines average gradients over ranks
        first = plan.first if number == 1 else None
        pack = unless_out_of_memory(
            functools.partial(run_pack, trainer, items, weight, number == len(plan.packs), first)
        )
        if pack is None:
            return Gradients(found.sums, out_of_memory=items)
        if own:
            found.sums += pack[0]
            found.finite.append((items, *pack[1:]))
            found.own += items
    return found


def run_pack(
    trainer: Trainer, items: Sequence[BatchItem], weight: float, last: bool, built: TrainingPack | None = None
) -> tuple[torch.Tensor, Sequence[int], torch.Tensor]:
    """Forward, loss and backward of one pack; return its sums, the item of each pair, and which pairs are finite."""
    engine = trainer.engine
    with engine.accumulating(last):
        pack = to_device(built or TrainingPack.build(trainer.model, items), trainer.model.device)
        rewards_N, pairs = engine.wrapped(pack.batch), pack.pairs
        chosen_B, rejected_B = rewards_N[pairs.chosen], rewards_N[pairs.rejected]
        losses_B = weighted_losses(trainer, pairs, chosen_B, rejected_B)
        engine.backward(losses_B.sum() * weight + nan_unless_finite(rewards_N, losses_B), last)
    finite_B = chosen_B.isfinite() & rejected_B.isfinite() & losses_B.isfinite()
    return sum_pairs(chosen_B, rejected_B, losses_B), pairs.items, finite_B


def weighted_losses(
    trainer: Trainer, pairs: PackedPairs, chosen_B: torch.Tensor, rejected_B: torch.Tensor
) -> torch.Tensor:
    """Return the recipe's loss of each pair, times its weight."""
    train = trainer.recipe.train
    return pair_losses(chosen_B, rejected_B, pairs.margins if train.use_margins else None, train) * pairs.weights


def has_finite_gradient(trainer: Trainer, item: BatchItem) -> bool:
    """Whether the gradient of this item alone is finite."""

    def loss() -> torch.Tensor:
        pack = to_device(TrainingPack.build(trainer.model, [item]), trainer.model.device)
        rewards_N, pairs = trainer.model(pack.batch), pack.pairs
        return weighted_losses(trainer, pairs, rewards_N[pairs.chosen], rewards_N[pairs.rejected]).sum()

    return math.isfinite(input_gradient_norm(trainer.model.backbone.get_input_embeddings(), loss))
