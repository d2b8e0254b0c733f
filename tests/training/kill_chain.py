"""Training processes that are killed at random instants, each a fork of this one, which has imported everything.

python tests/training/kill_chain.py FOLDER RECIPE KILLS SEED: trains FOLDER/alone without a kill, then FOLDER/killed in
one chain with KILLS of them; prints the number of kills that came before the end of a run, and the snapshots resumed
from. This process runs nothing itself: a fork of one with OpenMP threads would hang.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from accelerate import Accelerator

from rmtool.model import loading  # noqa: F401 - imports transformers here, not in each fork
from rmtool.recipe import CONFIG_FILE, dump_recipe, load_recipe
from rmtool.training import worker
from rmtool.ui import SilentUi


class Log(SilentUi):
    def __init__(self, path: Path):
        self.path = path

    def say(self, text: str) -> None:
        with open(self.path, "a") as file:
            file.write(text + "\n")


def start(recipe: str, folder: Path) -> int:
    """Train in a fork; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        loaded = load_recipe(recipe)
        folder.mkdir(exist_ok=True)
        (folder / CONFIG_FILE).write_text(dump_recipe(loaded))
        worker.run(loaded, folder, Accelerator(cpu=True), Log(folder / "said.log"))
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, seconds: float | None = None) -> bool:
    """Wait for the fork, at most for some seconds."""
    end = time.monotonic() + (seconds if seconds is not None else 1e9)
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            assert os.waitstatus_to_exitcode(status) == 0
            return True
        time.sleep(0.002)
    return False


def main() -> None:
    root, recipe, kills, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    draw = random.Random(seed)
    started = time.monotonic()
    assert ended(start(recipe, root / "alone"))
    duration, killed = time.monotonic() - started, 0
    while killed < kills:
        pid = start(recipe, root / "killed")
        if ended(pid, draw.uniform(0, 1.2 * duration / 2)):
            break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        killed += 1
    else:
        assert ended(start(recipe, root / "killed"))
    said = (root / "killed" / "said.log").read_text()
    sys.stdout.write(json.dumps({"killed": killed, "resumed": said.count("resuming from step"), "seconds": duration}))


if __name__ == "__main__":
    main()
