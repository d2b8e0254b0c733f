"""The run folder: prepared, locked and cleared for a run; the results of a finished one.

In: the folder that --output names. Out: the same folder, ready for a run; or the manifest and metrics of a finished
run.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from rmtool.checkpoint import MANIFEST, Manifest, check_writable, read_manifest, resolve_checkpoint
from rmtool.data.rejects import REJECTS_FILE
from rmtool.dataset.report import LENGTHS_FILE, REPORT_FILE
from rmtool.errors import RmtoolError
from rmtool.planning.plan import Plan
from rmtool.recipe import resolve
from rmtool.training.resume import identity, require_unchanged
from rmtool.training.run_files import (
    LOG_FILE,
    PREVIOUS,
    PROGRESS_FILE,
    RESULTS,
    SNAPSHOTS,
    move_to_previous,
    step_folders,
    step_of,
)
from rmtool.training.tracking import METRICS_FILE, read_metrics
from rmtool.training.worker_status import BEST_PREFIX, DATA_READ_FILE, PACK_BUDGET_FILE
from rmtool.ui import SilentUi, Ui

LOCK_FILE = ".lock"  # stays, and marks the folder as rmtool's


def prepare_folder(output: Path, overwrite: bool) -> None:
    """Create the run folder and check that it is writable.

    Raises:
        RmtoolError: E0601 when it contains a finished run and `overwrite` is off, or files of this name that rmtool did
            not write; E0501 when it is not writable.
    """
    refuse_finished(output, overwrite)
    _refuse_foreign(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RmtoolError("E0501", f"cannot write {output}: {error.strerror}", "pass a different --output") from error
    check_writable(output / LOG_FILE)


def _refuse_foreign(output: Path) -> None:
    """Refuse a folder with files that a run would move, replace or delete, unless they are those of an earlier run."""
    if (output / LOCK_FILE).exists() or is_finished(output):
        return
    names = [name for name in (*RESULTS, PREVIOUS) if (output / name).exists()]
    names = [name for name in names if name not in (REPORT_FILE, LENGTHS_FILE)]  # a dry run may have written these
    names += sorted(path.name for pattern in (".tmp-*", "rank-*", f"{BEST_PREFIX}*") for path in output.glob(pattern))
    if names:
        what = f"{output} contains {', '.join(names)}, which a run would replace, but rmtool did not write"
        raise RmtoolError("E0601", what, "pass a different --output")


def is_finished(output: Path) -> bool:
    """Whether the run folder contains a finished run."""
    return (output / "model" / MANIFEST).is_file()


def refuse_finished(output: Path, overwrite: bool) -> None:
    """Raise if the run folder contains a finished run and `overwrite` is off.

    Raises:
        RmtoolError: E0601.
    """
    if is_finished(output) and not overwrite:
        hint = "pass a different --output, or --overwrite to move the finished run to previous/"
        if (output / SNAPSHOTS).exists():  # kept, or killed before it deleted them
            hint += f"; the run no longer needs {output / SNAPSHOTS}"
        raise RmtoolError("E0601", f"{output} already contains a finished run", hint)


@contextlib.contextmanager
def lock_folder(output: Path, ui: Ui) -> Iterator[None]:
    """Lock the run folder, so that two runs cannot mix their files. The lock ends with the process.

    On a file system without locks, a notice says so, and the run goes on.

    Raises:
        RmtoolError: E0602 when another process has locked it.
    """
    with open(output / LOCK_FILE, "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "wait until it ends, or pass a different --output"
            raise RmtoolError("E0602", f"{output} is in use by another rmtool process", hint) from error
        except OSError as error:
            ui.say(f"note: cannot lock {output} ({error.strerror}): do not start a second run with this --output")
        yield


def begin(plan: Plan, restart: bool, ui: Ui) -> None:
    """Make the run folder ready: for the run that was interrupted in it, or without the files of an earlier one.

    Raises:
        RmtoolError: E0603 when the interrupted run is a different one.
    """
    if not plan.node:
        _keep_or_move(plan, restart, ui)
    elif restart:  # other nodes have only status files and logs, and this
        (plan.folder / PACK_BUDGET_FILE).unlink(missing_ok=True)
    clear_folder(plan.folder)


def _keep_or_move(plan: Plan, restart: bool, ui: Ui) -> None:
    output = plan.output
    if is_finished(output) or restart:
        if (moved := move_to_previous(output, RESULTS, replace=True)) and restart:
            ui.say(f"starting at step 1; the earlier run was moved to {moved}")
    elif found := step_folders(output / SNAPSHOTS):
        _require_same_run(plan, found[0])
    elif _was_interrupted(output):
        moved = move_to_previous(output, [name for name in RESULTS if name != PACK_BUDGET_FILE], replace=False)
        ui.say(f"the interrupted run has no snapshot: starting at step 1; its files were moved to {moved}")


def clear_folder(folder: Path) -> None:
    """Delete the status files and logs of an earlier run."""
    for temporary in folder.glob(".tmp-*"):
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
    ranks = (*folder.glob("rank-*.json"), *folder.glob("rank-*.log"), *folder.glob(".rank-*"))
    for path in (*ranks, folder / DATA_READ_FILE, folder / REJECTS_FILE):
        path.unlink(missing_ok=True)


def _was_interrupted(output: Path) -> bool:
    """Whether the folder has steps of an unfinished run."""
    metrics = output / METRICS_FILE
    steps = metrics.exists() and metrics.stat().st_size > 0
    return steps or (output / SNAPSHOTS).exists() or any(output.glob(f"{BEST_PREFIX}*"))


def _require_same_run(plan: Plan, snapshot: Path) -> None:
    """Compare what is known before any process starts; the training processes compare all of it.

    Raises:
        RmtoolError: E0603 when the snapshot is of a different run.
    """
    try:
        old = json.loads((snapshot / PROGRESS_FILE).read_bytes())["identity"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged: the training processes use an earlier one
        return
    base = plan.recipe.model
    local = Path(resolve(base.path)).is_dir()
    model = resolve_checkpoint(resolve(base.path), base.revision, SilentUi(), weights=False) if local else None
    require_unchanged(old, identity(plan.recipe, plan.sources, model), step_of(snapshot))


def final_manifest(output: Path) -> Manifest:
    """The manifest of the finished run in `output`."""
    manifest = read_manifest(output / "model")
    assert manifest, "every finished run has a manifest"
    return manifest


def final_metrics(output: Path, manifest: Manifest) -> dict[str, float]:
    """The eval metrics of the saved model, or the training metrics of the last step if there is no eval set."""
    last = read_metrics(output)[-1:] or [{}]
    return manifest.metrics or {name: value for name, value in last[0].items() if "/" in name}
