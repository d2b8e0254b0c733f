"""What ended a run that did not finish: a request, the error of a process, or what ended a process without one.

In: a plan, the first failure, and the exit code of `accelerate launch`. Out: the exception to raise, if any.
Cost: reading the logs of the process that failed.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path

from rmtool.errors import ExitCode, RmtoolError, Stopped
from rmtool.launch.stop_request import StopRequest
from rmtool.launch.watch import Failure, read_statuses
from rmtool.planning.plan import Plan
from rmtool.training.run_files import LAUNCH_LOG
from rmtool.training.worker_status import Status, log_file

LOG_LINES = 20  # of the failed process's log, in the error
# NCCL's, in the log of a process that it aborts since another rank is gone: after TORCH_NCCL's timeout, ten minutes.
WATCHDOG = "watchdog thread terminated with exception"


def raise_stopped(plan: Plan, failure: Failure | None, request: StopRequest) -> None:
    """Raise if the ranks have left in time, or if those of other nodes have left before there was something to save.

    Raises:
        Stopped: without a text, as the main process has said it.
    """
    status = failure.status if failure else None
    if status and status.exit in (ExitCode.PREEMPTED, ExitCode.INTERRUPTED):
        raise Stopped("", status.exit)
    if status and status.exit == 128 + signal.SIGTERM:  # of a rank that left by itself, and saves no snapshots
        raise Stopped("", ExitCode.INTERRUPTED if request.name == signal.SIGINT.name else status.exit)
    lost = status and status.error and status.error["code"] == "E0805"
    if request.name and lost and plan.recipe.launch.nodes > 1:
        raise request.stopped()


def raise_failure(plan: Plan, failure: Failure | None, code: int | None) -> None:
    """Raise what the failed process reported, or what ended it; `code` is the exit code of `accelerate launch`."""
    if failure is None and code == 0 and len(read_statuses(plan.folder)) == plan.recipe.launch.gpus_per_node:
        return
    status = failure.status if failure else None
    name = "the training process"
    if plan.world_size > 1:
        name = f"rank {status.rank} of {plan.world_size}" if status else "a process that was still starting up"
    if status and status.error:
        error = RmtoolError.from_dict(status.error)
        error.what = f"{name}: {error.what}" if plan.world_size > 1 else error.what
        raise error
    log = log_file(plan.folder, status.rank) if status else plan.folder / LAUNCH_LOG
    lines = (text := _read(log)).splitlines()[-LOG_LINES:]
    tail = "\n    ".join(["", *lines]) if lines else None
    if WATCHDOG in text:
        hint = "check the logs of the other ranks and nodes: the first process that failed has the cause"
        raise RmtoolError("E0805", f"{name} lost the connection to another rank", f"{hint}; see {log}", found=tail)
    if status and status.exit == ExitCode.BUG:
        raise RmtoolError("E7001", f"internal error in {name}", f"see the traceback in {log} and report it", found=tail)
    if failure and failure.stopped:
        what, hint = "is stopped (SIGSTOP)", "check what stopped it, a scheduler or a debugger"
    else:
        what, hint = describe_death(exit_code(_read(plan.folder / LAUNCH_LOG), status, code))
    raise RmtoolError("E0801", f"{name} {what}", f"{hint}; see {log}", found=tail)


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def exit_code(log: str, status: Status | None, code: int | None) -> int | None:
    """The exit code of a process, negative for a signal: from torchrun's table or subprocess's exception in the log.

    `code` is that of `accelerate launch`: 1 for whatever happened to its processes, so it counts only without a rank.
    """
    pid = status.pid if status else r"\d+"
    if found := re.findall(r"died with <Signals\.\w+: (\d+)>", log):
        return -int(found[-1])
    if found := re.findall(rf"exitcode +: (-?\d+) \(pid: {pid}\)|returned non-zero exit status (\d+)", log):
        return int("".join(found[-1]))  # torchrun lists what failed first last
    return code if status is None or (code or 0) < 0 else None


def describe_death(code: int | None) -> tuple[str, str]:
    """What ended a process that reported no error, and a hint."""
    number = -code if code and code < 0 else (code or 0) - 128  # 137: a shell's 128 + SIGKILL
    if number == signal.SIGKILL:  # the kernel's, when the host is out of memory; for a GPU, torch raises an exception
        hint = "if the host was out of memory, lower train.tokens_per_pack"
        return "was killed by the system (SIGKILL), often out of memory", hint
    if number == signal.SIGTERM:
        return "was terminated (SIGTERM)", "check whether the scheduler or a user ended it"
    if number in (signal.SIGSEGV, signal.SIGABRT):
        return f"crashed ({signal.Signals(number).name})", "check the Python traceback in its log"
    how = "" if code is None else f" with signal {number}" if code < 0 else f" with exit code {code}"
    return f"ended{how} and reported no error", "check the last lines of its log"
