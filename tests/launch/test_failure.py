"""What ended a run: exit codes in the logs of launchers, signals, and a rank that lost another one."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rmtool.errors import RmtoolError
from rmtool.launch.failure import describe_death, exit_code, raise_failure
from rmtool.launch.watch import Failure
from rmtool.planning.plan import make_plan
from rmtool.recipe import load_recipe
from rmtool.training.run_files import LAUNCH_LOG
from rmtool.training.worker_status import Status, log_file

TORCHRUN = """\
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : 8 (pid: 70)
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 71)
  traceback : Signal 9 (SIGKILL) received by PID 71
"""


@pytest.mark.parametrize(
    ("log", "rank", "code", "expected"),
    [
        (TORCHRUN, 1, 1, -9),
        (TORCHRUN, 0, 1, 8),
        (TORCHRUN, None, 1, -9),
        ("subprocess.CalledProcessError: Command '[...]' died with <Signals.SIGSEGV: 11>.", 0, 1, -11),
        ("subprocess.CalledProcessError: Command '[...]' returned non-zero exit status 137.", 0, 1, 137),
        ("", 0, 1, None),  # accelerate's own code, which does not depend on the rank's
        ("", 0, -9, -9),  # accelerate itself was killed, and its processes with it
        ("", None, 9, 9),
    ],
)
def test_the_exit_code_of_a_rank_is_in_the_log(log: str, rank: int | None, code: int, expected: int | None) -> None:
    assert exit_code(log, None if rank is None else Status(rank, 70 + rank), code) == expected


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-signal.SIGKILL, "was killed by the system (SIGKILL), often out of memory"),
        (128 + signal.SIGKILL, "was killed by the system (SIGKILL), often out of memory"),
        (-signal.SIGSEGV, "crashed (SIGSEGV)"),
        (-signal.SIGABRT, "crashed (SIGABRT)"),
        (-signal.SIGTERM, "was terminated (SIGTERM)"),
        (-signal.SIGUSR1, "ended with signal 10 and reported no error"),
        (3, "ended with exit code 3 and reported no error"),
        (255, "ended with exit code 255 and reported no error"),
        (None, "ended and reported no error"),
    ],
)
def test_only_a_killed_process_may_have_been_out_of_memory(code: int | None, words: str) -> None:
    what, hint = describe_death(code)
    assert what == words
    assert ("memory" in hint) == ("SIGKILL" in what)


# What torch writes in a process that it aborts: until 2.3, and since.
WATCHDOGS = (
    "[E ProcessGroupNCCL.cpp:915] [Rank 1] NCCL watchdog thread terminated with exception: [Rank 1] Watchdog caught "
    "collective operation timeout: WorkNCCL(SeqNum=1, OpType=ALLREDUCE, Timeout(ms)=600000)",
    "[rank1]:[E602 11:18:52 ProcessGroupNCCL.cpp:1896] [PG ID 0 PG GUID 0(default_pg) Rank 1] Process group watchdog "
    "thread terminated with exception: NCCL error: remote process exited or there was a network error",
)


@pytest.mark.parametrize("log", WATCHDOGS)
def test_a_rank_that_nccl_aborts_has_lost_another_one(log: str, tmp_path: Path) -> None:
    """Not "crashed", and not out of memory."""
    plan = make_plan(load_recipe("debug"), tmp_path)
    plan = replace(plan, world_size=2)
    log_file(tmp_path, 1).write_text(f"{log}\nterminate called after throwing an instance of c10::DistBackendError\n")
    (tmp_path / LAUNCH_LOG).write_text("  exitcode  : -6 (pid: 71)\n")
    with pytest.raises(RmtoolError) as caught:
        raise_failure(plan, Failure(Status(1, 71), time.monotonic()), 1)
    assert (caught.value.id, caught.value.what) == ("E0805", "rank 1 of 2 lost the connection to another rank")
    assert "other ranks and nodes" in caught.value.hint
    log_file(tmp_path, 1).write_text("Fatal Python error: Aborted\n")
    with pytest.raises(RmtoolError, match=r"crashed \(SIGABRT\)"):
        raise_failure(plan, Failure(Status(1, 71), time.monotonic()), 1)
