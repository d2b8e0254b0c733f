"""What a training process leaves for the launcher that started it: that it lives, and how it ended.

In: a run folder and a rank. Out: `rank-R.json` with the process's id and, at its end, its exit code and error, since
launchers lose both; and `rank-R.log` with what it prints.
Cost: two short writes per process.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

DATA_READ_FILE = ".data-read"  # a node's first process has read the data
LAUNCHER = "RMTOOL_LAUNCHER"  # the process that started all others, and which none outlives
STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Status:
    """`exit` is None while the process runs; `error` is `RmtoolError.as_dict`'s form."""

    rank: int
    pid: int
    exit: int | None = None
    error: dict[str, Any] | None = None

    def alive(self) -> bool:
        """Whether the process is there and no zombie."""
        return self._state() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)

    def stopped(self) -> bool:
        """Whether somebody has stopped the process (SIGSTOP): it neither works nor dies."""
        return self._state() in STOPPED

    def _state(self) -> str:
        try:
            return str(psutil.Process(self.pid).status())
        except psutil.NoSuchProcess:
            return psutil.STATUS_DEAD


def begin(folder: Path, rank: int) -> None:
    """Say that this process has begun. It dies with the process that started it, so that none is left behind; what it
    prints goes to a file of its own.
    """
    die_with_parent(signal.SIGKILL)
    launcher = os.environ.get(LAUNCHER)
    if launcher and not psutil.pid_exists(int(launcher)):
        raise SystemExit("the rmtool process that started this one is gone")  # before it could be told so
    log = os.open(log_file(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    _write(folder, Status(rank, os.getpid()))


def end(folder: Path, rank: int, exit_code: int, error: dict[str, Any] | None) -> None:
    """Say how this process ends."""
    _write(folder, Status(rank, os.getpid(), exit_code, error))


def log_file(folder: Path, rank: int) -> Path:
    """What `rank` prints."""
    return folder / f"rank-{rank}.log"


def die_with_parent(number: int) -> None:
    """Have the kernel send this signal when the parent process ends (Linux; elsewhere nothing is done)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _write(folder: Path, status: Status) -> None:
    temporary = folder / f".rank-{status.rank}.json"
    temporary.write_text(json.dumps(vars(status)), encoding="utf-8")
    os.replace(temporary, folder / f"rank-{status.rank}.json")
