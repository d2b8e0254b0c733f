"""Detection of the first failed process: ended with an error, died, or stopped.

In: a run folder with the status files of its ranks. Out: a `Failure`, or None while all processes run.
Cost: one small file per rank and poll; once a second a list of child processes (0.7 ms with 79 processes on the host).
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from rmtool.training.worker_status import (
    EVALUATION_BAR,
    LAUNCHER,
    Status,
    process_state,
    read_status,
    status_file,
)

# Without this check, 2 ranks of which one was stopped ended after 1,814 seconds (torch's collective timeout), with an
# error that named the other rank; with it, after 21 seconds.
HANG_S = 10.0  # how long a process may be stopped
STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
_TRAINING = "training"


@dataclass(frozen=True)
class Failure:
    """The process that failed (None: one without a status file yet) and when that was noticed (time.monotonic)."""

    status: Status | None
    seen: float
    stopped: bool = False  # by SIGSTOP, or by a debugger


class FailureMonitor:
    """Watches the processes of one node; `poll` returns the first failure.

    In: their run folder and number. Out: a `Failure`, the same one once there is one.
    """

    def __init__(self, folder: Path, processes: int):
        self.folder = folder
        self.processes = processes
        self.failure: Failure | None = None
        self.stopped_since: dict[int, float] = {}  # by process id
        self.scanned = time.monotonic()

    def poll(self) -> Failure | None:
        """Return the first failure so far."""
        if self.failure is None:
            statuses = read_statuses(self.folder)
            self.failure = next(filter(None, map(self._ended, statuses)), None) or self._stopped(statuses)
        return self.failure

    def _ended(self, status: Status) -> Failure | None:
        """A process that ended with an error or died."""
        if status.exit is None:
            if process_state(status.pid) not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return None
            status = read_status(status_file(self.folder, status.rank))  # written since, if it ended normally
        return Failure(status, time.monotonic()) if status.exit != 0 else None

    def _stopped(self, statuses: list[Status]) -> Failure | None:
        """A process that has been stopped for HANG_S."""
        now = time.monotonic()
        if now - self.scanned < 1:
            return None
        self.scanned = now
        ranks = {status.pid: status for status in statuses}
        starting = len(ranks) < self.processes
        pids = [child.pid for child in psutil.Process().children(recursive=True) if starting or child.pid in ranks]
        stopped = [pid for pid in pids if process_state(pid) in STOPPED]
        self.stopped_since = {pid: self.stopped_since.get(pid, now) for pid in stopped}
        hanging = [pid for pid, since in self.stopped_since.items() if now - since > HANG_S]
        return Failure(ranks.get(hanging[0]), now, stopped=True) if hanging else None


class Position:
    """Where the run is: from the progress that the main process shows.

    In: its events, one line of JSON each. Out: what is left to do when it is asked to stop.
    """

    def __init__(self) -> None:
        self.open: dict[int, str] = {}  # key and label of each bar and view
        self.step: int | None = None  # the last complete one
        self.finished = False

    def line(self, line: bytes) -> None:
        """Follow one event."""
        event = json.loads(line)
        if "start" in event:
            self.open[event["start"]] = event["label"]
        elif "training" in event:
            self.open[event["training"]] = _TRAINING
        elif "step" in event:
            self.step = event["numbers"]["step"]
        elif "end" in event:
            self.finished |= self.open.pop(event["end"]) == _TRAINING

    def last_actions(self) -> str:
        """What the ranks do before they leave."""
        if self.finished:
            return "saving the checkpoint, which completes the run"
        if EVALUATION_BAR in self.open.values():
            return "abandoning the evaluation, then saving a snapshot"
        step = "the step" if self.step is None else f"step {self.step + 1}"
        return f"finishing {step}, then saving a snapshot"


def read_statuses(folder: Path) -> list[Status]:
    """The status of every rank that has started; the file written first comes first."""
    return [read_status(path) for path in sorted(folder.glob("rank-*.json"), key=lambda path: path.stat().st_mtime_ns)]


def find_workers() -> list[psutil.Process]:
    """Every living process that this launcher started, directly or not: their environment has its process id."""
    pid, found = str(os.getpid()), psutil.process_iter(["environ"])
    return [process for process in found if (process.info["environ"] or {}).get(LAUNCHER) == pid]
