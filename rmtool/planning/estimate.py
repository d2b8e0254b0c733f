"""Compute, memory and time estimates of a run.

In: a recipe, the model's config.json, and the training set if it can be loaded. Out: a `ResourceEstimate`.
Cost: packs of some steps are planned, and a few layers run on fake tensors (`memory.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from rmtool.config import Recipe
from rmtool.dataset.batches import BatchItem, epoch_steps
from rmtool.model.reward_model import RewardModel
from rmtool.packing.prefix_sharing import describe_sharing
from rmtool.planning.memory import Memory, fake_model, padded_reason, plan_memory
from rmtool.recipe import world_size
from rmtool.tokenization.pack_plan import key_count, pack_tokens
from rmtool.tokenization.response_group import ResponseGroup
from rmtool.tokenization.tokenized_dataset import TokenizedDataset
from rmtool.training.schedule import UNKNOWN

PARTS = {name: name for name in ("weights", "gradients")} | {
    "optimizer": "optimizer states",
    "activations": "activations",
    "buffers": "communication buffers",
}
COUNTED_STEPS, PLANNED_STEPS = 50, 8  # first steps whose tokens are counted, and whose packs are planned


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


@dataclass(frozen=True)
class Work:
    """Work of one optimizer step over all ranks, as means over the first steps.

    counted, planned: number of steps whose tokens were counted, whose packs were planned
    tokens:    computed tokens: unique ones; in padded batches all, and the padding
    cost:      token times of a forward with attention: the FLOPs are 6 x matmul weights x cost
    packs:     most packs per rank
    largest:   tokens of the largest pack
    imbalance: cost of the slowest rank over the mean
    per_pair:  tokens of one pair
    padded:    whether batches are padded
    """

    counted: int
    planned: int
    tokens: float
    cost: float
    packs: int
    largest: int
    imbalance: float
    per_pair: float
    padded: bool


@dataclass(frozen=True)
class ResourceEstimate:
    """Memory, and where the data could be loaded, `work` and `step_seconds`; these are None otherwise."""

    recipe: Recipe
    steps: int | None
    memory: Memory
    work: Work | None
    step_seconds: float | None
    padded_reason: str | None = None  # why prefix sharing is off

    def rows(self) -> list[tuple[str, str]]:
        """(label, value) for a table."""
        memory, pack = self.memory, f" (for a pack of {self.memory.tokens:,} tokens)"
        sizes = [
            (f"memory: {label}", _size(getattr(memory, name)) + (pack if name == "activations" else ""))
            for name, label in PARTS.items()
        ]
        if memory.host:
            offloaded = "(offloaded optimizer states and gradients)"
            sizes += [("CPU memory per process", f"{_size(memory.host)} {offloaded}")]
        verified = "" if self.padded_reason else " (verified when the model is loaded)"
        return [
            ("parameters", f"{memory.parameters:,} ({memory.trainable:,} trainable)"),
            ("prefix sharing", describe_sharing(self.padded_reason) + verified),
            *self._work_rows(),
            *sizes,
            ("memory per device", f"{_size(memory.total)}, plus CUDA and library overhead"),
            ("estimated time", self._time()),
        ]

    def _work_rows(self) -> list[tuple[str, str]]:
        work = self.work
        if work is None:
            return [("unique tokens per step", UNKNOWN)]
        planned = f"(over {work.planned} steps)"
        return [
            (
                "tokens per step (with padding)" if work.padded else "unique tokens per step",
                f"{work.tokens:,.0f} (mean of the first {work.counted} steps)",
            ),
            ("packs per process and step", f"at most {work.packs:,} {planned}"),
            ("largest pack", f"{work.largest:,} tokens {planned}"),
            ("load imbalance", f"slowest rank {work.imbalance - 1:.1%} above the mean {planned}"),
        ]

    def _time(self) -> str:
        if self.step_seconds is None or self.steps is None:
            return UNKNOWN
        launch, seconds = self.recipe.launch, self.steps * self.step_seconds
        gpu_hours = seconds * world_size(launch) / 3600
        total = f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds:,.1f} s"
        speed = f"{launch.expected_mfu:.0%} MFU of {launch.peak_tflops:g} TFLOP/s"
        return f"{total} ({self.step_seconds:,.3g} s per step, {gpu_hours:,.3g} GPU-hours) at {speed}"

    def as_dict(self) -> dict[str, Any]:
        """The `--json` form; bytes and seconds."""
        memory = asdict(self.memory) | {"total": self.memory.total}
        return {
            "work": asdict(self.work) if self.work else None,
            "memory": memory,
            "step_seconds": self.step_seconds,
            "steps": self.steps,
            "prefix_sharing": self.padded_reason is None,
            "padded_reason": self.padded_reason,
        }


def estimate_resources(
    recipe: Recipe, folder: Path, data: TokenizedDataset | None, steps: int | None
) -> ResourceEstimate:
    """Estimate `steps` steps of training the model whose config.json is in `folder`.

    Without data, packs are assumed to be as large as the recipe allows.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(recipe, folder)
        reason = None if model.shares_prompts else padded_reason(model)
    work = measure_work(recipe, model, data) if data else None
    tokens, per_pair = (work.largest, round(work.per_pair)) if work else (recipe.train.tokens_per_pack, 512)
    memory = plan_memory(recipe, folder, tokens, per_pair)
    seconds = None
    if work:
        # Kaplan et al., arXiv 2001.08361, section 2.1; MFU does not count what checkpointing computes again.
        flops = _flops_per_weight(recipe) * model.active_matmul_params * work.cost * work.imbalance
        seconds = flops / (world_size(recipe.launch) * recipe.launch.peak_tflops * 1e12 * recipe.launch.expected_mfu)
    return ResourceEstimate(recipe, steps, memory, work, seconds, reason)


