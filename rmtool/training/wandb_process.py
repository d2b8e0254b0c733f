"""Weights & Biases in a separate process, where nothing that it does can end, delay or change a run.

Depending on its settings, files and hosts, wandb raises, exits, hangs, starts threads and installs hooks. The training
process only starts this one, and never waits for its answer.
In: on stdin, a line of JSON for `wandb.init`, and a line at the end of the run; metrics.jsonl, which is followed until
then. Out: a wandb run in the run folder; on stdout, notices for the user; on stderr, what wandb prints.
Cost: one process that imports wandb and reads metrics.jsonl once a second.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

FAILED = "metrics.jsonl only"  # in every notice of a failure


def main() -> None:
    """Run the process: `python -m rmtool.training.wandb_process`."""
    notices = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    given = json.loads(sys.stdin.readline())
    run_ends = RunEnds(given["finish_s"])
    run_ends.start()
    doing = "start wandb"
    try:
        run, notice = _start(given["init"], given["start_s"])
        print(notice, file=notices, flush=True)
        doing = "log to wandb"
        # A run that goes on has the steps before; one that is offline cannot know which, so far.
        first = run.step if run.resumed else given["logged"] + 1
        for row in _follow(Path(given["metrics"]), run_ends):
            if row["step"] >= first:
                run.log(row, step=int(row["step"]))
        doing = "finish the wandb run"
        run.finish(exit_code=0 if run_ends.outcome == "completed" else 1)
    except BaseException as error:  # noqa: BLE001 - wandb raises errors of any kind: pydantic's, SystemExit, its own
        print(f"cannot {doing}, {FAILED}: {_reason(error)}", file=notices, flush=True)
    os._exit(0)  # without wandb's exit hooks, which can wait for minutes


def _reason(error: BaseException) -> str:
    """Return the message of an error in one line; of a setting, what it is in the environment."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"WANDB_{'_'.join(map(str, first['loc'][:1])).upper()}={first['input']} is not valid"
    return " ".join(str(error).split())[:300] or type(error).__name__


class RunEnds(threading.Thread):
    """Wait for the end of the run, or of the training process; then leave wandb `finish_s` seconds."""

    def __init__(self, finish_s: float):
        super().__init__(daemon=True)
        self.finish_s, self.outcome = finish_s, ""

    def run(self) -> None:
        self.outcome = sys.stdin.readline().strip()
        timer = threading.Timer(self.finish_s, os._exit, (0,))
        timer.daemon = True
        timer.start()


def _start(init: dict[str, Any], timeout_s: float) -> tuple[Any, str]:
    """Start the wandb run; return it with a notice of where it is."""
    os.environ["WANDB_SILENT"] = "true"  # its warnings, too: the notices say what there is to say
    import wandb

    if wandb.setup().settings.mode == "online" and not wandb.api.api_key:
        init["mode"] = "offline"
    run = wandb.init(**init, settings=wandb.Settings(init_timeout=timeout_s, silent=True, console="off"))
    if run.disabled:
        return run, f"wandb: disabled by its settings, {FAILED}"
    if run.offline:
        return run, "wandb: offline (no API key, or WANDB_MODE=offline); upload later with `wandb sync`"
    return run, f"wandb: {run.url}"


def _follow(path: Path, run_ends: RunEnds) -> Iterator[dict[str, Any]]:
    """Yield the rows of metrics.jsonl as they are written, until the run has ended."""
    text, more = "", True
    with open(path, encoding="utf-8") as file:
        while more:
            run_ends.join(1.0)
            more = run_ends.is_alive()  # asked before the last read, which finds all rows
            *lines, text = (text + file.read()).split("\n")
            yield from map(json.loads, lines)


if __name__ == "__main__":
    main()
