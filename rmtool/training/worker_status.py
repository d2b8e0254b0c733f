"""Status and log files of a training process, for the launcher.

In: a run folder and a rank. Out: `rank-R.json` with the process id and, at the end, exit code and error, because
`accelerate launch` reports neither; `rank-R.log` with everything the process prints.
Cost: two small writes per process.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rmtool.redaction import redact

PACK_BUDGET_FILE = "pack-budget.json"  # a smaller one, after the device was out of memory
DATA_READ_FILE = ".data-read"  # the first process of a node has tokenized the data
BEST_PREFIX = "best-step-"  # the best checkpoint so far, until the run ends
EVALUATION_BAR = "Evaluating"  # label of its progress
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SIGUSR1: Slurm's early warning
DEADLINE = "RMTOOL_DEADLINE"  # environment variable: end of the time limit, in time.monotonic of this host
LAUNCHER = "RMTOOL_LAUNCHER"  # environment variable: process id of the rmtool command, which no process outlives
RESERVED_BYTES = 1 << 16  # more than an error has
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Status:
    """State of a rank: `exit` is None while it runs, `error` is an `RmtoolError.as_dict`.

    saves: whether a signal makes it save before it leaves; before, nothing is lost if it is killed
    """

    rank: int
    pid: int
    exit: int | None = None
    error: dict[str, Any] | None = None
    saves: bool = False


def mark_started(folder: Path, rank: int) -> None:
    """Write the first status, send all output to the rank's log, and let the process end with its launcher."""
    die_with_parent(signal.SIGKILL)
    launcher = os.environ.get(LAUNCHER)
    if launcher and not psutil.pid_exists(int(launcher)):
        raise SystemExit("the parent rmtool process has exited")  # before die_with_parent took effect
    log = os.open(log_file(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.enable()  # a crash in native code leaves a Python traceback in the log
    _write(folder, Status(rank, os.getpid()))
    with contextlib.suppress(OSError):  # the disk is full now: the error is found before the first step
        _reserve(folder, rank).write_bytes(bytes(RESERVED_BYTES))


def mark_saves(folder: Path, rank: int) -> None:
    """Write that signals are now received by `Stopping`."""
    _write(folder, Status(rank, os.getpid(), saves=True))


def mark_exited(folder: Path, rank: int, exit_code: int, error: dict[str, Any] | None) -> None:
    """Write the last status, also on a disk that is full: into the bytes that were reserved at the start."""
    last, reserve = Status(rank, os.getpid(), exit_code, error), _reserve(folder, rank)
    try:
        _write(folder, last)
    except OSError:
        with open(reserve, "r+b") as file:
            file.write(_text(last).encode())
            file.truncate()
        os.replace(reserve, status_file(folder, rank))
    reserve.unlink(missing_ok=True)


def log_file(folder: Path, rank: int) -> Path:
    """The file with the output of `rank`."""
    return folder / f"rank-{rank}.log"


def status_file(folder: Path, rank: int) -> Path:
    """The file with the status of `rank`."""
    return folder / f"rank-{rank}.json"


def read_status(path: Path) -> Status:
    """Read a status file."""
    return Status(**json.loads(path.read_text(encoding="utf-8")))


def process_state(pid: int) -> str:
    """The state of a process, as psutil names it; STATUS_DEAD if there is none."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return psutil.STATUS_DEAD


def die_with_parent(number: int) -> None:
    """Have the kernel send this signal when the parent process ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _reserve(folder: Path, rank: int) -> Path:
    return folder / f".rank-{rank}.reserve"


def _text(status: Status) -> str:
    return redact(json.dumps(vars(status)))


def _write(folder: Path, status: Status) -> None:
    temporary = folder / f".rank-{status.rank}.json"
    temporary.write_text(_text(status), encoding="utf-8")
    os.replace(temporary, status_file(folder, status.rank))
