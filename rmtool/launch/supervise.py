"""From a plan to running processes, and the terminal that shows what they do.

In: a `Plan`. Out: a finished run folder, or the error of the first process that failed.
What they want to show comes through a pipe; what else they print goes to rank-R.log in the run folder.
Cost: `accelerate launch` takes a few seconds to import its own libraries before a process starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from rmtool.checkpoint import HELD_OUT_FILE, MANIFEST, Manifest, read_manifest
from rmtool.data.rejects import REJECTS_FILE
from rmtool.errors import ExitCode, RmtoolError
from rmtool.planning.plan import ACCELERATE_CONFIG, ACCELERATE_FILE, Plan, launch_command
from rmtool.recipe import CONFIG_FILE, dump_recipe, engine_of
from rmtool.training.worker_status import (
    LAUNCHER,
    STOPPED,
    Status,
    clear,
    die_with_parent,
    log_file,
    read_statuses,
    started,
)
from rmtool.ui import Replay, TerminalUi

LOG_FILE = "train.log"  # of the launcher; each process has a log of its own
EVENTS_FILE = ".events"
GRACE_S = 4.0  # between asking the processes to stop and killing them
PATIENCE_S = 3.0  # for the others to end by themselves when one has failed
HANG_S = 10.0  # a process that somebody stopped, before all are ended
LINES = 20  # of a failing process's log
# What a user has set for other programs of theirs must not reach into this run; nor what started this command.
FOREIGN = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PET_", "PMI_", "OMPI_", "MPI_", "MV2_")
RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What a finished run leaves; written out, because the modules that write some of it import torch.
_RUN_FILES = (
    *("model", HELD_OUT_FILE, REJECTS_FILE, CONFIG_FILE, LOG_FILE),
    *("metrics.jsonl", "curves.png", "report.json", "lengths.png"),
)


def prepare_folder(output: Path, overwrite: bool) -> None:
    """Make the run folder and see that it can be written.

    Raises:
        RmtoolError: E0601 a finished run is there, E0501 it cannot be written.
    """
    _refuse_finished(output, overwrite)
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise RmtoolError(
            "E0501", f"{output} cannot be written: {error.strerror}", "choose another --output"
        ) from error


def is_finished(output: Path) -> bool:
    """Whether the run folder holds a finished run."""
    return (output / "model" / MANIFEST).is_file()


def _refuse_finished(output: Path, overwrite: bool) -> None:
    if is_finished(output) and not overwrite:
        hint = "choose another --output, or pass --overwrite to move it to previous/"
        raise RmtoolError("E0601", f"{output} holds a finished run", hint)


def run(plan: Plan, ui: TerminalUi, overwrite: bool = False) -> None:
    """Write the run's config, start its processes, show their progress, and wait.

    Raises:
        RmtoolError: what the first failing process wrote down, or E0801 if it died without a word.
    """
    _require_devices(plan)
    plan.folder.mkdir(exist_ok=True)
    with _locked(plan.folder):
        _refuse_finished(plan.output, overwrite)  # again: another run may have ended meanwhile
        _set_aside(plan.folder)
        _run_processes(plan, ui)


def _require_devices(plan: Plan) -> None:
    """Each process of this node needs a GPU of its own; where there is none at all, they share the cores.

    Raises:
        RmtoolError: E0207 more processes than GPUs, or several nodes and no address.
    """
    import torch

    launch, found = plan.recipe.launch, torch.cuda.device_count()
    if found and launch.processes_per_node > found:
        what = f"{launch.processes_per_node} processes per node, and this node has {found} GPUs"
        raise RmtoolError("E0207", what, f"use --gpus-per-node {found}; the result is the same")
    if launch.nodes > 1 and not launch.main_address:
        hint = "pass --main-address, or set MASTER_ADDR, to the name of node 0"
        raise RmtoolError("E0207", f"{launch.nodes} nodes, and the first one's address is not known", hint)


def _set_aside(output: Path) -> None:
    """Move what an earlier run left to `previous/`: its model must not stand beside this run's held-out pairs."""
    previous = output / "previous"
    if (output / "model").exists():
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir()
        for name in _RUN_FILES:
            if (output / name).exists():
                (output / name).rename(previous / name)
    (output / REJECTS_FILE).unlink(missing_ok=True)
    for best in output.glob("best-step-*"):  # of a run that was interrupted
        previous.mkdir(exist_ok=True)
        shutil.rmtree(previous / best.name, ignore_errors=True)
        best.rename(previous / best.name)
    for leftover in output.glob(".tmp-*"):
        shutil.rmtree(leftover)


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold the run folder: a second run in it would mix its files with this one's. The lock goes with the process."""
    with open(output / ".lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RmtoolError(
                "E0602", f"another rmtool trains in {output}", "wait for it, or choose another --output"
            ) from error
        yield


