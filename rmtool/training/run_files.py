"""Files of a run in its folder, and moving those of an earlier run out of the way.

In: a run folder. Out: the snapshots in it; or the same folder without the earlier run, which is in `previous/`.
Nothing here imports torch: the launcher uses it, too.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rmtool.checkpoint import HELD_OUT_FILE
from rmtool.data.rejects import REJECTS_FILE
from rmtool.dataset.report import LENGTHS_FILE, REPORT_FILE
from rmtool.recipe import CONFIG_FILE
from rmtool.training.eval_samples import SAMPLES_FILE
from rmtool.training.tracking import CURVES_FILE, METRICS_FILE, PLAN_FILE, TENSORBOARD
from rmtool.training.worker_status import BEST_PREFIX, PACK_BUDGET_FILE

LOG_FILE = "train.log"  # what the terminal shows
LAUNCH_LOG = "launch.log"  # output of `accelerate launch`; each rank has its own log
PREVIOUS = "previous"
SNAPSHOTS, STEP, MANIFEST_FILE = "snapshots", "step-", "MANIFEST.json"
PROGRESS_FILE = "progress.json"  # in a snapshot
TEMPORARY, DAMAGED = ".tmp-", "damaged-"  # prefixes of folders in snapshots/ that do not count
# What the training processes write again when a run starts, and what the launcher has written before.
WRITTEN = (SNAPSHOTS, HELD_OUT_FILE, METRICS_FILE, CURVES_FILE, REPORT_FILE, LENGTHS_FILE, SAMPLES_FILE, TENSORBOARD)
RESULTS = ("model", *WRITTEN, REJECTS_FILE, CONFIG_FILE, PLAN_FILE, LOG_FILE, LAUNCH_LOG, PACK_BUDGET_FILE)


def step_name(step: int) -> str:
    return f"{STEP}{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(STEP))


def step_folders(snapshots: Path, complete: bool = True) -> list[Path]:
    """The snapshots, newest first; by their names, as clocks may be wrong. A complete one has a manifest."""
    found = [path for path in snapshots.glob(f"{STEP}*") if path.name.removeprefix(STEP).isdecimal()]
    found = [path for path in found if path.name == step_name(step_of(path))]  # else it is a user's copy, "step-7"
    found = [path for path in found if (path / MANIFEST_FILE).exists() or not complete]
    return sorted(found, key=step_of, reverse=True)


def move_to_previous(output: Path, names: Sequence[str], replace: bool) -> Path | None:
    """Move these results and the best checkpoints to `previous/`; return the folder, None if there were none.

    They are moved together: an old model next to another run's held-out pairs would be evaluated on its training set.

    Args:
        replace: delete what is in `previous/`, as the user asked for; else use `previous-2/` and so on.
    """
    found = [output / name for name in names if (output / name).exists()] + sorted(output.glob(f"{BEST_PREFIX}*"))
    if not found:
        return None
    target, number = output / PREVIOUS, 2
    if replace:
        shutil.rmtree(target, ignore_errors=True)
    while target.exists():
        target, number = output / f"{PREVIOUS}-{number}", number + 1
    target.mkdir()
    for path in found:
        path.rename(target / path.name)
    return target
