"""Snapshots of a run: folders that are complete and verified, or do not count.

In: a function that writes the files of a step. Out: `snapshots/step-N/` in the run folder, and on the way back the
newest one whose files all have the sizes and hashes of its manifest.
Files are written into a temporary folder and fsynced, the manifest last; a rename makes them a snapshot. There is no
pointer file: the folders are the truth. Every method must be called by all ranks; they share the hashing, and an error
of one is raised on all.
Cost: the state is written once, and read back once for its hashes, mostly from memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from accelerate.utils import gather_object

from rmtool.checkpoint import fsync
from rmtool.errors import RmtoolError
from rmtool.training.durable import Entries, difference, disk_error, file_entry, free_bytes, write_file
from rmtool.training.run_files import DAMAGED, MANIFEST_FILE, SNAPSHOTS, TEMPORARY, step_folders, step_name, step_of

FORMAT = 1  # of the files in a snapshot
_AGAIN = "free disk space or restore the folder, then run the same command again"
T = TypeVar("T")


@dataclass(frozen=True)
class Snapshot:
    """A complete snapshot: its folder, the optimizer step after which it was taken, its files and their bytes."""

    folder: Path
    step: int
    files: int
    size: int


class Snapshots:
    """The snapshots in a run folder.

    In: the run folder, how many snapshots are kept, and this process's rank among all. Out: see the methods.
    """

    def __init__(self, run: Path, keep: int, rank: int = 0, world_size: int = 1):
        self.run, self.folder = run, run / SNAPSHOTS
        self.keep, self.rank, self.world_size = keep, rank, world_size
        self.size = 0  # bytes of one snapshot, as far as it is known
        self._outside: Entries = {}  # files of other folders, which do not change once they are hashed

    def find(self, say: Callable[[str], None]) -> Snapshot | None:
        """Return the newest complete snapshot. Temporary folders are removed, and damaged ones renamed.

        Raises:
            RmtoolError: E0501 when they cannot be; E0603 a snapshot is of an rmtool with a different format.
        """
        with self._writable():
            for step in self._main(self._steps_on_disk):
                folder = self.folder_of(step)
                found, problem = self._verify(folder, step)
                if found:
                    return found
                self._main(lambda folder=folder: self._set_aside(folder))  # type: ignore[misc]
                say(f"{folder} is corrupted ({problem}): renamed to {DAMAGED}{folder.name}, using the one before")
        return None

    def require_shared(self) -> None:
        """Check that all ranks see the run folder of node 0.

        Raises:
            RmtoolError: E0506 when one does not; E0501 when it is not writable.
        """
        with self._writable():
            name = self._main(self._write_probe)
            probe = self.folder / name
            unseen = [rank for rank, seen in enumerate(gather_object([probe.exists()])) if not seen]
            self._main(probe.unlink)
        if unseen:
            what = f"the run folder of node 0 is not visible to rank {unseen[0]}, so it cannot write its snapshots"
            hint = (
                "pass an --output that all nodes share, or set train.save_minutes=null to train without snapshots "
                "(and train.save_every=null)"
            )
            raise RmtoolError("E0506", what, hint, found=str(self.folder))

    def require_room(self, size: int) -> None:
        """Check that the disk has room for the snapshots that are kept, and the next one, of `size` bytes each.

        Raises:
            RmtoolError: E0502 when it has not.
        """
        self.size = size
        there, free = self._main(lambda: (len(step_folders(self.folder)), free_bytes(self.folder)))
        needed = size * max(self.keep + 1 - there, 1)
        if needed > free:
            what = f"the snapshots need {needed:,} bytes of disk space, but {free:,} bytes are free"
            kept = f"{self.keep} snapshots and the next one, {size:,} bytes each, in {self.folder}"
            hint = "free disk space, pass an --output on a larger disk, or set train.keep_snapshots=1"
            raise RmtoolError("E0502", what, hint, found=kept)

    def write(self, step: int, fill: Callable[[Path], None], outside: Sequence[Path] = ()) -> Snapshot:
        """Let `fill` write the files of a snapshot on every rank, and complete it.

        Args:
            outside: files of other folders that belong to it; they are not copied, but verified with it.

        Raises:
            RmtoolError: E0502 when it cannot be written; earlier snapshots stay as they are.
        """
        target = self.folder_of(step)
        temporary = self.folder / f"{TEMPORARY}{target.name}"
        try:
            self._main(lambda: self._begin(temporary))
            self._together(lambda: fill(temporary))
            names = self._main(lambda: _files(temporary, outside))
            shares = self._together(lambda: self._hash(temporary, names[self.rank :: self.world_size]))
            entries = {name: entry for share in shares for name, entry in share.items()}
            self._main(lambda: self._complete(temporary, target, step, entries))
        except OSError as error:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise self._cannot_write(step, error) from error
        snapshot = _snapshot(target, step, entries)
        self.size = max(self.size, snapshot.size)
        return snapshot

    def retain(self, say: Callable[[str], None]) -> list[int]:
        """Delete all but the newest; return the steps that are kept. One that cannot be deleted costs only its room."""

        def delete() -> tuple[list[int], str | None]:
            steps = [step_of(path) for path in step_folders(self.folder)]
            try:
                for step in steps[self.keep :]:
                    _delete(self.folder_of(step))
            except OSError as error:
                return steps, f"cannot delete the snapshot of step {step}: {error.strerror}"
            return steps[: self.keep], None

        kept, problem = self._main(delete)
        if problem:
            say(problem)
        return kept

    def steps(self) -> list[int]:
        """Return the steps of the complete snapshots, newest first."""
        return self._main(lambda: [step_of(path) for path in step_folders(self.folder)])

    def folder_of(self, step: int) -> Path:
        return self.folder / step_name(step)

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0, and return its result on all.

        Raises:
            RmtoolError: E0501 when it cannot write.
        """
        with self._writable():
            return self._main(action)

    def _steps_on_disk(self) -> list[int]:
        for left in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return [step_of(path) for path in step_folders(self.folder, complete=False)]

    def _verify(self, folder: Path, step: int) -> tuple[Snapshot | None, str | None]:
        """Return the snapshot, or what is wrong with it."""
        try:
            entries = self._main(lambda: _read_manifest(folder, step))
        except OSError as error:
            return None, f"{MANIFEST_FILE}: {error.strerror}"
        if isinstance(entries, str):
            return None, f"{MANIFEST_FILE}: {entries}"
        if isinstance(entries, int):
            what = f"cannot resume from step {step}: the snapshot has format {entries}, this rmtool reads {FORMAT}"
            hint = "use the rmtool version that wrote it, or pass --restart to start at step 1"
            raise RmtoolError("E0603", what, hint, found=str(folder))
        names = sorted(entries)[self.rank :: self.world_size]
        found = next(filter(None, (difference(folder, name, entries[name]) for name in names)), None)
        problem = next(filter(None, gather_object([found])), None)
        return (None, problem) if problem else (_snapshot(folder, step, entries), None)

    def _set_aside(self, folder: Path) -> None:
        aside = folder.with_name(f"{DAMAGED}{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
        folder.rename(aside)

    def _write_probe(self) -> str:
        self.folder.mkdir(exist_ok=True)
        name = f"{TEMPORARY}probe-{uuid.uuid4().hex}"
        write_file(self.folder / name, b"")
        return name

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"cannot write {error.filename or self.folder}: {error.strerror}"
            raise RmtoolError("E0501", what, "check its permissions, or pass a different --output") from error

    def _begin(self, temporary: Path) -> None:
        self.folder.mkdir(exist_ok=True)  # not its parents: a run folder that has vanished is an error
        temporary.mkdir()  # `find` has removed what an earlier process left

    def _hash(self, folder: Path, names: Sequence[str]) -> Entries:
        """Make files durable, and return their sizes and hashes."""
        entries: Entries = {}
        for name in names:
            if name not in self._outside:
                fsync(folder / name)
            entries[name] = self._outside.get(name) or file_entry(folder / name)
            if name.startswith(".."):
                self._outside[name] = entries[name]
        return entries

    def _complete(self, temporary: Path, target: Path, step: int, entries: Entries) -> None:
        manifest = {"format": FORMAT, "step": step, "files": dict(sorted(entries.items()))}
        write_file(temporary / MANIFEST_FILE, json.dumps(manifest, indent=1).encode())
        for folder in sorted(path for path in temporary.rglob("*") if path.is_dir()):
            fsync(folder)
        fsync(temporary)
        temporary.rename(target)
        fsync(self.folder)
        fsync(self.folder.parent)

    def _cannot_write(self, step: int, error: OSError) -> RmtoolError:
        reason = error.strerror or str(error)
        found = f"{self.size:,} bytes needed, {free_bytes(self.folder):,} bytes free in {self.folder}"
        return RmtoolError("E0502", f"cannot write the snapshot of step {step}: {reason}", _AGAIN, found=found)

    def _main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0, and return its result on all."""
        return self._together(lambda: action() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def _together(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank; return the results of all.

        Raises:
            OSError: on every rank, when the disk failed on one.
        """
        result, failed = None, None
        try:
            result = action()
        except Exception as error:
            failed = disk_error(error)
            if failed is None:
                raise
        gathered = gather_object([(result, failed and (failed.errno, failed.strerror or str(failed)))])
        for _, reason in gathered:
            if reason:
                raise OSError(*reason)
        return [each for each, _ in gathered]


def _files(folder: Path, outside: Sequence[Path]) -> list[str]:
    inner = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return inner + [os.path.relpath(path, folder) for path in outside]


def _read_manifest(folder: Path, step: int) -> Entries | str | int:
    """Return the files of a snapshot, what is wrong with its manifest, or the number of a different format."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
        if manifest["format"] != FORMAT:
            return int(manifest["format"])
        given = manifest["files"].items()
        files: Entries = {name: {"size": int(each["size"]), "sha256": each["sha256"]} for name, each in given}
        found = manifest["step"]
    except FileNotFoundError:
        return "missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "corrupted"
    return files if found == step else f"of step {found}"


def _snapshot(folder: Path, step: int, entries: Entries) -> Snapshot:
    return Snapshot(folder, step, len(entries), sum(entry["size"] for entry in entries.values()))


def _delete(folder: Path) -> None:
    aside = folder.with_name(f"{TEMPORARY}{folder.name}")
    folder.rename(aside)  # first, so that a part of it never counts
    shutil.rmtree(aside)
