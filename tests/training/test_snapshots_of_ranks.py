"""Snapshots of several ranks: all write, hash and check a part, and one disk that fails is an error on all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import PROGRAM, pair_rows, write_jsonl

from rmtool.training import snapshots as module
from rmtool.training.snapshots import Snapshots
from rmtool.training.tracking import read_metrics

SIZE = 3


class Ranks:
    """Threads in place of ranks; `gather` is what `gather_object` does between processes."""

    def __init__(self) -> None:
        self.barrier, self.own = threading.Barrier(SIZE, timeout=20), threading.local()
        self.values: list[Any] = [None] * SIZE

    def gather(self, values: list[Any]) -> list[Any]:
        self.values[self.own.rank] = values[0]
        self.barrier.wait()
        gathered = list(self.values)
        self.barrier.wait()
        return gathered

    def run(self, action: Callable[[int], Any]) -> list[Any]:
        """The result, or the exception, of every rank."""
        results: list[Any] = [None] * SIZE

        def call(rank: int) -> None:
            self.own.rank = rank
            try:
                results[rank] = action(rank)
            except Exception as error:  # noqa: BLE001 - compared by the test
                results[rank] = error

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(SIZE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return results


class Run:
    """A run folder, and the snapshots of each rank in it."""

    def __init__(self, folder: Path, ranks: Ranks):
        self.ranks = ranks
        self.snapshots = [Snapshots(folder, 2, rank, SIZE) for rank in range(SIZE)]
        self.folder = folder / "snapshots"

    def write(self, step: int, full: int | None = None) -> list[Any]:
        """Write a file per rank and one more; the disk of rank `full` has no space left."""

        def fill(rank: int, folder: Path) -> None:
            (folder / f"part-{rank}").write_text(f"{step} {rank}")
            if rank == 0:
                (folder / "main").write_text(str(step))
            if rank == full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return self.ranks.run(lambda rank: self.snapshots[rank].write(step, lambda folder: fill(rank, folder)))

    def find(self) -> list[Any]:
        return self.ranks.run(lambda rank: self.snapshots[rank].find(lambda _: None))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    ranks = Ranks()
    monkeypatch.setattr(module, "gather_object", ranks.gather)
    run = Run(tmp_path, ranks)
    run.write(1)
    return run


def test_every_file_is_hashed_once_by_one_of_the_ranks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, entry = list[str](), module.file_entry
    monkeypatch.setattr(module, "file_entry", lambda path: (hashed.append(path.name), entry(path))[1])
    written = run.write(2)
    assert {(each.step, each.files, each.size) for each in written} == {(2, 4, 10)}
    assert sorted(hashed) == ["main", "part-0", "part-1", "part-2"]
    assert run.find() == written


@pytest.mark.parametrize("name", ["main", "part-0", "part-1", "part-2"])
def test_damage_that_one_rank_finds_is_known_to_all(run: Run, name: str) -> None:
    first = run.find()
    run.write(2)
    (run.folder / "step-00000002" / name).write_text("?")
    assert run.find() == first
    assert (run.folder / "damaged-step-00000002").is_dir()


@pytest.mark.parametrize("full", range(SIZE))
def test_a_full_disk_of_one_rank_is_an_error_of_all_and_costs_no_snapshot(run: Run, full: int) -> None:
    first = run.find()
    failed = run.write(2, full)
    assert [(error.id, error.what) for error in failed] == [
        ("E0502", "cannot write the snapshot of step 2: No space left on device")
    ] * SIZE
    assert [path.name for path in run.folder.iterdir()] == ["step-00000001"]
    assert run.find() == first
    assert run.write(3) == run.find()


def test_a_bug_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        Snapshots(tmp_path, 2).write(1, fill)
    assert Snapshots(tmp_path, 2).steps() == []


def test_a_run_folder_that_one_rank_cannot_see_is_an_error_of_all(run: Run) -> None:
    run.snapshots[2].folder = run.folder / "elsewhere"
    found = run.ranks.run(lambda rank: run.snapshots[rank].require_shared())
    assert [(error.id, "rank 2" in error.what) for error in found] == [("E0506", True)] * SIZE
    assert [path.name for path in run.folder.iterdir()] == ["step-00000001"]  # no probe is left


# --- complete runs

FULL_DISK = """\
import os, sys
if os.environ.get("RANK") == "1" and "FULL" in os.environ and "rmtool.training.worker" in " ".join(sys.orig_argv):
    import errno, io
    sync, plain = os.fsync, io.open
    def check(path):
        if "/snapshots/.tmp-step-00000002/" in str(path) and str(path).endswith(os.environ["FULL"].split()[1]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    def fsync(file):
        check(os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}"))
        return sync(file)
    def opened(file, mode="r", *args, **named):
        if set(mode) & set("wxa"):
            check(file)
        return plain(file, mode, *args, **named)
    if os.environ["FULL"].startswith("fsync"):
        os.fsync = fsync
    else:
        import builtins
        io.open = builtins.open = opened
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "full"),
    [("ddp", "fsync .distcp"), ("ddp", "open rng-1.json"), ("zero3", "open .distcp"), ("zero3", "fsync .distcp")],
)
def test_a_full_disk_of_rank_1_ends_the_run_which_goes_on_later(
    engine: str, full: str, causal_lm: Path, tmp_path: Path
) -> None:
    """In torch's own writer and in ours; the snapshot before is as it was."""
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(32))
    (tmp_path / "tiny.yaml").write_text(
        f"model: {{path: {causal_lm}}}\n"
        f"data: {{train: [{data}], max_length: 256, cache: false}}\n"
        "train: {batch_size: 8, learning_rate: 1e-3, max_steps: 3, save_every: 1, precision: fp32}\n"
        f"launch: {{engine: {engine}, gpus_per_node: 2}}\n"
    )
    (tmp_path / "sitecustomize.py").write_text(FULL_DISK)
    output, paths = tmp_path / "run", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    words = [PROGRAM, "train", "--recipe", str(tmp_path / "tiny.yaml"), "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": paths}
    failed = subprocess.run(words, env={**environment, "FULL": full}, capture_output=True, text=True, timeout=140)
    assert (failed.returncode, "error[E0502]" in failed.stderr) == (5, True), failed.stderr
    assert "cannot write the snapshot of step 2: No space left on device" in failed.stderr
    assert [path.name for path in (output / "snapshots").iterdir()] == ["step-00000001"]
    statuses = [json.loads((output / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [(status["exit"], status["error"]["code"]) for status in statuses] == [(5, "E0502")] * 2
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=140)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 1 of 3 (snapshot verified: " in done.stderr
    assert [row["step"] for row in read_metrics(output)] == [1, 2, 3]
