"""Schedule of a run: optimizer steps, their learning rates, and settings that these steps cannot reach or do not use.

In: a recipe and the number of its training pairs. Out: a `Schedule`, or an error. Nothing here imports torch: the
launcher plans with it where the data is local, and the training process checks it for the pairs that are left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmtool.config import LoraConfig, Recipe, TrackConfig, TrainConfig
from rmtool.dataset.batches import plan_steps
from rmtool.errors import RmtoolError
from rmtool.recipe import resolve

UNKNOWN = "unknown until the dataset is loaded"


def warmup_steps(train: TrainConfig, total: int) -> int:
    """Return the optimizer steps of warmup of `total`; a ratio is rounded up, as in transformers."""
    return train.warmup_steps or math.ceil(total * train.warmup_ratio)


def lr_multiplier(train: TrainConfig, step: int, total: int) -> float:
    """Return the multiplier on the learning rate for `step` (from 0) of `total`.

    It rises from 1/warmup to 1, and then falls linearly or as a cosine to 0 after the last step.
    """
    warmup = warmup_steps(train, total)
    if step < warmup:
        return (step + 1) / warmup
    if train.schedule == "constant":
        return 1.0
    progress = (step - warmup) / (total - warmup)
    return 1.0 - progress if train.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Schedule:
    """The optimizer steps of `pairs` training pairs, and their learning rates."""

    recipe: Recipe
    pairs: int

    @property
    def steps(self) -> int:
        train = self.recipe.train
        return plan_steps(train.epochs, train.max_steps, self.pairs, train.batch_size)

    @property
    def warmup(self) -> int:
        return warmup_steps(self.recipe.train, self.steps)

    @property
    def highest_lr(self) -> float:
        train, steps = self.recipe.train, self.steps
        return train.learning_rate * max(lr_multiplier(train, step, steps) for step in range(steps))

    @property
    def last_lr(self) -> float:
        return self.recipe.train.learning_rate * lr_multiplier(self.recipe.train, self.steps - 1, self.steps)

    def as_dict(self) -> dict[str, Any]:
        return {
            "warmup_steps": self.warmup,
            "highest_learning_rate": self.highest_lr,
            "last_learning_rate": self.last_lr,
            "settings_without_effect": list(unused_settings(self.recipe, self)),
        }


def schedule_rows(recipe: Recipe, schedule: Schedule | None) -> list[tuple[str, str]]:
    """Return (label, value) for a table; without a schedule, the number of pairs is not known yet."""
    train = recipe.train
    limit = f", max_steps: {train.max_steps:,}" if train.max_steps else ""
    steps, warmup, values = UNKNOWN, f"{train.warmup_steps} warmup steps", ""
    if train.warmup_ratio:
        warmup = f"warmup in {train.warmup_ratio:.3g} of the steps"
    if schedule:
        steps, warmup = f"{schedule.steps:,}", f"{schedule.warmup:,} warmup step{'s' * (schedule.warmup != 1)}"
        values = f" (highest {schedule.highest_lr:.3g}, last {schedule.last_lr:.3g})"
    unused = list(unused_settings(recipe, schedule))
    return [
        ("optimizer steps", f"{steps} (epochs: {train.epochs}{limit})"),
        ("learning rate", f"{train.learning_rate:g}, {train.schedule} schedule, {warmup}{values}"),
        *([("settings without effect", "; ".join(unused))] if unused else []),
    ]


def require_reachable(train: TrainConfig, steps: int) -> None:
    """Check the settings that count steps against the `steps` of the run, or against what is known to limit them.

    Raises:
        RmtoolError: E0209 when the learning rate never reaches its peak, or early stopping can never happen.
    """
    run = f"the run has {steps:,} optimizer step{'s' * (steps != 1)}"
    if train.warmup_steps > steps:
        what = f"train.warmup_steps={train.warmup_steps} exceeds the run: the learning rate would not reach its peak"
        hint = f"set train.warmup_steps={steps} or less, or train.warmup_ratio=0.1 instead"
        raise RmtoolError("E0209", what, hint, found=run)
    patience, every = train.early_stopping_patience, train.eval_every
    if patience and every and (patience + 1) * every >= steps:
        what = f"train.early_stopping_patience={patience} with train.eval_every={every} can never stop the run"
        most = (steps - 1) // (patience + 1)
        hint = f"set train.eval_every={most} or less, or " if most else "set "
        raise RmtoolError("E0209", what, f"{hint}train.early_stopping_patience=null", found=run)


def unused_settings(recipe: Recipe, schedule: Schedule | None = None) -> Iterator[str]:
    """Yield the settings that change nothing in this run, each with its reason."""
    for unused, setting, reason in (*_unused_by_steps(recipe, schedule), *_unused_by_others(recipe)):
        if unused:
            yield f"{setting} ({reason})"


def _unused_by_steps(recipe: Recipe, schedule: Schedule | None) -> Iterator[tuple[object, str, str]]:
    """Yield (whether it is unused, setting, reason) for settings that depend on the length of the run."""
    train, limit = recipe.train, recipe.train.max_steps
    steps, pairs = (schedule.steps, schedule.pairs) if schedule else (limit or math.inf, math.inf)
    evaluated, every = recipe.data.eval or recipe.data.holdout, train.eval_every
    has = f"the run has {steps:,} step{'s' * (steps != 1)}"
    yield train.batch_size > pairs, f"train.batch_size={train.batch_size}", f"there are {pairs:,} training pairs"
    yield schedule and limit and limit > steps, f"train.max_steps={limit}", has
    yield every and not evaluated, f"train.eval_every={every}", "there is no eval data"
    yield every and evaluated and every > steps, f"train.eval_every={every}", has
    yield train.keep == "best" and (every or steps) >= steps, "train.keep=best", "the only evaluation is at the end"


def _unused_by_others(recipe: Recipe) -> Iterator[tuple[object, str, str]]:
    """Yield (whether it is unused, setting, reason) for settings that depend on other settings."""
    model, train, lora, track = recipe.model, recipe.train, recipe.lora, recipe.track
    local, metric = Path(resolve(model.path)).is_dir(), train.metric_for_best
    compared, frozen = train.keep == "best" or train.early_stopping_patience, train.freeze == "backbone"
    no_margins, recomputed = recipe.data.rating_margins and not train.use_margins, train.gradient_checkpointing
    yield model.revision and local, f"model.revision={model.revision}", "the model is a local folder"
    yield model.head == "new" and model.weights == "random", "model.head=new", "all weights are random"
    yield no_margins, "data.rating_margins=true", "train.use_margins is false"
    yield metric != "accuracy" and not compared, f"train.metric_for_best={metric}", "train.keep is last"
    yield frozen and recomputed, "train.gradient_checkpointing=true", "the backbone is frozen"
    yield not lora.rank and lora.alpha != LoraConfig.alpha, f"lora.alpha={lora.alpha}", "lora.rank is 0"
    yield not lora.rank and lora.targets != LoraConfig.targets, "lora.targets", "lora.rank is 0"
    for name in ("project", "name"):
        changed = getattr(track, name) != getattr(TrackConfig, name)
        yield changed and not track.wandb, f"track.{name}={getattr(track, name)}", "track.wandb is false"
    yield recipe.hub.public and not recipe.hub.repo_id, "hub.public=true", "hub.repo_id is not set"
