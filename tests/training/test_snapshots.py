"""Snapshots: complete and verified, or not there, whatever the disk, a kill or a flipped bit does."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import Lines

from rmtool.checkpoint import Manifest
from rmtool.config import Recipe, TrackConfig
from rmtool.dist import DistInfo
from rmtool.errors import RmtoolError, Stopped
from rmtool.recipe import load_recipe
from rmtool.training import snapshots as module
from rmtool.training.checkpoint_writer import CheckpointWriter
from rmtool.training.durable import write_file
from rmtool.training.engine import Engine
from rmtool.training.optim import build_optimizer
from rmtool.training.progress import Best
from rmtool.training.saver import Saver, read_progress
from rmtool.training.snapshots import Snapshots
from rmtool.training.tracking import Tracker

METRICS = "metrics.jsonl"


def make_engine(seed: int = 0) -> Engine:
    """An engine after one step; of a model with one tensor, so that a save has few calls."""
    torch.manual_seed(seed)
    model: Any = torch.nn.Linear(3, 1, bias=False)
    engine = Engine.prepare(Accelerator(cpu=True), model, build_optimizer(model, settings().train), None)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    engine.update(1e-3)
    return engine


def settings(**train: Any) -> Recipe:
    given = [(f"train.{name}", value) for name, value in train.items()]
    return load_recipe("debug", given)


def make_saver(run: Path, engine: Engine, **train: Any) -> Saver:
    recipe = settings(**{"save_every": 1, **train})
    manifest = Manifest("", 1, "fp32", "error", "error", "debug", "base", [])
    checkpoints = CheckpointWriter(run, recipe, engine, None, manifest)  # type: ignore[arg-type]
    (run / METRICS).touch()
    return Saver(Snapshots(run, recipe.train.keep_snapshots), checkpoints, {"train.seed": "0"}, Lines())


def take_steps(saver: Saver, count: int) -> None:
    """Pretend to take steps, each with a snapshot."""
    for _ in range(count):
        take_step(saver)
        saver.save_if_due()


def take_step(saver: Saver) -> None:
    """Pretend to take a step; it has a row of metrics."""
    saver.progress.step += 1
    with open(saver.snapshots.run / METRICS, "a") as file:
        file.write(json.dumps({"step": saver.progress.step}) + "\n")


def add_best(saver: Saver, step: int) -> Path:
    """Pretend that an evaluation was the best so far."""
    saver.progress.best = Best({"eval/rm/accuracy": 0.5}, step)
    folder = saver.checkpoints.best_folder(saver.progress.best)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(99))
    saver.checkpoints.delete_best_but({*saver.checkpoints.kept, folder.name})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(engine: Engine) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in engine.model.parameters()]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


@pytest.fixture
def saver(engine: Engine, tmp_path: Path) -> Saver:
    """A run with snapshots of steps 1 and 2, and a best checkpoint."""
    saver = make_saver(tmp_path, engine)
    take_steps(saver, 1)
    add_best(saver, 1)
    take_steps(saver, 1)
    return saver


def test_a_snapshot_holds_what_a_run_needs(saver: Saver) -> None:
    found = saver.snapshots.find(saver.ui.say)
    assert found
    assert (found.step, found.folder.name) == (2, "step-00000002")
    names = set(contents(found.folder))
    assert names >= {"MANIFEST.json", "progress.json", "rng-0.json", METRICS, "state/.metadata"}
    manifest = json.loads((found.folder / "MANIFEST.json").read_text())
    assert manifest["files"].keys() == names - {"MANIFEST.json"} | {"../../best-step-1/model.safetensors"}
    assert found.size == sum(each["size"] for each in manifest["files"].values())


def test_the_newest_are_kept_with_the_best_checkpoints_that_they_name(saver: Saver) -> None:
    run = saver.snapshots.run
    add_best(saver, 3)
    assert (run / "best-step-1").exists()  # named by snapshot 2
    take_steps(saver, 1)
    assert saver.snapshots.steps() == [3, 2]
    assert (run / "best-step-1").exists()
    take_steps(saver, 1)
    assert saver.snapshots.steps() == [4, 3]
    assert not (run / "best-step-1").exists()
    assert (run / "best-step-3").exists()
    assert sorted(path.name for path in saver.snapshots.folder.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_snapshot_is_durable_before_it_has_its_name(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, the manifest after all others, the folders with their names, then the rename and the names it changes."""
    done, sync, rename = list[str](), os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        done.append(f"{path.relative_to(tmp_path)} -> {target.relative_to(tmp_path)}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(saver.snapshots, "keep", 9)
    take_steps(saver, 1)
    temporary, final = "snapshots/.tmp-step-00000003", "snapshots/step-00000003"
    at = done.index(f"{temporary} -> {final}")
    inside = [temporary, *(str((tmp_path / temporary / name).relative_to(tmp_path)) for name in names_in(saver, 3))]
    assert set(inside) <= set(done[:at])
    manifest = done.index(f"{temporary}/MANIFEST.json")
    files = [name for name in inside if (tmp_path / name.replace(temporary, final)).is_file()]
    assert all(done.index(name) <= manifest for name in files)
    assert all(at > done.index(name) > manifest for name in inside if name not in files)
    assert done[at + 1 :] == ["snapshots", "."]


def names_in(saver: Saver, step: int) -> list[str]:
    folder = saver.snapshots.folder_of(step)
    return [str(path.relative_to(folder)) for path in folder.rglob("*")]


# Every I/O call of a save.


class Faulty:
    """Counts calls of the operating system that change something; the one with number `at` fails.

    kind: "count", an errno, "exit" (as by SIGKILL), or "short" (a write takes half of the bytes)
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, kind: str | int, under: Path):
        self.at, self.kind, self.count, self.under = at, kind, 0, str(under)
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # it would take most of the time
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open"):
            monkeypatch.setattr(os, name, self.wrapped(getattr(os, name)))
        for owner in (io, __import__("builtins")):
            monkeypatch.setattr(owner, "open", self.opened(owner.open))

    def hit(self, size: int = 0) -> int:
        """Count a call; return how many bytes of a write are taken."""
        self.count += 1
        if self.count != self.at or self.kind == "count":
            return size
        if self.kind == "exit":
            os._exit(137)
        if isinstance(self.kind, int):
            raise OSError(self.kind, os.strerror(self.kind))
        return size // 2 if size > 1 else size

    def wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.hit()
            return call(*arguments, **named)

        return counted

    def opened(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            ours = str(file).startswith(self.under)
            if ours and set(mode) & set("wax+"):
                self.hit()
            opened = call(file, mode, *arguments, **named)
            return _File(opened, self) if ours and set(mode) & set("wax+") else opened

        return counted


class _File:
    def __init__(self, file: Any, faulty: Faulty):
        self._file, self._faulty = file, faulty

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        taken = self._faulty.hit(len(data))
        return int(self._file.write(memoryview(data)[:taken]) if taken < len(data) else self._file.write(data))


def in_a_child(action: Callable[[], None]) -> int:
    """Run in a fork; return its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def calls_of_a_save(saver: Saver) -> int:
    with pytest.MonkeyPatch.context() as patch:
        take_step(saver)
        faulty = Faulty(patch, 0, "count", saver.snapshots.run)
        saver.save()
        return faulty.count


def test_a_disk_that_takes_half_of_a_write_gets_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Faulty(monkeypatch, 2, "short", tmp_path)  # after the call that opens it
    write_file(tmp_path / "a", bytes(range(100)))
    assert (tmp_path / "a").read_bytes() == bytes(range(100))


def failure_of(saver: Saver) -> RmtoolError | None:
    """Save a snapshot; return why it failed."""
    try:
        saver.save()
    except RmtoolError as error:
        return error
    return None


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO, "short"], ids=["ENOSPC", "EIO", "short write"])
def test_a_failed_call_of_a_save_costs_no_snapshot(saver: Saver, kind: str | int) -> None:
    """Each call in turn: the save fails and leaves nothing, or it passes; then the run goes on."""
    total = calls_of_a_save(saver)
    assert total > 30
    failed = 0
    for at in range(1, total + 1):
        before, trained = contents(saver.snapshots.folder_of(saver.progress.step)), weights(saver.engine)
        step = saver.progress.step
        take_step(saver)
        with pytest.MonkeyPatch.context() as patch:
            Faulty(patch, at, kind, saver.snapshots.run)
            error = failure_of(saver)
        if error:
            failed += 1
            assert not list(saver.snapshots.folder.glob(".tmp-*"))  # its room is free again
            assert (error.id, error.exit_code) == ("E0502", 5)
            assert "bytes needed" in (error.found or "")
            assert "bytes free" in (error.found or "")
        found = saver.snapshots.find(saver.ui.say)
        assert found
        assert found.step in (step, step + 1)
        assert not list(saver.snapshots.folder.glob(".tmp-*"))
        assert read_progress(found.folder)["progress"]["step"] == found.step
        if found.step == step:
            assert contents(found.folder) == before
        assert all(torch.equal(one, two) for one, two in zip(trained, weights(saver.engine), strict=True))
        if saver.progress.step != found.step:
            saver.save()
        assert saver.snapshots.steps()[0] == saver.progress.step
    assert not any("corrupted" in line for line in saver.ui.lines)  # type: ignore[attr-defined]
    if kind != "short":
        assert failed > 0.8 * total


