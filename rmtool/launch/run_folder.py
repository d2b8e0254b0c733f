"""The run folder: prepared, locked and cleared for a run; the results of a finished one.

In: the folder that --output names. Out: the same folder, ready for a run; or the manifest and metrics of a finished
run.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from rmtool.checkpoint import HELD_OUT_FILE, MANIFEST, Manifest, check_writable, read_manifest
from rmtool.data.rejects import REJECTS_FILE
from rmtool.dataset.report import LENGTHS_FILE, REPORT_FILE
from rmtool.errors import RmtoolError
from rmtool.recipe import CONFIG_FILE
from rmtool.training.tracking import CURVES_FILE, METRICS_FILE, read_metrics
from rmtool.training.worker_status import BEST_PREFIX, DATA_READ_FILE, PACK_BUDGET_FILE

LOG_FILE = "train.log"  # output of `accelerate launch`; each rank has its own log
LOCK_FILE = ".lock"  # stays, and marks the folder as rmtool's
PREVIOUS = "previous"
RESULTS = (
    *("model", HELD_OUT_FILE, REJECTS_FILE, CONFIG_FILE, LOG_FILE),
    *(METRICS_FILE, CURVES_FILE, REPORT_FILE, LENGTHS_FILE, PACK_BUDGET_FILE),
)


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
    names += sorted(path.name for pattern in (".tmp-*", "rank-*") for path in output.glob(pattern))
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
        raise RmtoolError("E0601", f"{output} already contains a finished run", hint)


@contextlib.contextmanager
def lock_folder(output: Path) -> Iterator[None]:
    """Lock the run folder, so that two runs cannot mix their files. The lock ends with the process.

    Raises:
        RmtoolError: E0602 when another process has locked it.
    """
    with open(output / LOCK_FILE, "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "wait until it ends, or pass a different --output"
            raise RmtoolError("E0602", f"{output} is in use by another rmtool process", hint) from error
        yield


def clear_folder(output: Path) -> None:
    """Move the results of an earlier run to `previous/` and delete its status files and logs.

    Results are moved together: an old model next to this run's held-out pairs would be evaluated on its training set.
    """
    previous = output / PREVIOUS
    if (output / "model").exists():
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir()
        for name in RESULTS:
            if (output / name).exists():
                (output / name).rename(previous / name)
    for best in output.glob(f"{BEST_PREFIX}*"):  # from an interrupted run: hours of training
        previous.mkdir(exist_ok=True)
        shutil.rmtree(previous / best.name, ignore_errors=True)
        best.rename(previous / best.name)
    for temporary in output.glob(".tmp-*"):
        shutil.rmtree(temporary)
    ranks = (*output.glob("rank-*.json"), *output.glob("rank-*.log"))
    for path in (*ranks, output / DATA_READ_FILE, output / REJECTS_FILE):
        path.unlink(missing_ok=True)


def final_manifest(output: Path) -> Manifest:
    """The manifest of the finished run in `output`."""
    manifest = read_manifest(output / "model")
    assert manifest, "every finished run has a manifest"
    return manifest


def final_metrics(output: Path, manifest: Manifest) -> dict[str, float]:
    """The eval metrics of the saved model, or the training metrics of the last step if there is no eval set."""
    last = read_metrics(output)[-1:] or [{}]
    return manifest.metrics or {name: value for name, value in last[0].items() if "/" in name}
