"""The best evaluation of a run so far, for the checkpoint to keep and for early stopping.

In: the metrics of each evaluation. Out: whether they are the best so far, and whether to stop.
Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rmtool.config import TrainConfig
from rmtool.evaluation.metrics import EVAL_PREFIX


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
    def since_when(self) -> str:
        """Why early stopping ends the run."""
        return f"eval {self.train.metric_for_best} has not improved since step {self.step}"

    @property
    def should_stop(self) -> bool:
        """Whether early stopping ends the run."""
        limit = self.train.early_stopping_patience
        return limit is not None and self.since >= limit
