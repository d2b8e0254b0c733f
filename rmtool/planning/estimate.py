"""What a run will ask of its devices: work per step, memory, time. Worked out before it starts.

In: a recipe, the model's config.json, and the training data where it is at hand. Out: a `Forecast`.
Cost: the packs of some steps are planned, and a few layers run on tensors without memory (`memory.py`).
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

PARTS = {name: name for name in ("weights", "gradients")} | {
    "optimizer": "optimizer states",
    "activations": "activations",
    "buffers": "all-gather and reduce buffers",
}
LOOKED_AT, PLANNED = 50, 8  # of the first epoch's first steps: whose tokens are counted, whose packs are planned


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


@dataclass(frozen=True)
class Work:
    """Of one optimizer step, over all ranks; means over the steps that were looked at.

    looked_at, planned: how many steps these are
    tokens:    that are computed: unique ones, or, where the model runs padded, all and the padding
    cost:      token times of a forward, attention included: the flops are 6 x multiplied weights x cost
    packs:     per rank, at most
    largest:   tokens of the largest pack
    slowest:   cost of the heaviest rank over the mean
    per_pair:  tokens of one pair
    padded:    whether the model runs padded
    """

    looked_at: int
    planned: int
    tokens: float
    cost: float
    packs: int
    largest: int
    slowest: float
    per_pair: float
    padded: bool


@dataclass(frozen=True)
class Forecast:
    """`work`, and with it `step_seconds`, is None where the data is not at hand; the rest needs none."""

    recipe: Recipe
    steps: int | None
    memory: Memory
    work: Work | None
    step_seconds: float | None
    padded_reason: str | None = None  # why prompts will not be shared

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for a table."""
        memory, launch = self.memory, self.recipe.launch
        sizes = [(f"memory: {PARTS[name]}", f"{_size(getattr(memory, name))}{self._remark(name)}") for name in PARTS]
        if memory.host:
            sizes += [("host memory", f"{_size(memory.host)} per process: optimizer states and gradients")]
        return [
            ("parameters", f"{memory.parameters:,}, of which {memory.trainable:,} are trained"),
            ("prefix sharing", self._sharing()),
            *self._work_rows(),
            *sizes,
            ("memory per device", f"{_size(memory.total)}, and what the libraries themselves take"),
            (f"time at {launch.expected_mfu:.0%} of {launch.peak_tflops:g} TFLOP/s", self._time()),
        ]

    def _work_rows(self) -> list[tuple[str, str]]:
        work = self.work
        if work is None:
            return [("unique tokens per step", "known when the dataset is loaded")]
        return [
            (
                "tokens per step, padding too" if work.padded else "unique tokens per step",
                f"{work.tokens:,.0f} expected (mean of the first {work.looked_at} steps)",
            ),
            (
                "packs per process and step",
                f"at most {work.packs:,}; the largest has {work.largest:,} tokens; the slowest process has "
                f"{work.slowest - 1:.1%} more work than the mean ({work.planned} steps planned)",
            ),
        ]

    def _sharing(self) -> str:
        known = describe_sharing(self.padded_reason)
        return known if self.padded_reason else f"{known} (verified when the model is loaded)"

    def _remark(self, part: str) -> str:
        return f" (a pack of {self.memory.tokens:,} tokens)" if part == "activations" else ""

    def _time(self) -> str:
        if self.step_seconds is None or self.steps is None:
            return "known when the dataset is loaded"
        seconds = self.steps * self.step_seconds
        hours = seconds * world_size(self.recipe.launch) / 3600
        whole = f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds:,.1f} s"
        return f"{whole}, {hours:,.3g} device-hours; {self.step_seconds:,.3g} s per step"

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


