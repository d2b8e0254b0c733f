"""Metrics of a run: metrics.jsonl, training curves, and Weights & Biases where the recipe enables it.

In: one dictionary of metrics per step. Out: files in the run folder. wandb follows metrics.jsonl in a separate process
(`wandb_process.py`), so it cannot end, delay or change a run: a failure is printed once, and metrics.jsonl continues.
Cost: one small write per step; the curves are drawn once, at the end, where the run waits WANDB_FINISH_S seconds for
wandb, which may go on uploading.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from rmtool.config import TrackConfig
from rmtool.dataset.report import new_figure
from rmtool.training.wandb_process import FAILED
from rmtool.ui import Ui

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
WANDB_TIMEOUT_S = 20  # for the connection, as wandb counts it
WANDB_START_S = 60  # for the import, too
WANDB_FINISH_S = 5  # that the run waits for it
WANDB_UPLOAD_S = 60  # that it may go on uploading after the run


def wandb_project(track: TrackConfig) -> str:
    """Return the project on Weights & Biases; wandb itself reads WANDB_ENTITY and others."""
    return track.project or os.environ.get("WANDB_PROJECT") or "rmtool"


class Tracker:
    """Writer of metrics to metrics.jsonl, which wandb follows.

    In: one dictionary of metrics per step; whether the file has earlier ones; the id of the wandb run, which goes on.
    Out: one line of metrics.jsonl each, and one wandb step.
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
        self.ui, self.unwritten, self.failed = ui, b"", False
        self.past = read_metrics(folder) if resumed else []
        self.file = open(folder / METRICS_FILE, "ab" if resumed else "wb", buffering=0)  # noqa: SIM115 - closed by close()
        self.wandb = None
        if track.wandb:
            name = track.name or os.environ.get("WANDB_NAME") or config["name"]
            init = {"project": wandb_project(track), "name": name, "config": dict(config)}
            init |= {"id": run_id, "resume": "allow"} if run_id else {}
            try:
                self.wandb = _Wandb({**init, "dir": str(folder)}, folder / METRICS_FILE, len(self.past), ui)
            except OSError as error:
                ui.say(f"cannot start wandb, {FAILED}: {error}")

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
            if not self.failed:
                self.ui.say(f"cannot write {METRICS_FILE}, trying again after each step: {error.strerror}")
            self.failed = True
        if self.wandb:
            self.wandb.show_notices()

    def flush(self) -> None:
        """Write what is not yet in metrics.jsonl.

        Raises:
            OSError: the disk is full, or has failed; what it did not take is written by a later call.
        """
        while self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def close(self, outcome: str = "completed") -> None:
        """Close the file and finish the wandb run; waits at most WANDB_FINISH_S seconds, and not if the run failed."""
        with contextlib.suppress(OSError):  # it has been reported
            self.flush()
            self.file.close()
        if self.wandb:
            self.wandb.finish(outcome)


class _Wandb:
    """The process of the wandb run."""

    def __init__(self, init: dict[str, Any], metrics: Path, logged: int, ui: Ui):
        self.ui, self.start_by = ui, time.monotonic() + WANDB_START_S
        self.started = self.finishing = self.failed = False
        # In its own session: Ctrl-C is for the run, whose end is the end of this process, too.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rmtool.training.wandb_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.orders: IO[bytes] = self.process.stdin  # type: ignore[assignment]
        self.notices: IO[bytes] = self.process.stdout  # type: ignore[assignment]
        os.set_blocking(self.notices.fileno(), False)
        given = {
            "init": init,
            "metrics": str(metrics),
            "logged": logged,
            "start_s": WANDB_TIMEOUT_S,
            "finish_s": WANDB_UPLOAD_S,
        }
        self._order(json.dumps(given))

    def _order(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, which `show_notices` finds
            self.orders.write(line.encode() + b"\n")
            self.orders.flush()

    def show_notices(self) -> None:
        """Show what the process has to say, without waiting; stop one that does not start."""
        try:
            text = os.read(self.notices.fileno(), 2**16).decode(errors="replace")
        except BlockingIOError:
            if not self.started and time.monotonic() > self.start_by:
                self._stop(f"wandb did not start within {WANDB_START_S} s")
            return
        for line in text.splitlines():
            self.ui.say(line)
        self.failed |= FAILED in text
        if text:
            self.started = True
        elif not (self.started and self.finishing):
            self._stop("wandb ended")

    def finish(self, outcome: str) -> None:
        self.finishing = True
        self._order(outcome)
        if outcome == "failed":  # the error is shown now; wandb ends by itself
            return
        try:
            self.process.wait(WANDB_FINISH_S)
            self.show_notices()
        except subprocess.TimeoutExpired:
            self.show_notices()
            if self.started and not self.failed:
                self.ui.say(f"wandb still uploads in the background, for at most {WANDB_UPLOAD_S} s")
            else:
                self._stop(f"wandb did not start within {WANDB_FINISH_S} s of the end of the run")

    def _stop(self, what: str) -> None:
        """Say once that the process failed, and kill it if it still runs."""
        if not self.failed:
            self.failed = True
            self.ui.say(f"{what}, {FAILED}")
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(1)


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
