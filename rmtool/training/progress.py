"""How far a run is: what a snapshot keeps beside weights and optimizer states.

In: steps and evaluations. Out: plain data, which JSON keeps exactly. The order of the data is a function of seed, epoch
and index, so the step's number is the position in it.
"""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass, field
from typing import Any

from rmtool.config import TrainConfig
from rmtool.evaluation.metrics import EVAL_PREFIX
from rmtool.training.nonfinite import SkippedStep


@dataclass
class Best:
    """The best evaluation so far, and the number of evaluations since."""

    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    since: int = 0

    def update(self, train: TrainConfig, step: int, metrics: dict[str, float]) -> bool:
        """Return whether these metrics are better than all before; equal ones are not."""
        name = f"{EVAL_PREFIX}/{train.metric_for_best}"
        sign = 1 if train.metric_for_best == "accuracy" else -1
        better = not self.metrics or sign * metrics[name] > sign * self.metrics[name]
        self.since = 0 if better else self.since + 1
        if better:
            self.step, self.metrics = step, metrics
        return better

    def since_when(self, train: TrainConfig) -> str:
        return f"eval {train.metric_for_best} has not improved since step {self.step}"

    def should_stop(self, train: TrainConfig) -> bool:
        """Whether early stopping ends the run."""
        limit = train.early_stopping_patience
        return limit is not None and self.since >= limit


@dataclass
class Progress:
    """Progress of a run.

    step:    optimizer steps that were taken
    episode: pairs in them
    metrics: of the last evaluation
    pending: metrics of the last step whose evaluation was interrupted: it is evaluated and logged first
    skipped: steps that were not taken because of NaN or inf
    tracker_id: id of the wandb run, which goes on after a resume
    seconds: time of the run in the steps, evaluations and snapshots so far, over all its interruptions
    snapshots, snapshot_seconds: how many were written so far, and the time that took
    """

    step: int = 0
    episode: int = 0
    best: Best = field(default_factory=Best)
    metrics: dict[str, float] = field(default_factory=dict)
    pending: dict[str, float] | None = None
    skipped: list[SkippedStep] = field(default_factory=list)
    tracker_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    seconds: float = 0.0
    snapshots: int = 0
    snapshot_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        skipped = [SkippedStep(**{**each, "rows": tuple(each["rows"])}) for each in values["skipped"]]
        return cls(**{**values, "best": Best(**values["best"]), "skipped": skipped})