def forecast(recipe: Recipe, folder: Path, data: TokenizedDataset | None, steps: int | None) -> Forecast:
    """Of training the model in `folder`, whose config.json is enough, for so many steps.

    Without data, a pack is taken to be as large as the recipe allows.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(recipe, folder)
        reason = None if model.shares_prompts else padded_reason(model)
    work = measure_work(recipe, model, data) if data else None
    tokens, per_pair = (work.largest, round(work.per_pair)) if work else (recipe.train.tokens_per_pack, 512)
    memory = plan_memory(recipe, folder, tokens, per_pair)
    seconds = None
    if work:
        # Kaplan et al., arXiv 2001.08361, section 2.1; what checkpointing computes again is not counted as use.
        flops = _flops_per_weight(recipe) * model.active_matmul_params * work.cost * work.slowest
        seconds = flops / (world_size(recipe.launch) * recipe.launch.peak_tflops * 1e12 * recipe.launch.expected_mfu)
    return Forecast(recipe, steps, memory, work, seconds, reason)


def _flops_per_weight(recipe: Recipe) -> int:
    """2 of the forward; with gradients of what flows through 2 more, and with those of the weights another 2."""
    if recipe.train.freeze == "backbone":
        return 2
    return 4 if recipe.lora.rank else 6


def measure_work(recipe: Recipe, model: RewardModel, data: TokenizedDataset) -> Work:
    """Of the first steps: the heaviest of them, and others, are planned as training will."""
    train, processes = recipe.train, world_size(recipe.launch)
    first = epoch_steps(data.metadata, data.groups, train.seed, 0, train.batch_size)
    steps = list(itertools.islice(first, LOOKED_AT))
    unique = [sum(unit.group.unique_tokens for unit in units) for units in steps]
    heaviest = max(range(len(steps)), key=unique.__getitem__)
    chosen = {heaviest, *range(min(PLANNED, len(steps)))}
    plans = [_plan(recipe, model, steps[number], processes) for number in chosen]
    costs = [sum(plan.costs) for plan in plans]
    tokens = sum(plan.tokens for plan in plans) / sum(unique[number] for number in chosen) * sum(unique)
    return Work(
        looked_at=len(steps),
        planned=len(plans),
        tokens=tokens / len(steps),
        cost=tokens / len(steps) * sum(costs) / sum(plan.tokens for plan in plans),
        packs=max(plan.packs for plan in plans),
        largest=max(plan.largest for plan in plans),
        slowest=sum(max(plan.costs) * processes for plan in plans) / sum(costs),
        per_pair=tokens / sum(len(units) for units in steps),
        padded=not model.shares_prompts,
    )


@dataclass(frozen=True)
class _StepPlan:
    """`costs`: of each rank."""

    costs: tuple[float, ...]
    tokens: int
    packs: int
    largest: int


def _plan(recipe: Recipe, model: RewardModel, units: Sequence[BatchItem], world_size: int) -> _StepPlan:
    groups = [unit.group for unit in units]
    packs = model.plan(groups, recipe.train.tokens_per_pack, world_size)
    padded = not model.shares_prompts
    filled = [[groups[item] for item in items] for items in packs]
    sizes = [_tokens_and_keys(pack, padded) for pack in filled]
    costs = [tokens + model.key_cost * keys for tokens, keys in sizes]
    return _StepPlan(
        costs=tuple(sum(costs[rank::world_size]) for rank in range(world_size)),
        tokens=sum(tokens for tokens, _ in sizes),
        packs=len(packs) // world_size,
        # Trees of one pack share what they begin with, too.
        largest=max(tokens if padded else pack_tokens(pack) for pack, (tokens, _) in zip(filled, sizes, strict=True)),
    )


def _tokens_and_keys(groups: Sequence[ResponseGroup], padded: bool) -> tuple[int, int]:
    """Of one pack. A padded row asks as many keys as the longest."""
    if not padded:
        return sum(group.unique_tokens for group in groups), sum(map(key_count, groups))
    rows, longest = sum(len(group.responses) for group in groups), max((group.longest for group in groups), default=0)
    return rows * longest, rows * longest * (longest + 1) // 2
