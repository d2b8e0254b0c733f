"""Metrics of a run: metrics.jsonl, training curves, and the trackers that the recipe enables: wandb, TensorBoard.

In: one dictionary of metrics per step. Out: files in the run folder. Trackers follow metrics.jsonl in processes of
their own (`tracker_process.py`), so they cannot end, delay or change a run: a failure is printed once, and
metrics.jsonl continues. With track.strict the run waits for their start and end, and a failure is its error, at the
start or when the model is saved.
Cost: one small write per step; the curves are drawn once, at the end, where the run waits FINISH_S seconds for the
trackers, which may go on uploading.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rmtool.config import TrackConfig
from rmtool.dataset.report import new_figure
from rmtool.errors import RmtoolError
from rmtool.training.eval_samples import SAMPLES_FILE, write_samples
from rmtool.training.follower import FAILED
from rmtool.training.tracker_process import TrackerProcess
from rmtool.ui import Ui

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
PLAN_FILE = "plan.json"  # written by the launcher
TENSORBOARD = "tensorboard"  # folder of event files
WANDB_TIMEOUT_S = 20  # for the connection, as wandb counts it
FINISH_S = 5  # that the run waits for trackers
UPLOAD_S = 60  # that they may go on after the run; with track.strict, that it waits


def wandb_project(track: TrackConfig) -> str:
    """Return the project on Weights & Biases; wandb itself reads WANDB_ENTITY and others."""
    return track.project or os.environ.get("WANDB_PROJECT") or "rmtool"


def describe_tracking(track: TrackConfig, folder: Path) -> str:
    """Return where metrics go, for the plan."""
    places = [f"wandb project {wandb_project(track)}"] if track.wandb else []
    places += [f"TensorBoard in {folder / TENSORBOARD}"] if track.tensorboard else []
    strict = " (a failure is an error)" if track.strict else ""
    return f"{', '.join(places)}{strict}" if places else FAILED


class Tracker:
    """Writer of metrics to metrics.jsonl, which trackers follow.

    In: one dictionary of metrics per step; whether the file has earlier ones; the id of the wandb run, which goes on.
    Out: one line of metrics.jsonl each, and one step of each tracker; `processes` are those that could be started.
    """

    def __init__(
        self,
        folder: Path,
        track: TrackConfig,
        config: Mapping[str, Any],
        ui: Ui,
        resumed: bool = False,
        run_id: str | None = None,
    ):
        self.folder, self.track, self.ui, self.unwritten, self.said = folder, track, ui, b"", set[str]()
        self.past = read_metrics(folder) if resumed else []
        self.file = open(folder / METRICS_FILE, "ab" if resumed else "wb", buffering=0)  # noqa: SIM115 - closed by close()
        self.processes: list[TrackerProcess] = []
        self.failures: list[str] = []
        texts = dict(config) | _plan(folder)
        if track.wandb:
            name = track.name or os.environ.get("WANDB_NAME") or config["name"]
            init = {"project": wandb_project(track), "name": name, "config": texts, "dir": str(folder)}
            init |= {"id": run_id, "resume": "allow"} if run_id else {}
            self._start("wandb", {"init": init, "start_s": WANDB_TIMEOUT_S})
        if track.tensorboard:
            self._start("TensorBoard", {"folder": str(folder / TENSORBOARD), "texts": _by_section(texts)})

    def _start(self, name: str, given: dict[str, Any]) -> None:
        module = f"rmtool.training.{name.lower()}_process"
        given |= {"metrics": str(self.folder / METRICS_FILE), "logged": len(self.past), "finish_s": UPLOAD_S}
        try:
            self.processes.append(TrackerProcess(name, module, given, self.ui))
        except OSError as error:
            self.failures.append(f"cannot start {name}, {FAILED}: {error}")
            self.ui.say(self.failures[-1])

    def require_started(self) -> None:
        """With track.strict, wait until all trackers have started.

        Raises:
            RmtoolError: E0702.
        """
        if self.track.strict:
            for process in self.processes:
                process.wait_until_started()
            self._raise_failure("fix it, or set track.strict=false")

    def require_logged(self) -> None:
        """With track.strict, check after the end that the trackers have everything.

        Raises:
            RmtoolError: E0702.
        """
        if self.track.strict:
            self._raise_failure(
                f"use the checkpoint, which is complete: {self.folder / 'model'}; upload what is in wandb/"
            )

    def _raise_failure(self, hint: str) -> None:
        failures = [*self.failures, *(process.failure for process in self.processes if process.failure)]
        if failures:
            raise RmtoolError("E0702", f"a tracker failed: {failures[0]}", hint)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("failed" if kind else "completed")

    def log(self, numbers: Mapping[str, float | int]) -> None:
        """Log the metrics of one optimizer step; `numbers["step"]` is its number."""
        self.unwritten += json.dumps(dict(numbers), allow_nan=False).encode() + b"\n"
        try:
            self.flush()
        except OSError as error:
            self._say_once(METRICS_FILE, error)
        for process in self.processes:
            process.show_notices()

    def log_samples(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write the sampled pairs of an evaluation; call it before the metrics of their step are logged."""
        try:
            write_samples(self.folder, rows)
        except OSError as error:
            self._say_once(SAMPLES_FILE, error)

    def _say_once(self, name: str, error: OSError) -> None:
        if name not in self.said:
            again = "each step" if name == METRICS_FILE else "each evaluation"
            self.ui.say(f"cannot write {name}, trying again after {again}: {error.strerror}")
        self.said.add(name)

    def flush(self) -> None:
        """Write what is not yet in metrics.jsonl.

        Raises:
            OSError: the disk is full, or has failed; what it did not take is written by a later call.
        """
        while self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def close(self, outcome: str = "completed") -> None:
        """Close the file and end the trackers; waits at most FINISH_S seconds (with track.strict UPLOAD_S), and not if
        the run failed.
        """
        with contextlib.suppress(OSError):  # it has been reported
            self.flush()
            self.file.close()
        for process in self.processes:
            process.finish(outcome)
        if outcome != "failed":  # else the error is shown now; trackers end by themselves
            strict = self.track.strict
            end = time.monotonic() + (UPLOAD_S if strict else FINISH_S)
            for process in self.processes:
                process.wait(end - time.monotonic(), strict, UPLOAD_S)


def _plan(folder: Path) -> dict[str, Any]:
    """Return the table of the plan, if the launcher has written it."""
    path = folder / PLAN_FILE
    return {"plan": json.loads(path.read_text(encoding="utf-8"))["rows"]} if path.exists() else {}


def _by_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe as one text, and what else there is."""
    others = ("plan", "system")
    recipe = {name: value for name, value in config.items() if name not in others}
    return {"recipe": recipe, **{name: config[name] for name in others if name in config}}


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read the metrics of every step in a run folder; a last line without its end was not written completely."""
    lines = (folder / METRICS_FILE).read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def draw_curves(folder: Path) -> Path:
    """Draw loss, accuracy and reward margin over optimizer steps, on the training and eval sets; return the PNG."""
    rows = read_metrics(folder)
    figure = new_figure(12, 3.8)
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
