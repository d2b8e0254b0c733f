"""Metrics of a run: metrics.jsonl, training curves, and Weights & Biases where the recipe enables it.

In: one dictionary of metrics per step. Out: files in the run folder. A wandb failure never stops a run: it is reported
once, and metrics.jsonl continues.
Cost: one small write per step; the curves are drawn once, at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmtool.config import TrackConfig
from rmtool.ui import Ui

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
WANDB_TIMEOUT_S = 20


class Tracker:
    """Writer of metrics to metrics.jsonl and wandb.

    In: one dictionary of metrics per step. Out: one line of metrics.jsonl each, and one wandb step.
    """

    def __init__(self, folder: Path, track: TrackConfig, config: Mapping[str, Any], ui: Ui):
        self.ui = ui
        self.file = open(folder / METRICS_FILE, "w", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self.run = _start_wandb(folder, track, config, ui) if track.wandb else None

    def log(self, numbers: Mapping[str, float | int]) -> None:
        """Log the metrics of one optimizer step; `numbers["step"]` is its number."""
        self.file.write(json.dumps(dict(numbers), allow_nan=False) + "\n")
        self.file.flush()
        if self.run is not None:
            import wandb

            try:
                self.run.log(dict(numbers), step=int(numbers["step"]))
            except (wandb.Error, OSError) as error:
                self.ui.say(f"wandb logging failed, metrics.jsonl only from here on: {error}")
                self.run = None

    def close(self) -> None:
        """Close the file and finish the wandb run."""
        self.file.close()
        if self.run is not None:
            import wandb

            try:
                self.run.finish()
            except (wandb.Error, OSError) as error:
                self.ui.say(f"cannot finish the wandb run: {error}")


def _start_wandb(folder: Path, track: TrackConfig, config: Mapping[str, Any], ui: Ui) -> Any:
    import wandb

    online = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if online else "offline")
    if mode == "offline":
        ui.say("wandb: offline (no API key, or WANDB_MODE=offline); upload later with `wandb sync`")
    settings = wandb.Settings(init_timeout=WANDB_TIMEOUT_S, silent=True, console="off")
    try:
        return wandb.init(
            project=track.project,
            name=track.name or config["name"],
            config=dict(config),
            dir=folder,
            mode=mode,
            settings=settings,
        )
    except (wandb.Error, OSError, TimeoutError) as error:
        ui.say(f"cannot start wandb, metrics.jsonl only: {error}")
        return None


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read the metrics of every step in a run folder."""
    lines = (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def draw_curves(folder: Path) -> Path:
    """Draw loss, accuracy and reward margin over optimizer steps, on the training and eval sets; return the PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(folder)
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("loss", "loss"), ("accuracy", "accuracy"), ("reward_margin", "reward margin"))
    for axis, (key, title) in zip(figure.subplots(1, 3), panels, strict=True):
        train = [(row["step"], row[f"train/rm/{key}"]) for row in rows if f"train/rm/{key}" in row]
        evals = [(row["step"], row[f"eval/rm/{key}"]) for row in rows if f"eval/rm/{key}" in row]
        if train:
            axis.plot(*zip(*train, strict=True), color="#9ab8d8", linewidth=0.8, label="train (per step)")
            axis.plot(*zip(*_smooth(train), strict=True), color="#1f5fa8", linewidth=1.8, label="train (smoothed)")
        if evals:
            axis.plot(*zip(*evals, strict=True), color="#d1602b", marker="o", markersize=4, label="eval")
        axis.set_title(title)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.25)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(folder.resolve().name)
    path = folder / CURVES_FILE
    figure.savefig(path, dpi=120)
    return path


def _smooth(points: list[tuple[float, float]], weight: float = 0.9) -> list[tuple[float, float]]:
    """Exponential moving average with bias correction."""
    smoothed, mean, total = [], 0.0, 0.0
    for step, value in points:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        smoothed.append((step, mean / total))
    return smoothed
