"""The process of a tracker, as the training process sees it: started, asked for its notices, and ended.

In: the module that runs in it (`follower.py`), and what that is given. Out: notices on the terminal, and `failure`.
Cost: a read that does not wait, per step.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import IO, Any

from rmtool.training.follower import BROKEN, DONE, FAILED, LOST
from rmtool.training.worker_status import LAUNCHER
from rmtool.ui import Ui

START_S = 60  # for the imports and the connection
POLL_S = 0.1


class TrackerProcess:
    """A tracker in a process of its own.

    In: its name, for notices; its module; what it is given. Out: `failure`, where it could not do all that it should.
    """

    def __init__(self, name: str, module: str, given: Mapping[str, Any], ui: Ui):
        self.name, self.ui, self.start_by = name, ui, time.monotonic() + START_S
        self.started = self.finishing = self.broken = self.done = False
        self.failure, self.unread = "", b""
        # Ctrl-C is for the run, and so is what the launcher does to processes with its mark. The end of the run is the
        # end of this process, too, but it first logs the last steps, and may upload for a while.
        environment = {key: value for key, value in os.environ.items() if key != LAUNCHER}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.orders: IO[bytes] = self.process.stdin  # type: ignore[assignment]
        self.notices: IO[bytes] = self.process.stdout  # type: ignore[assignment]
        os.set_blocking(self.notices.fileno(), False)
        self._order(json.dumps(given))

    def _order(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, which `show_notices` finds
            self.orders.write(line.encode() + b"\n")
            self.orders.flush()

    def show_notices(self) -> None:
        """Show what the process has to say, without waiting; stop one that does not start."""
        try:
            text = os.read(self.notices.fileno(), 2**16)
        except BlockingIOError:
            if not self.started and time.monotonic() > self.start_by:
                self._stop(f"{self.name} did not start within {START_S} s")
            return
        *lines, self.unread = (self.unread + text).split(b"\n")
        for line in lines:
            self._show(**json.loads(line))
        if not (text or self.done or (self.started and self.finishing)):
            self._stop(f"{self.name} ended")

    def _show(self, state: str, text: str) -> None:
        self.started, self.done, self.broken = True, self.done or state == DONE, self.broken or state == BROKEN
        if text:
            self.ui.say(text)
        if state in (LOST, BROKEN) and not self.failure:
            self.failure = text.partition("; ")[0]

    def wait_until_started(self) -> None:
        """Wait until it has started, or failed to."""
        while not (self.started or self.broken):
            self.show_notices()
            time.sleep(POLL_S)

    def finish(self, outcome: str) -> None:
        """Tell it that the run has ended."""
        self.finishing = True
        self._order(outcome)

    def wait(self, seconds: float, must_end: bool, may_go_on_s: float) -> None:
        """Wait for the end of what `finish` began; later the process ends by itself."""
        try:
            self.process.wait(max(seconds, 0))
            self.show_notices()
        except subprocess.TimeoutExpired:
            self.show_notices()
            what = "finish" if self.started else "start"
            if must_end or not (self.started or self.broken):
                self._stop(f"{self.name} did not {what} within {seconds:.0f} s of the end of the run")
            elif not self.broken:
                self.ui.say(f"{self.name} goes on in the background, for at most {may_go_on_s:g} s")
        if must_end and not self.done:
            self.failure = self.failure or f"{self.name} did not finish"

    def _stop(self, what: str) -> None:
        """Say once that the process failed, and kill it if it still runs."""
        if not self.broken:
            self.broken = True
            self._fail(f"{what}, {FAILED}")
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(1)

    def _fail(self, text: str) -> None:
        self.failure = self.failure or text
        self.ui.say(text)
