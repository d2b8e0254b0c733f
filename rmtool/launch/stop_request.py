"""Signals that ask the launcher to stop: left at once, or passed on to training processes that save first.

In: SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (Slurm's early warning), and the time limit. Out: `Stopped`, with the exit code;
or the signal to every rank.
Cost: none until there is a request.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from rmtool.errors import ExitCode, Stopped
from rmtool.training.worker_status import STOP_SIGNALS, Status, die_with_parent

# GNU timeout, srun and wrappers send one signal both to their child and to its process group.
REPEAT_S = 1.0  # the same request, until then
RESERVE_S = 5.0  # before the time limit, to end processes that have nothing to save
SNAPSHOTS = "snapshots/step-*/MANIFEST.json"  # in a run folder: complete ones


class StopRequest:
    """The first signal to this process, or the time limit.

    In: signals while it is entered. Out: until `at_once`, and after `defer`, it only records them (`name`, and `again`
    for a second one); in between it raises `Stopped` from where the process is.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock, self.started = clock, clock()
        self.name: str | None = None
        self.again = False
        self.deadline: float | None = None
        self._number = signal.SIGTERM
        self._since = 0.0
        self._output: Path | None = None
        self._raises = False
        self._passed_on: set[int] = set()

    def __enter__(self) -> StopRequest:
        # A shell that runs a command in the background has it ignore Ctrl-C.
        numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.name is None:
            self._number, self._since = signal.Signals(number), self.clock()
            self.name = self._number.name
        elif self.clock() - self._since > REPEAT_S:
            self.again = True
        if self._raises:
            self._raises = False  # once: the way out must not be interrupted
            raise self.stopped()

    def limit(self, seconds: float | None) -> None:
        """Set the time limit of the command, counted from its start."""
        self.deadline = None if seconds is None else self.started + seconds

    def at_once(self, output: Path | None) -> None:
        """From now on, raise `Stopped`; `output` is the run folder whose snapshots can be resumed."""
        self._output, self._raises = output, True
        if self.name:
            self._raises = False
            raise self.stopped()

    def defer(self) -> None:
        """From now on, only record signals."""
        self._raises = False

    def poll(self, may_wait: bool) -> bool:
        """Return whether to stop; ranks that save by themselves (`may_wait`) keep the time limit by themselves."""
        if self.name is None and not may_wait and self.deadline and self.clock() > self.deadline - RESERVE_S:
            self.name, self._since = "time limit", self.clock()
        return self.name is not None

    def pass_on(self, statuses: Sequence[Status]) -> None:
        """Send the signal to every rank that runs, once."""
        for status in statuses:
            if status.exit is None and status.pid not in self._passed_on:
                self._passed_on.add(status.pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(status.pid, self._number)

    def stopped(self) -> Stopped:
        """Return the exception for leaving at once."""
        resumes = self._output is not None and any(self._output.glob(SNAPSHOTS))
        text = f"{self.name}: stopped{'; the same command resumes from the last snapshot' if resumes else ''}"
        if self._number == signal.SIGINT:
            return Stopped(text, ExitCode.INTERRUPTED)
        return Stopped(text, ExitCode.PREEMPTED if resumes else 128 + signal.SIGTERM)


def hold_back_signals() -> None:
    """In a new process, before its program starts: leave these signals pending.

    `accelerate launch` and torchrun would end the ranks on SIGTERM and SIGINT, and die of SIGUSR1; ranks inherit this
    until they can handle them (`Stopping`). Only SIGKILL ends such a process with its parent.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    die_with_parent(signal.SIGKILL)
