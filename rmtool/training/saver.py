"""The snapshots of this run: when one is due, what it holds, and how the run goes on from it.

In: an engine between two steps, and the progress of the run. Out: a snapshot (`snapshots.py`) with the training state,
the random number generators of every rank, metrics.jsonl, and progress.json: progress and identity of the run.
All ranks must call all methods.
Cost per snapshot: what is written (12 bytes per trainable parameter), which the run waits for.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rmtool.checkpoint import fsync
from rmtool.errors import Stopped
from rmtool.training.checkpoint_writer import CheckpointWriter
from rmtool.training.durable import write_file
from rmtool.training.progress import Progress
from rmtool.training.resume import Identity, changes
from rmtool.training.rng import rng_state, set_rng_state
from rmtool.training.run_files import PROGRESS_FILE
from rmtool.training.snapshots import Snapshot, Snapshots
from rmtool.training.tracking import METRICS_FILE, Tracker
from rmtool.training.training_state import load_state, save_state, state_bytes
from rmtool.training.worker_status import BEST_PREFIX
from rmtool.ui import Ui

STATE = "state"  # folder in a snapshot
TERMINATED = 143  # the exit code of a run that was stopped and saves no snapshots


@dataclass
class Saver:
    """Writer of this run's snapshots.

    In: what they hold. Out: `progress`, which the training loop updates, and a snapshot whenever one is due.
    """

    snapshots: Snapshots
    checkpoints: CheckpointWriter
    identity: Identity
    ui: Ui
    progress: Progress = field(default_factory=Progress)
    tracker: Tracker | None = None  # on the main process
    last_seconds: float = 0.0  # that the last snapshot took

    def __post_init__(self) -> None:
        self.engine, self.train = self.checkpoints.engine, self.checkpoints.recipe.train
        self.started = self.saved = time.monotonic()
        self.seconds_before = self.progress.seconds

    @property
    def enabled(self) -> bool:
        return self.train.save_every is not None or self.train.save_minutes is not None

    def start(self) -> None:
        """Check, before the first step, that snapshots can be written.

        Raises:
            RmtoolError: E0506 a node does not see the run folder; E0502 the disk has no room for them; E0501.
        """
        if self.enabled:
            self.snapshots.require_shared()
            self.snapshots.require_room(state_bytes(self.engine))

    def resume(self, found: Snapshot, total: int) -> None:
        """Continue from a verified snapshot.

        Raises:
            RmtoolError: E0501 and E0604 as `load_state`.
        """
        load_state(self.engine, found.folder / STATE)
        self.progress = Progress.from_dict(read_progress(found.folder)["progress"])
        self.seconds_before = self.progress.seconds
        self.snapshots.on_main(lambda: restore_metrics(found.folder, self.snapshots.run))
        self._keep_best(self.snapshots.steps())
        rng = found.folder / self._rng_file
        if rng.exists():  # else this rank is one more than before
            set_rng_state(rng.read_bytes())
        verified = f"{found.files} files, {found.size:,} bytes"
        same = "data, recipe, model, tokenizer and versions unchanged"
        self.ui.say(f"resuming from step {found.step} of {total} (snapshot verified: {verified}; {same})")
        for name, old, new in changes(read_progress(found.folder)["identity"], self.identity, harmless=True):
            self.ui.say(f"changed since the snapshot: {name} from {old} to {new}")

    def save_if_due(self) -> tuple[float, str]:
        """Write a snapshot if it is time for one; return the seconds of the last one, and what was written now."""
        written = self.save() if self._due() else ""
        return self.last_seconds, written

    def save_before_stop(self, step: int, pending: Mapping[str, float] | None) -> None:
        """Write a snapshot of the run that ends now.

        Args:
            pending: metrics of this step, if its evaluation is still to be done.

        Raises:
            RmtoolError: E0502 as `Snapshots.write`.
            Stopped: when the recipe turns snapshots off.
        """
        assert step == self.progress.step
        if not self.enabled:
            reason = "no snapshot was saved, because train.save_every and train.save_minutes are null"
            raise Stopped(f"stopped at step {step}: {reason}", TERMINATED)
        self.progress.pending = dict(pending) if pending is not None else None
        if step not in self.snapshots.steps():
            self.save()

    def save(self) -> str:
        """Write a snapshot; return what it cost.

        Raises:
            RmtoolError: E0502 as `Snapshots.write`.
        """
        progress, started = self.progress, time.monotonic()
        progress.snapshots += 1
        progress.seconds = self.seconds_before + started - self.started
        written = self.snapshots.write(progress.step, self._fill, self._best_files())
        self._keep_best(self.snapshots.retain(self.ui.say))
        self.saved = time.monotonic()
        self.last_seconds = self.saved - started
        progress.snapshot_seconds += self.last_seconds
        progress.seconds += self.last_seconds
        took = f"step {progress.step}: {written.size:,} bytes in {self.last_seconds:.1f} s, {self._share()}"
        self.ui.say(f"snapshot of {took}")
        return took

    def finish(self) -> None:
        """Say what the snapshots cost, and delete them if the recipe says so; the model is saved."""
        progress = self.progress
        progress.seconds = self.seconds_before + time.monotonic() - self.started
        if progress.snapshots:
            took = f"{progress.snapshot_seconds:.1f} s"
            self.ui.say(f"snapshots: {progress.snapshots} written in {took}, {self._share()}")
        if self.train.delete_snapshots and self.engine.accelerator.is_main_process:
            shutil.rmtree(self.snapshots.folder, ignore_errors=True)

    def _share(self) -> str:
        return f"{self.progress.snapshot_seconds / max(self.progress.seconds, 1e-9):.1%} of the run's time"

    def _due(self) -> bool:
        """Whether a snapshot is due: by steps, or by the clock of any rank."""
        every, minutes = self.train.save_every, self.train.save_minutes
        if every and self.progress.step % every == 0:
            return True
        if minutes is None:
            return False
        elapsed = time.monotonic() - self.saved >= 60 * minutes
        return bool(self.engine.dist.sum(torch.tensor([float(elapsed)])).item())

    def _fill(self, folder: Path) -> None:
        save_state(self.engine, folder / STATE)
        write_file(folder / self._rng_file, rng_state())
        if self.engine.accelerator.is_main_process:
            kept = {"progress": self.progress.as_dict(), "identity": self.identity}
            write_file(folder / PROGRESS_FILE, json.dumps(kept, indent=1).encode())
            if self.tracker:
                self.tracker.flush()
            write_file(folder / METRICS_FILE, (self.snapshots.run / METRICS_FILE).read_bytes())

    @property
    def _rng_file(self) -> str:
        return f"rng-{self.engine.dist.rank}.json"

    def _best_files(self) -> list[Path]:
        folder = self.checkpoints.best_folder(self.progress.best)
        return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.exists() else []

    def _keep_best(self, steps: list[int]) -> None:
        """Delete the best checkpoints that neither the run nor one of these snapshots needs."""
        if self.engine.accelerator.is_main_process:
            best = {self.progress.best.step, *(_best_step(self.snapshots.folder_of(step)) for step in steps)}
            self.checkpoints.kept = {f"{BEST_PREFIX}{step}" for step in best}
            self.checkpoints.delete_best_but(self.checkpoints.kept)


def _best_step(folder: Path) -> int:
    """The step of the best checkpoint that a snapshot needs; 0 if the snapshot is damaged."""
    try:
        return int(read_progress(folder)["progress"]["best"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def read_progress(folder: Path) -> dict[str, Any]:
    """Return what is in the progress.json of a snapshot: "progress" and "identity"."""
    found: dict[str, Any] = json.loads((folder / PROGRESS_FILE).read_bytes())
    return found


def restore_metrics(snapshot: Path, run: Path) -> None:
    """Make metrics.jsonl what it was at the snapshot: without the steps that are taken again, and complete even if the
    file was damaged or lost since.
    """
    temporary = run / f".tmp-{METRICS_FILE}"
    write_file(temporary, (snapshot / METRICS_FILE).read_bytes())
    temporary.rename(run / METRICS_FILE)
    fsync(run)
