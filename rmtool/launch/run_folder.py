"""The run folder: made, locked, cleared of an earlier run, and read when a run is finished.

In: the folder that --output names. Out: the same folder, ready for a run; the metrics and manifest of a finished one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from rmtool.checkpoint import HELD_OUT_FILE, MANIFEST, Manifest, check_writable, read_manifest
from rmtool.data.rejects import REJECTS_FILE
from rmtool.errors import RmtoolError
from rmtool.recipe import CONFIG_FILE

LOG_FILE = "train.log"  # of the launcher; each process has a log of its own


# What a finished run leaves; written out, because the modules that write some of it import torch.
_RUN_FILES = (
    *("model", HELD_OUT_FILE, REJECTS_FILE, CONFIG_FILE, LOG_FILE),
    *("metrics.jsonl", "curves.png", "report.json", "lengths.png"),
)


def prepare_folder(output: Path, overwrite: bool) -> None:
    """Make the run folder and see that it can be written.

    Raises:
        RmtoolError: E0601 a finished run is there, E0501 it cannot be written.
    """
    _refuse_finished(output, overwrite)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RmtoolError("E0501", f"cannot write {output}: {error.strerror}", "pass a different --output") from error
    check_writable(output / LOG_FILE)


def is_finished(output: Path) -> bool:
    """Whether the run folder holds a finished run."""
    return (output / "model" / MANIFEST).is_file()


def _refuse_finished(output: Path, overwrite: bool) -> None:
    if is_finished(output) and not overwrite:
        hint = "choose another --output, or pass --overwrite to move it to previous/"
        raise RmtoolError("E0601", f"{output} holds a finished run", hint)


def _set_aside(output: Path) -> None:
    """Move what an earlier run left to `previous/`: its model must not stand beside this run's held-out pairs."""
    previous = output / "previous"
    if (output / "model").exists():
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir()
        for name in _RUN_FILES:
            if (output / name).exists():
                (output / name).rename(previous / name)
    (output / REJECTS_FILE).unlink(missing_ok=True)
    for best in output.glob("best-step-*"):  # of a run that was interrupted
        previous.mkdir(exist_ok=True)
        shutil.rmtree(previous / best.name, ignore_errors=True)
        best.rename(previous / best.name)
    for leftover in output.glob(".tmp-*"):
        shutil.rmtree(leftover)


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold the run folder: a second run in it would mix its files with this one's. The lock goes with the process."""
    with open(output / ".lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RmtoolError(
                "E0602", f"another rmtool trains in {output}", "wait for it, or choose another --output"
            ) from error
        yield


def final_manifest(output: Path) -> Manifest:
    """What the finished run in `output` wrote beside its model."""
    manifest = read_manifest(output / "model")
    assert manifest, "a finished run has one"
    return manifest


def final_metrics(output: Path, manifest: Manifest) -> dict[str, float]:
    """The saved model's eval metrics, or the last step's training metrics where no pairs were held out."""
    last = json.loads((output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return manifest.metrics or {name: value for name, value in last.items() if "/" in name}
