"""From a plan to running processes, and the terminal that shows what they do.

In: a `Plan`. Out: a finished run folder, or the error of the first process that failed.
The processes' own output goes to train.log in the run folder; what they want to show comes through a pipe.
Cost: `accelerate launch` takes a few seconds to import its own libraries before a process starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from rmtool.checkpoint import HELD_OUT_FILE, MANIFEST
from rmtool.data.rejects import REJECTS_FILE
from rmtool.errors import ExitCode, RmtoolError
from rmtool.plan import ACCELERATE_CONFIG, ACCELERATE_FILE, Plan, launch_command
from rmtool.recipe import CONFIG_FILE, dump_recipe
from rmtool.ui import Replay, TerminalUi

LOG_FILE = "train.log"
EVENTS_FILE = ".events"
# What a finished run leaves; written out, because the modules that write some of it import torch.
_RUN_FILES = (
    *("model", HELD_OUT_FILE, REJECTS_FILE, CONFIG_FILE, LOG_FILE),
    *("metrics.jsonl", "curves.png", "report.json", "lengths.png"),
)
GRACE_S = 10.0  # between asking the processes to stop and killing them


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
    if plan.recipe.launch.engine.startswith("zero") or plan.world_size > 1:
        raise RmtoolError(
            "E0207",
            f"{plan.world_size} processes on {plan.recipe.launch.engine} are planned, but not run by this version",
            "use --dry-run for the plan; to train here, set launch.engine=single and one process",
        )
    output = plan.output
    with _locked(output):
        _refuse_finished(output, overwrite)  # again: another run may have ended meanwhile
        _set_aside(output)
        _run_processes(plan, ui)


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
    for leftover in output.glob(".tmp-model-*"):
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
    output = plan.output
    for stale in output.glob("exit-*.json"):
        stale.unlink()
    (output / CONFIG_FILE).write_text(dump_recipe(plan.recipe), encoding="utf-8")
    (output / ACCELERATE_FILE).write_text(ACCELERATE_CONFIG, encoding="utf-8")
    with _events_pipe(output) as pipe, open(output / LOG_FILE, "wb") as log:
        child = subprocess.Popen(
            launch_command(plan.recipe, output, 0),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(output),
            start_new_session=True,
        )
        try:
            _follow(child, pipe, Replay(ui))
        finally:
            _stop(child)
    _raise_failure(output, child.returncode)


def _environment(output: Path) -> dict[str, str]:
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONUNBUFFERED": "1"}
    # What a user has set for other programs of theirs must not reach into this run.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    return {**kept, **quiet, "RMTOOL_EVENTS": str(output / EVENTS_FILE)}


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


def _follow(child: subprocess.Popen[bytes], pipe: int, replay: Replay) -> None:
    """Show events until the child is gone and the pipe is empty."""
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


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End the child's whole process group: the launcher alone would leave the workers behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        try:
            child.wait(GRACE_S)
            return
        except subprocess.TimeoutExpired:
            continue


def _raise_failure(output: Path, code: int) -> None:
    statuses = [json.loads(path.read_text()) for path in sorted(output.glob("exit-*.json"))]
    for status in statuses:
        if status["error"]:
            raise RmtoolError.from_dict(status["error"])
    if code == 0 and statuses and all(status["exit"] == 0 for status in statuses):
        return
    log = output / LOG_FILE
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
    bug = any(status["exit"] == ExitCode.BUG for status in statuses)
    raise RmtoolError(
        "E7001" if bug else "E0801",
        "training met a bug in rmtool" if bug else f"the training process died (exit code {code})",
        f"read the end of {log}"
        + (" and report it" if bug else "; out of memory is the usual reason: lower train.tokens_per_pack"),
        found=tail[0] if tail else None,
    )


def final_metrics(output: Path) -> dict[str, float]:
    """The last step's eval metrics, or its training metrics where no pairs were held out."""
    last = json.loads((output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    held_out = {name: value for name, value in last.items() if name.startswith("eval/")}
    return held_out or {name: value for name, value in last.items() if "/" in name}
