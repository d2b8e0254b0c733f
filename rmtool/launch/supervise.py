"""The training processes of one node: started, followed on the terminal, and ended.

In: a `Plan`. Out: a finished run folder, or the error of the first process that failed.
Progress comes through a pipe; all other output of a rank goes to rank-R.log in the run folder.
Cost: `accelerate launch` imports its libraries for a few seconds before it starts a process.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from rmtool.errors import RmtoolError
from rmtool.launch.failure import raise_failure, raise_stopped
from rmtool.launch.run_folder import begin, lock_folder, refuse_finished
from rmtool.launch.stop_request import StopRequest, hold_back_signals
from rmtool.launch.train_log import open_log
from rmtool.launch.watch import FailureMonitor, Position, find_workers, read_statuses
from rmtool.packages import require_package
from rmtool.planning.plan import ACCELERATE_CONFIG, ACCELERATE_FILE, WORKER, Plan, launch_command
from rmtool.recipe import CONFIG_FILE, dump_recipe, engine_of
from rmtool.training.pack_budget import read_pack_budget
from rmtool.training.run_files import LAUNCH_LOG, LOG_FILE
from rmtool.training.tracking import PLAN_FILE
from rmtool.training.worker_status import DEADLINE, LAUNCHER
from rmtool.ui import TerminalUi
from rmtool.ui.pipe import Replay

GRACE_S = 4.0  # from SIGTERM to SIGKILL
PATIENCE_S = 3.0  # for the other processes to end by themselves after a failure
# Not inherited by the training processes: settings for other programs, and the variables of what started this command.
FOREIGN_PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PET_", "PMI_", "OMPI_", "MPI_", "MV2_")
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run(plan: Plan, ui: TerminalUi, request: StopRequest, overwrite: bool = False, restart: bool = False) -> None:
    """Write the run's config, start its processes, show their progress, and wait for them.

    Raises:
        Stopped: on `request`, or when a process got a signal by itself.
        RmtoolError: the error of the first process that failed; E0801 when it died without one, E7001 when it met a
            bug; E0207, E0601 to E0603 before any process starts.
    """
    _check_node(plan)
    plan.folder.mkdir(exist_ok=True)
    with lock_folder(plan.folder, ui):
        refuse_finished(plan.output, overwrite)  # again: another run may have finished before the lock
        begin(plan, restart, ui)
        request.defer()
        while True:
            with open_log(plan.folder / LOG_FILE) as log:
                if _run_processes(plan, (ui, log), request):
                    break
            begin(plan, False, ui)
        if plan.recipe.hub.repo_id:  # the push may take minutes; without one, the run is complete
            request.at_once(plan.output)


def _check_node(plan: Plan) -> None:
    """Each process needs its own GPU; on a host without GPUs all processes share the cores.

    Raises:
        RmtoolError: E0207 when there are more processes than GPUs, or several nodes and no address; E0507 no DeepSpeed.
    """
    import torch

    launch, found = plan.recipe.launch, torch.cuda.device_count()
    if found and launch.gpus_per_node > found:
        what = f"cannot start {launch.gpus_per_node} processes on this node: it has {found} GPU{'s' * (found > 1)}"
        raise RmtoolError("E0207", what, f"pass --gpus-per-node {found}; the steps stay the same")
    if engine_of(launch).startswith("zero"):
        require_package("deepspeed", f"launch.engine={launch.engine}", "set launch.engine=ddp")
    if launch.nodes > 1 and not launch.main_address:
        raise RmtoolError("E0207", "the address of node 0 is not set", "pass --main-address, or set MASTER_ADDR")


def _run_processes(plan: Plan, uis: Sequence[TerminalUi], request: StopRequest) -> bool:
    """Run the training processes; return False if they must be started again, with smaller packs."""
    output, tokens_per_pack = plan.folder, plan.recipe.train.tokens_per_pack
    budget = read_pack_budget(output, tokens_per_pack)
    (output / CONFIG_FILE).write_text(dump_recipe(plan.recipe), encoding="utf-8")
    (output / PLAN_FILE).write_text(_plan_json(plan), encoding="utf-8")
    (output / ACCELERATE_FILE).write_text(ACCELERATE_CONFIG, encoding="utf-8")
    with _events_pipe() as (events, pipe), open(output / LAUNCH_LOG, "wb") as launched:
        child = subprocess.Popen(
            launch_command(plan.recipe, plan.output, plan.node),
            stdin=subprocess.DEVNULL,
            stdout=launched,
            stderr=subprocess.STDOUT,
            env=_environment(plan, request, events),
            start_new_session=True,
            preexec_fn=hold_back_signals,
        )
        ranks = Ranks(plan, child, FailureMonitor(output, plan.recipe.launch.gpus_per_node), request, uis)
        try:
            _follow(ranks, pipe)
            code = child.poll()
        finally:
            _stop(child)
    failure = ranks.monitor.poll()
    raise_stopped(plan, failure, request)
    smaller = read_pack_budget(output, tokens_per_pack)  # that a rank has left before it ended
    if failure and smaller < budget and plan.recipe.launch.nodes == 1 and not request.name:
        ranks.say(f"out of memory at {budget:,} tokens per pack: starting the processes again with {smaller:,}")
        return False
    raise_failure(plan, failure, code)  # other nodes' launchers would not know that they must start again
    return True


def _plan_json(plan: Plan) -> str:
    """The plan for other programs, with the table that the run prints."""
    return json.dumps(plan.as_dict() | {"rows": dict(plan.rows())}, indent=2) + "\n"


def _environment(plan: Plan, request: StopRequest, events: Path) -> dict[str, str]:
    import torch

    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(FOREIGN_PREFIXES) and name not in RANK_VARIABLES
    }
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONUNBUFFERED": "1"}
    if not torch.cuda.is_available() and engine_of(plan.recipe.launch) in ("ddp", "fsdp2"):
        environment["ACCELERATE_USE_CPU"] = "true"
    if request.deadline is not None:
        environment[DEADLINE] = str(request.deadline)
    return environment | {"RMTOOL_EVENTS": str(events), LAUNCHER: str(os.getpid())}


@contextlib.contextmanager
def _events_pipe() -> Iterator[tuple[Path, int]]:
    """Not in the run folder: shared file systems may have no pipes."""
    with tempfile.TemporaryDirectory(prefix="rmtool-") as folder:
        path = Path(folder, "events")
        os.mkfifo(path)
        # Also open for writing: a pipe without a writer always counts as readable.
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        try:
            yield path, descriptor
        finally:
            os.close(descriptor)


@dataclass
class Ranks:
    """The processes that `_follow` follows, and who may ask them to stop."""

    plan: Plan
    child: subprocess.Popen[bytes]
    monitor: FailureMonitor
    request: StopRequest
    uis: Sequence[TerminalUi]
    position: Position = field(default_factory=Position)
    asked: bool = False

    def say(self, text: str) -> None:
        for ui in self.uis:
            ui.say(text)

    def stop_if_requested(self) -> None:
        """Pass a request on to ranks that save; end those that have nothing to save, and all on a second request.

        Raises:
            Stopped: when they are not to be waited for.
        """
        statuses = read_statuses(self.plan.folder)
        saving = [status.saves or status.exit is not None for status in statuses]
        may_wait = len(saving) == self.plan.recipe.launch.gpus_per_node and all(saving)
        if not self.request.poll(may_wait):
            return
        if self.request.again or not may_wait:
            raise self.request.stopped()
        self.request.pass_on(statuses)
        if not self.asked:
            self.asked = True
            self.say(f"{self.request.name}: {self.position.last_actions()} (send it again to stop at once)")


def _follow(ranks: Ranks, pipe: int) -> None:
    """Show events until the child has exited and the pipe is empty, or PATIENCE_S after a failure.

    Raises:
        Stopped: on a request, if the ranks have nothing to save.
    """
    buffer, replays, child, monitor = b"", [Replay(ui) for ui in ranks.uis], ranks.child, ranks.monitor
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for replay in replays:
            stack.callback(replay.close)
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            exited = child.poll() is not None
            if not exited:
                ranks.stop_if_requested()
            if selector.select(0 if exited else 0.2):
                *lines, buffer = (buffer + os.read(pipe, 1 << 16)).split(b"\n")
                for line in lines:
                    ranks.position.line(line)
                    for replay in replays:
                        replay.line(line.decode())
            elif exited:
                return
            failure = monitor.poll()
            if failure and time.monotonic() - failure.seen > PATIENCE_S:
                return


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End every process that was started: some lead their own process groups, some have lost their parent.

    Ranks and `accelerate launch` hold SIGTERM back; what they started gets the time to end by itself.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in find_workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL if WORKER in process.cmdline() else number)
        end = time.monotonic() + GRACE_S
        while (child.poll() is None or find_workers()) and time.monotonic() < end:
            time.sleep(0.1)
