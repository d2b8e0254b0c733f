"""Which training process failed first: exited, died or stopped.

In: a run folder with the statuses that its processes write. Out: a `Failure`, or None while all run.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from rmtool.training.worker_status import DATA_READ_FILE, LAUNCHER, STOPPED, Status

HANG_S = 10.0  # a process that somebody stopped, before all are ended


class FailureMonitor:
    """Which of so many processes failed first: died, ended with an error, or stands still."""

    def __init__(self, folder: Path, processes: int):
        self.folder = folder
        self.processes = processes
        self.first: Failure | None = None
        self.standing: dict[int, float] = {}  # by process id: since when it is stopped
        self.listed = time.monotonic()  # all of the machine's processes, last

    def look(self) -> Failure | None:
        """The first failure up to now."""
        if self.first is None:
            statuses = read_statuses(self.folder)
            begun = {status.pid for status in statuses}
            self.first = next(filter(None, map(self._failure, statuses)), None) or self._early(begun)
        return self.first

    def _early(self, begun: set[int]) -> Failure | None:
        """A process that stands still and has not begun; it is known by what was started alone."""
        now = time.monotonic()
        if len(begun) == self.processes or now - self.listed < 1:
            return None
        self.listed = now
        early = [process for process in started() if process.pid not in begun and process.info["status"] in STOPPED]
        since = min([self._since(process.pid) for process in early], default=now)
        return Failure(None, "stands still", now) if since < now - HANG_S else None

    def _since(self, pid: int) -> float:
        return self.standing.setdefault(pid, time.monotonic())

    def _failure(self, status: Status) -> Failure | None:
        now = time.monotonic()
        if status.exit is not None:
            return Failure(status, "failed", now) if status.exit else None
        if not status.alive():
            # Between the last look and this one it may have written how it ended.
            again = next(found for found in read_statuses(self.folder) if found.rank == status.rank)
            return Failure(status, "died", now) if again.exit is None else self._failure(again)
        if not status.stopped():
            self.standing.pop(status.pid, None)
            return None
        return Failure(status, "stands still", now) if self._since(status.pid) < now - HANG_S else None


@dataclass(frozen=True)
class Failure:
    """The process (None: one that has not begun), what happened to it, and when that was seen (time.monotonic)."""

    status: Status | None
    what: str
    seen: float


def read_statuses(folder: Path) -> list[Status]:
    """Of every process that has begun; what was written first comes first."""
    written = sorted((path.stat().st_mtime_ns, path) for path in folder.glob("rank-*.json"))
    return [Status(**json.loads(path.read_text(encoding="utf-8"))) for _, path in written]


def clear(folder: Path) -> None:
    """Remove what an earlier run left."""
    for path in (*folder.glob("rank-*.json"), *folder.glob("rank-*.log"), folder / DATA_READ_FILE):
        path.unlink(missing_ok=True)


def started() -> list[psutil.Process]:
    """The living processes that this launcher started, directly or not, whether or not they have begun: its mark is in
    their environment.
    """
    mark, found = str(os.getpid()), psutil.process_iter(["environ", "status"])
    return [process for process in found if (process.info["environ"] or {}).get(LAUNCHER) == mark]
