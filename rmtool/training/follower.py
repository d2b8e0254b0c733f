"""A process that follows metrics.jsonl, where nothing that a tracker does can end, delay or change a run.

Depending on their settings, files and hosts, trackers raise, exit, hang, start threads and install hooks. The training
process only starts this one (`tracker_process.py`), and never waits for its answer unless the recipe has track.strict.
In: on stdin, a line of JSON, and a line at the end of the run; metrics.jsonl, which is followed until then.
Out: what the tracker logs; on stdout, a line of JSON for each notice; on stderr, what the tracker prints.
Cost: one process that imports the tracker and reads metrics.jsonl once a second.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from rmtool.redaction import redacted_output

FAILED = "metrics.jsonl only"  # in every notice of a failure
# States of the process, in its notices. LOST: it logs, but not where the recipe says.
STARTED, LOST, BROKEN, DONE = "started", "lost", "broken", "done"
Say = Callable[[str, str], None]


class Sink(Protocol):
    """A tracker that has started; `first` is the first step that it does not have."""

    first: int

    def log(self, row: dict[str, Any]) -> None: ...
    def finish(self, completed: bool) -> None: ...


def follow_run(name: str, start: Callable[[dict[str, Any], Say], Sink]) -> None:
    """Start a tracker, and give it every row of metrics.jsonl until the run has ended."""
    notices = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(state: str, text: str = "") -> None:
        print(json.dumps({"state": state, "text": text}), file=notices, flush=True)

    given = json.loads(sys.stdin.readline())
    run_ends = RunEnds(given["finish_s"])
    run_ends.start()
    doing = f"start {name}"
    with redacted_output():
        try:
            sink = start(given, say)
            doing = f"log to {name}"
            for row in follow(Path(given["metrics"]), run_ends):
                if row["step"] >= sink.first:
                    sink.log(row)
            doing = f"finish the {name} run"
            sink.finish(run_ends.outcome == "completed")
            say(DONE)
        except BaseException as error:  # noqa: BLE001 - trackers raise errors of any kind: pydantic's, SystemExit
            say(BROKEN, f"cannot {doing}, {FAILED}: {reason(error)}")
    os._exit(0)  # without wandb's exit hooks, which can wait for minutes


def reason(error: BaseException) -> str:
    """Return the message of an error in one line; of a setting of wandb, what it is in the environment."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"WANDB_{'_'.join(map(str, first['loc'][:1])).upper()}={first['input']} is not valid"
    return " ".join(str(error).split())[:300] or type(error).__name__


class RunEnds(threading.Thread):
    """Wait for the end of the run, or of the training process; then leave the tracker `finish_s` seconds."""

    def __init__(self, finish_s: float):
        super().__init__(daemon=True)
        self.finish_s, self.outcome = finish_s, ""

    def run(self) -> None:
        self.outcome = sys.stdin.readline().strip()
        timer = threading.Timer(self.finish_s, os._exit, (0,))
        timer.daemon = True
        timer.start()


def follow(path: Path, run_ends: RunEnds) -> Iterator[dict[str, Any]]:
    """Yield the rows of metrics.jsonl as they are written, until the run has ended."""
    text, more = "", True
    with open(path, encoding="utf-8") as file:
        while more:
            run_ends.join(1.0)
            more = run_ends.is_alive()  # asked before the last read, which finds all rows
            *lines, text = (text + file.read()).split("\n")
            yield from map(json.loads, lines)