def _flops_per_weight(recipe: Recipe) -> int:
    """FLOPs per weight and token: 2 in the forward, 2 for gradients of activations, 2 for those of weights."""
    if recipe.train.freeze == "backbone":
        return 2
    return 4 if recipe.lora.rank else 6


def measure_work(recipe: Recipe, model: RewardModel, data: TokenizedDataset) -> Work:
    """Plan the heaviest of the first steps, and some others, as training does."""
    train, processes = recipe.train, world_size(recipe.launch)
    first = epoch_steps(data.metadata, data.groups, train.seed, 0, train.batch_size)
    steps = list(itertools.islice(first, COUNTED_STEPS))
    unique = [sum(item.group.unique_tokens for item in items) for items in steps]
    heaviest = max(range(len(steps)), key=unique.__getitem__)
    chosen = {heaviest, *range(min(PLANNED_STEPS, len(steps)))}
    plans = [_plan_step(recipe, model, steps[number], processes) for number in chosen]
    costs = [sum(plan.costs) for plan in plans]
    tokens = sum(plan.tokens for plan in plans) / sum(unique[number] for number in chosen) * sum(unique)
    return Work(
        counted=len(steps),
        planned=len(plans),
        tokens=tokens / len(steps),
        cost=tokens / len(steps) * sum(costs) / sum(plan.tokens for plan in plans),
        packs=max(plan.packs for plan in plans),
        largest=max(plan.largest for plan in plans),
        imbalance=sum(max(plan.costs) * processes for plan in plans) / sum(costs),
        per_pair=tokens / sum(len(items) for items in steps),
        padded=not model.shares_prompts,
    )


@dataclass(frozen=True)
class _StepPlan:
    """Packs of one step; `costs` is the cost of each rank."""

    costs: tuple[float, ...]
    tokens: int
    packs: int
    largest: int


def _plan_step(recipe: Recipe, model: RewardModel, items: Sequence[BatchItem], world_size: int) -> _StepPlan:
    groups = [item.group for item in items]
    padded = not model.shares_prompts
    packs = [
        [groups[index] for index in indices] for indices in model.plan(groups, recipe.train.tokens_per_pack, world_size)
    ]
    sizes = [_tokens_and_keys(pack, padded) for pack in packs]
    costs = [tokens + model.key_cost * keys for tokens, keys in sizes]
    return _StepPlan(
        costs=tuple(sum(costs[rank::world_size]) for rank in range(world_size)),
        tokens=sum(tokens for tokens, _ in sizes),
        packs=len(packs) // world_size,
        # Groups of one pack share prefixes, too.
        largest=max(tokens if padded else pack_tokens(pack) for pack, (tokens, _) in zip(packs, sizes, strict=True)),
    )


def _tokens_and_keys(groups: Sequence[ResponseGroup], padded: bool) -> tuple[int, int]:
    """Tokens and attention keys of one pack; a padded row counts as the longest."""
    if not padded:
        return sum(group.unique_tokens for group in groups), sum(map(key_count, groups))
    rows, longest = sum(len(group.responses) for group in groups), max((group.longest for group in groups), default=0)
    return rows * longest, rows * longest * (longest + 1) // 2
