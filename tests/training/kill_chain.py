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
from helpers import logged_steps

from rmtool.launch.run_folder import clear_folder
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
        clear_folder(folder)  # as the launcher does
        (folder / CONFIG_FILE).write_text(dump_recipe(loaded))
        worker.run(loaded, folder, Accelerator(cpu=True), Log(folder / "said.log"))
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, seconds: float = 1e9, folder: Path = Path(), last_step: float = 1e9) -> bool:
    """Wait for the fork, at most for some seconds or until the run in `folder` is at some step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and logged_steps(folder) <= last_step:
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
    pid = start(recipe, root / "alone")
    assert not ended(pid, folder=root / "alone", last_step=0)
    first = time.monotonic() - started
    assert ended(pid)
    duration, killed, folder = time.monotonic() - started, 0, root / "killed"
    share = logged_steps(root / "alone") / (
        kills + 1
    )  # a run gets on by less than this, so that no run is the last one
    while killed < kills:
        pid = start(recipe, folder)
        seconds = draw.uniform(0, first + 2 * (duration - first) / kills)
        if ended(pid, seconds, folder, share * (killed + 1)):
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