def test_a_kill_at_each_call_of_a_save_costs_no_snapshot(
    saver: Saver, tmp_path_factory: pytest.TempPathFactory
) -> None:
    total, step = calls_of_a_save(saver), saver.progress.step
    run, copy = saver.snapshots.run, tmp_path_factory.mktemp("copy") / "run"
    good = saver.snapshots.folder_of(step)
    before = contents(good)
    shutil.copytree(run, copy)
    killed = 0
    for at in range(1, total + 1):

        def save(at: int = at) -> None:
            take_step(saver)
            Faulty(pytest.MonkeyPatch(), at, "exit", saver.snapshots.run)
            saver.save()

        killed += in_a_child(save) == 137
        found = Snapshots(saver.snapshots.run, 2).find(saver.ui.say)
        assert found
        assert found.step in (step, step + 1)
        assert not list(saver.snapshots.folder.glob(".tmp-*"))
        assert contents(good) == before
        shutil.rmtree(run)
        shutil.copytree(copy, run)  # the next save has the same calls
    assert killed == total
    assert not any("corrupted" in line for line in saver.ui.lines)  # type: ignore[attr-defined]


# Damage.

DAMAGES: dict[str, Callable[[Path, Path], Any]] = {
    "missing": lambda path, other: path.unlink(),
    "empty": lambda path, other: path.write_bytes(b""),
    "half": lambda path, other: os.truncate(path, path.stat().st_size // 2),
    "longer": lambda path, other: path.write_bytes(path.read_bytes() + b"}"),
    "zeros": lambda path, other: path.write_bytes(bytes(path.stat().st_size)),  # after a power failure
    "flipped": lambda path, other: path.write_bytes(flipped(path.read_bytes())),
    "of another step": lambda path, other: shutil.copy(other, path),
    "unreadable": lambda path, other: (path.unlink(), path.symlink_to(path)),
}


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


FILES = (
    *("MANIFEST.json", "progress.json", "rng-0.json", METRICS, "state/.metadata", "state/__0_0.distcp"),
    "../../best-step-2/model.safetensors",
)


@pytest.fixture(scope="module")
def two(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two snapshots that differ in every file."""
    saver = make_saver(tmp_path_factory.mktemp("two"), engine)
    for step in (1, 2):
        add_best(saver, step)
        torch.manual_seed(step)
        engine.update(1e-3) if step == 1 else [p.data.add_(1) for p in engine.model.parameters()]
        take_steps(saver, 1)
    return saver.snapshots.run


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_found_and_the_snapshot_before_is_used(
    two: Path, tmp_path: Path, name: str, damage: str
) -> None:
    run = shutil.copytree(two, tmp_path / "run")
    assert {*contents(run / "snapshots/step-00000002"), FILES[-1]} == set(FILES)
    other = run / "snapshots/step-00000001" / name.replace("best-step-2", "best-step-1")
    DAMAGES[damage](run / "snapshots/step-00000002" / name, other)
    (run / "snapshots/damaged-step-00000002/state").mkdir(parents=True)  # of an earlier time
    ui = Lines()
    found = Snapshots(run, 2).find(ui.say)
    assert found
    assert found.step == 1
    assert len(ui.lines) == 1
    assert "step-00000002 is corrupted" in ui.lines[0]
    assert name in ui.lines[0] or name == "MANIFEST.json"  # a bit of its hashes: what they are of
    assert (run / "snapshots/damaged-step-00000002").is_dir()


def test_a_folder_that_has_the_name_of_another_step_is_damaged(two: Path, tmp_path: Path) -> None:
    run = shutil.copytree(two, tmp_path / "run")
    shutil.rmtree(run / "snapshots/step-00000002")
    shutil.copytree(run / "snapshots/step-00000001", run / "snapshots/step-00000002")
    ui = Lines()
    found = Snapshots(run, 2).find(ui.say)
    assert found
    assert found.step == 1
    assert "MANIFEST.json: of step 1" in ui.lines[0]


def test_a_snapshot_of_another_format_is_refused_and_stays(two: Path, tmp_path: Path) -> None:
    run = shutil.copytree(two, tmp_path / "run")
    path = run / "snapshots/step-00000002/MANIFEST.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    before, ui = contents(run), Lines()
    with pytest.raises(RmtoolError) as caught:
        Snapshots(run, 2).find(ui.say)
    assert (caught.value.id, caught.value.exit_code) == ("E0603", 6)
    assert "the snapshot has format 2, this rmtool reads 1" in caught.value.what
    assert "--restart" in caught.value.hint
    assert contents(run) == before


def test_only_complete_folders_with_a_number_count(two: Path, tmp_path: Path) -> None:
    run = shutil.copytree(two, tmp_path / "run")
    (run / "snapshots/step-00000003").mkdir()
    (run / "snapshots/step-copy").mkdir()
    (run / "snapshots/step-copy/MANIFEST.json").write_text("{}")
    shutil.copytree(run / "snapshots/step-00000002", run / "snapshots/step-9")  # as a user may back one up
    assert Snapshots(run, 2).steps() == [2, 1]
    found = Snapshots(run, 2).find(Lines().say)
    assert found
    assert found.step == 2
    assert (run / "snapshots/step-9").exists()


def test_without_a_valid_snapshot_there_is_none(two: Path, tmp_path: Path) -> None:
    run = shutil.copytree(two, tmp_path / "run")
    for path in run.glob("snapshots/*/progress.json"):
        path.unlink()
    ui = Lines()
    assert Snapshots(run, 2).find(ui.say) is None
    assert len(ui.lines) == 2


# Room, and folders that do not work.


def test_the_disk_is_asked_for_room_before_the_first_step(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = make_saver(tmp_path, engine)
    saver.start()
    one = saver.snapshots.size
    monkeypatch.setattr(module, "free_bytes", lambda folder: 3 * one - 1)
    with pytest.raises(RmtoolError) as caught:
        saver.start()
    assert caught.value.id == "E0502"
    assert f"{3 * one:,} bytes" in caught.value.what  # two that are kept, and the next one
    assert f"{3 * one - 1:,} bytes" in caught.value.what
    make_saver(tmp_path, engine, keep_snapshots=1).start()
    make_saver(tmp_path, engine, save_every=None, save_minutes=None).start()  # off
    monkeypatch.undo()
    take_steps(saver, 2)
    monkeypatch.setattr(module, "free_bytes", lambda folder: one)
    saver.start()  # those that are there have their room
    fewer = make_saver(tmp_path, engine, keep_snapshots=1)
    fewer.start()
    monkeypatch.setattr(module, "free_bytes", lambda folder: one - 1)
    with pytest.raises(RmtoolError):
        fewer.start()  # the next one needs room before the others are deleted


def test_a_file_in_place_of_the_folder_is_an_error(engine: Engine, tmp_path: Path) -> None:
    saver = make_saver(tmp_path, engine)
    saver.snapshots.folder.touch()
    with pytest.raises(RmtoolError) as caught:
        saver.start()
    assert (caught.value.id, caught.value.what) == ("E0501", f"cannot write {tmp_path}/snapshots: File exists")


def test_a_snapshot_that_cannot_be_deleted_does_not_count(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, **_: object) -> None:
        next(path for path in folder.iterdir() if path.is_file()).unlink()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(module.shutil, "rmtree", fail)
    take_steps(saver, 1)
    assert saver.snapshots.steps() == [3, 2]
    assert "cannot delete the snapshot of step 1: Input/output error" in saver.ui.lines  # type: ignore[attr-defined]


def test_a_full_disk_while_metrics_are_restored_loses_none(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, data: bytes) -> None:
        path.write_bytes(data[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    take_step(saver)
    before = (saver.snapshots.run / METRICS).read_bytes()
    found = saver.snapshots.find(saver.ui.say)
    assert found
    monkeypatch.setattr("rmtool.training.saver.write_file", fail)
    with pytest.raises(RmtoolError) as caught:
        saver.resume(found, 9)
    assert caught.value.id == "E0501"
    assert (saver.snapshots.run / METRICS).read_bytes() == before


def test_a_run_folder_that_vanished_is_an_error(saver: Saver) -> None:
    shutil.rmtree(saver.snapshots.folder)
    saver.save()  # made again
    shutil.rmtree(saver.snapshots.run)
    with pytest.raises(RmtoolError) as caught:
        saver.save()
    assert (caught.value.id, caught.value.exit_code) == ("E0502", 5)
    assert not saver.snapshots.run.exists()


def test_a_node_that_does_not_see_the_run_folder_is_an_error(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    saver.start()
    monkeypatch.setattr(module, "gather_object", lambda values: [*values, False if values == [True] else values[0]])
    with pytest.raises(RmtoolError) as caught:
        saver.start()
    assert caught.value.id == "E0506"
    assert "rank 1" in caught.value.what
    assert "train.save_minutes=null" in caught.value.hint


def test_a_snapshot_is_due_by_steps_or_by_the_clock(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("rmtool.training.saver.time.monotonic", lambda: now)
    saver = make_saver(tmp_path, engine, save_every=4, save_minutes=10, keep_snapshots=9)
    for _ in range(9):
        now += 200
        take_steps(saver, 1)
    assert saver.snapshots.steps() == [
        8,
        7,
        4,
        3,
    ]  # the clock starts again with each snapshot: at 600, 800, 1400, 1600 s
    off = make_saver(tmp_path, engine, save_every=None, save_minutes=None)
    off.progress.step = 20
    now += 10**6
    assert off.save_if_due() == (0.0, "")
    assert 20 not in off.snapshots.steps()


def test_what_snapshots_cost_is_said_and_they_go_at_the_end(saver: Saver) -> None:
    said = saver.ui.lines  # type: ignore[attr-defined]
    assert said[-1].startswith("snapshot of step 2: ")
    assert all(words in said[-1] for words in ("bytes in", "% of the run's time"))
    saver.finish()
    assert said[-1].startswith("snapshots: 2 written in ")
    assert not saver.snapshots.folder.exists()
    keeps = make_saver(saver.snapshots.run, saver.engine, delete_snapshots=False)
    take_steps(keeps, 1)
    keeps.finish()
    assert keeps.snapshots.steps() == [1]


@pytest.mark.parametrize("due", [False, True])
def test_ranks_whose_clocks_differ_save_together(saver: Saver, due: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is that of all ranks, not of this one's clock."""
    off = make_saver(saver.snapshots.run, saver.engine, save_every=None, save_minutes=10)
    off.saved -= 0 if due else 700
    others = DistInfo(0, 2, lambda values: torch.full_like(values, float(due)))
    monkeypatch.setattr(Engine, "dist", others)
    assert off._due() == due


def test_a_stop_without_snapshots_is_no_preemption(saver: Saver) -> None:
    off = make_saver(saver.snapshots.run, saver.engine, save_every=None, save_minutes=None)
    with pytest.raises(Stopped, match="no snapshot was saved") as caught:
        off.save_before_stop(0, None)
    assert caught.value.exit_code == 143


def test_a_step_that_has_a_snapshot_is_not_saved_again_before_a_stop(saver: Saver) -> None:
    before = contents(saver.snapshots.folder)
    saver.save_before_stop(2, None)
    assert contents(saver.snapshots.folder) == before
    take_step(saver)
    with pytest.raises(AssertionError):
        saver.save_before_stop(2, None)
    saver.save_before_stop(3, {"loss": 1.0})
    assert read_progress(saver.snapshots.folder_of(3))["progress"]["pending"] == {"loss": 1.0}


def test_rows_that_a_full_disk_did_not_take_are_in_the_snapshot(saver: Saver) -> None:
    saver.tracker = tracker = Tracker(saver.snapshots.run, TrackConfig(), {"name": "x"}, saver.ui, resumed=True)
    file, tracker.file = tracker.file, open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - closed below
    tracker.log({"step": 3})
    tracker.file.close()
    tracker.file = file
    saver.progress.step = 3
    saver.save()
    tracker.close()
    assert (saver.snapshots.folder_of(3) / METRICS).read_text().splitlines()[-1] == '{"step": 3}'


def draws() -> list[float]:
    return [torch.rand(1).item(), float(np.random.rand()), random.random()]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_goes_on_with_its_random_numbers(rank: int, saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "dist", DistInfo(rank, 2))
    draws()
    take_steps(saver, 1)
    expected = draws()
    assert draws() != expected
    again, found = make_saver(saver.snapshots.run, saver.engine), saver.snapshots.find(saver.ui.say)
    assert found
    again.resume(found, 9)
    assert draws() == expected
    monkeypatch.setattr(Engine, "dist", DistInfo(2, 3))  # one more than before
    again.resume(found, 9)


def test_a_resumed_run_keeps_the_best_checkpoints_of_snapshots_that_are_intact(saver: Saver) -> None:
    """Of an older snapshot that is damaged, none."""
    run = saver.snapshots.run
    add_best(saver, 2)
    take_steps(saver, 1)
    (saver.snapshots.folder_of(2) / "progress.json").write_text("{")
    again, found = make_saver(run, saver.engine), saver.snapshots.find(saver.ui.say)
    assert found
    assert found.step == 3
    assert (run / "best-step-1").exists()
    again.resume(found, 9)
    assert (run / "best-step-2").exists()
    assert not (run / "best-step-1").exists()
    assert again.seconds_before == again.progress.seconds > 0
