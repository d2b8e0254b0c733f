"""From a plan to running processes, and the terminal that shows what they do.

In: a `Plan`. Out: a finished run folder, or the error of the first process that failed.
What they want to show comes through a pipe; what else they print goes to rank-R.log in the run folder.
Cost: `accelerate launch` takes a few seconds to import its own libraries before a process starts.
"""

from __future__ import annotations

import contextlib
import functools
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from rmtool.errors import ExitCode, RmtoolError
from rmtool.launch.run_folder import LOG_FILE, _locked, _refuse_finished, _set_aside
from rmtool.launch.watch import Failure, FailureMonitor, clear, read_statuses, started
from rmtool.planning.plan import ACCELERATE_CONFIG, ACCELERATE_FILE, Plan, launch_command
from rmtool.recipe import CONFIG_FILE, dump_recipe, engine_of
from rmtool.training.worker_status import LAUNCHER, die_with_parent, log_file
from rmtool.ui import Replay, TerminalUi

EVENTS_FILE = ".events"
GRACE_S = 4.0  # between asking the processes to stop and killing them
PATIENCE_S = 3.0  # for the others to end by themselves when one has failed
LINES = 20  # of a failing process's log
# What a user has set for other programs of theirs must not reach into this run; nor what started this command.
FOREIGN = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PET_", "PMI_", "OMPI_", "MPI_", "MV2_")
RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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
    if found and launch.gpus_per_node > found:
        what = f"{launch.gpus_per_node} processes per node, and this node has {found} GPUs"
        raise RmtoolError("E0207", what, f"use --gpus-per-node {found}; the result is the same")
    if launch.nodes > 1 and not launch.main_address:
        hint = "pass --main-address, or set MASTER_ADDR, to the name of node 0"
        raise RmtoolError("E0207", f"{launch.nodes} nodes, and the first one's address is not known", hint)


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
        watch = FailureMonitor(output, plan.recipe.launch.gpus_per_node)
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


def _follow(child: subprocess.Popen[bytes], pipe: int, replay: Replay, watch: FailureMonitor) -> None:
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
    if failure is None and code == 0 and len(statuses) == plan.recipe.launch.gpus_per_node:
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