def _run_processes(plan: Plan, ui: TerminalUi) -> None:
    output = plan.folder
    clear(output)
    (output / CONFIG_FILE).write_text(dump_recipe(plan.recipe), encoding="utf-8")
    (output / ACCELERATE_FILE).write_text(ACCELERATE_CONFIG, encoding="utf-8")
    with _events_pipe(output) as pipe, open(output / LOG_FILE, "wb") as log:
        child = subprocess.Popen(
            launch_command(plan.recipe, plan.output, plan.node),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(plan),
            start_new_session=True,
            preexec_fn=functools.partial(die_with_parent, signal.SIGTERM),
        )
        watch = Watch(output, plan.recipe.launch.processes_per_node)
        try:
            _follow(child, pipe, Replay(ui), watch)
        finally:
            _stop(child)
    _raise_failure(plan, watch.look(), child.returncode)


def _environment(plan: Plan) -> dict[str, str]:
    import torch

    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONUNBUFFERED": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN) and name not in RANKS}
    if not torch.cuda.is_available() and engine_of(plan.recipe.launch) == "ddp":
        quiet["ACCELERATE_USE_CPU"] = "true"
    return {**kept, **quiet, "RMTOOL_EVENTS": str(plan.folder / EVENTS_FILE), LAUNCHER: str(os.getpid())}


@contextlib.contextmanager
def _events_pipe(output: Path) -> Iterator[int]:
    path = output / EVENTS_FILE
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    # Opened for writing too: without a writer a pipe is always "ready", and a writer that ends closes nothing here.
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


class Watch:
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


def _follow(child: subprocess.Popen[bytes], pipe: int, replay: Replay, watch: Watch) -> None:
    """Show events until the child is gone and the pipe is empty, or a process has failed and the others stay."""
    buffer = b""
    with selectors.DefaultSelector() as selector, contextlib.closing(replay):
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            gone = child.poll() is not None
            if selector.select(0 if gone else 0.2):
                *lines, buffer = (buffer + os.read(pipe, 1 << 16)).split(b"\n")
                for line in lines:
                    replay.line(line.decode())
            elif gone:
                return
            failure = watch.look()
            if failure and time.monotonic() - failure.seen > PATIENCE_S:
                return


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End all that was started: some lead groups of their own, and some have lost the process that started them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in started():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        end = time.monotonic() + GRACE_S
        while child.poll() is None or started():
            if time.monotonic() > end:
                break
            time.sleep(0.1)


def _raise_failure(plan: Plan, failure: Failure | None, code: int) -> None:
    statuses = read_statuses(plan.folder)
    if failure is None and code == 0 and len(statuses) == plan.recipe.launch.processes_per_node:
        return
    status = failure.status if failure else None
    log = log_file(plan.folder, status.rank) if status else plan.folder / LOG_FILE
    which = "the training process"
    if plan.world_size > 1:
        which = f"process {status.rank} of {plan.world_size}" if status else "a process that had hardly begun"
    if status and status.error:
        error = RmtoolError.from_dict(status.error)
        error.what = f"{which}: {error.what}" if plan.world_size > 1 else error.what
        raise error
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES:]
    tail = "\n    ".join(["", *lines]) if lines else None
    if status and status.exit == ExitCode.BUG:
        raise RmtoolError("E7001", f"{which} met a bug in rmtool", f"report it, with {log}", found=tail)
    what = failure.what if failure else f"died (exit code {code})"
    hint = f"read the end of {log}; out of memory is the usual reason: lower train.tokens_per_pack"
    raise RmtoolError("E0801", f"{which} {what}", hint, found=tail)


def final_manifest(output: Path) -> Manifest:
    """What the finished run in `output` wrote beside its model."""
    manifest = read_manifest(output / "model")
    assert manifest, "a finished run has one"
    return manifest


def final_metrics(output: Path, manifest: Manifest) -> dict[str, float]:
    """The saved model's eval metrics, or the last step's training metrics where no pairs were held out."""
    last = json.loads((output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return manifest.metrics or {name: value for name, value in last.items() if "/" in name}
