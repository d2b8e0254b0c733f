"""The training state: what one engine saved, every engine continues, bit for bit where the engine is the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import free_port, pair_rows, write_jsonl
from state_worker import Run

from rmtool.errors import RmtoolError
from rmtool.training import training_state
from rmtool.training.training_state import load_state, save_state, state_bytes

WORKER = Path(__file__).parent.parent / "state_worker.py"
WORLDS = ("single-1", "ddp-2", "fsdp2-3", "zero2-2", "zero2-2-offload", "zero3-2", "zero3-2-offload", "zero3-4")
STEPS, NEXT = 5, 25  # after which a state is saved; until which a run goes on


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


class Place:
    """A folder with a model, data, and what the runs of a recipe saved and computed, each run once."""

    def __init__(self, folder: Path, causal_lm: Path, more: str = "", bf16: bool = False, worker: Any = None):
        self.folder, self.more, self.bf16, self.worker = folder, more, bf16, worker
        folder.mkdir(exist_ok=True)
        shutil.copytree(causal_lm, folder / "lm")
        write_jsonl(folder / "pairs.jsonl", pair_rows(41))

    def recipe(self, world: str) -> str:
        engine, processes, *offload = world.split("-")
        offloaded = str(bool(offload)).lower()
        path = self.folder / f"{world}.yaml"
        path.write_text(
            f"model: {{path: {self.folder / 'lm'}}}\n"
            f"data: {{train: [{self.folder / 'pairs.jsonl'}], holdout: 4, max_length: 256}}\n"
            f"train: {{batch_size: 8, tokens_per_pack: 150, precision: {'bf16' if self.bf16 else 'fp32'}, "
            f"weight_decay: 0.1, learning_rate: 1e-3{self.more}}}\n"
            f"launch: {{engine: {engine}, gpus_per_node: {processes}, offload_optimizer: {offloaded}}}\n"
        )
        return str(path)

    def run(self, world: str, *parts: dict[str, Any]) -> list[dict[str, Any]]:
        """Run these parts in one new group of processes; return their results."""
        count, environment = int(world.split("-")[1]), {}
        if count > 1 or world.startswith("zero"):
            environment = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            environment |= {"ACCELERATE_USE_CPU": str(not world.startswith("zero")).lower()}
        recipe = self.recipe(world)
        plan = {"recipe": recipe, "ranks": count, "parts": parts, "bf16": self.bf16, "folder": str(self.folder),
                "environment": environment}  # fmt: skip
        assert self.worker is not None
        self.worker.stdin.write(json.dumps(plan) + "\n")
        self.worker.stdin.flush()
        failed = int(next(line for line in self.worker.stdout if line.startswith("failed:")).split()[1])
        logs = (Path(f"{recipe}-{rank}.log").read_text()[-4000:] for rank in range(count))
        assert not failed, "\n".join(logs)
        return [torch.load(self.folder / f"{part['name']}.pt") for part in parts]

    def saved(self, world: str) -> Path:
        """The state after STEPS steps; beside it, what was saved, and the same run's next STEPS steps."""
        folder = self.folder / f"state-{world}"
        if not folder.exists():
            self.run(
                world,
                {"name": f"{world}-saved", "steps": (0, STEPS), "save": str(folder)},
                {"name": f"{world}-next", "steps": (STEPS, NEXT)},
            )
        return folder

    def result(self, name: str) -> dict[str, Any]:
        return torch.load(self.folder / f"{name}.pt")


def assert_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Weights, moments and steps, and the weights that every rank computes with."""
    assert one["state"].keys() == two["state"].keys()
    for name, value in one["state"].items():
        assert torch.equal(value, two["state"][name]), name
    assert all(rank == one["live"][0] for rank in (*one["live"], *two["live"]))


def check(place: Place, world: str, sources: tuple[str, ...], tolerance: float = 1e-5) -> None:
    """In a new group of processes, load the state of each source and continue as it did."""
    parts = []
    for source in sources:
        state = str(place.saved(source))
        name = f"{world}-from-{source}"
        parts += [{"name": f"{name}-loaded", "load": state, "steps": (0, 0)},
                  {"name": f"{name}-next", "steps": (STEPS, NEXT)}]  # fmt: skip
    results = place.run(world, *parts)
    for source, loaded, after in zip(sources, results[::2], results[1::2], strict=True):
        saved, expected = place.result(f"{source}-saved"), place.result(f"{source}-next")
        assert_equal(loaded, saved)
        assert not torch.equal(saved["state"]["classifier.score.weight"], expected["state"]["classifier.score.weight"])
        assert set(saved["state"]["optimizer_steps"].tolist()) == {STEPS}
        if source == world:
            assert after["losses"] == expected["losses"]
            assert_equal(after, expected)
        else:
            assert after["losses"] == pytest.approx(expected["losses"], abs=8 * tolerance)  # sums over 8 pairs


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1",
                   "RMTOOL_CACHE": str(tmp_path_factory.mktemp("cache"))}  # fmt: skip
    running = subprocess.Popen(
        [sys.executable, str(WORKER)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    yield running
    os.killpg(running.pid, signal.SIGKILL)  # with ranks of a test that ran out of time
    running.wait()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, causal_lm: Path, worker: Any) -> Place:
    return Place(tmp_path_factory.mktemp("states"), causal_lm, worker=worker)


@pytest.mark.timeout(1200)  # the first one runs every world
@pytest.mark.parametrize(
    ("world", "sources"),
    [
        slow("ddp-2", ("ddp-2", "single-1")),
        slow("single-1", ("single-1", *WORLDS[1:])),
        *(slow(world, (world, *(other for other in WORLDS if other != world))) for world in WORLDS[1:]),
    ],
)
def test_every_engine_continues_what_every_engine_saved(place: Place, world: str, sources: tuple[str, ...]) -> None:
    check(place, world, sources)


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", ["single-1", "ddp-2", "fsdp2-3", "zero2-2", "zero3-2"])
def test_a_run_in_bf16_continues_too(tmp_path: Path, causal_lm: Path, worker: Any, world: str) -> None:
    """Also on a CPU without instructions for it, where rmtool would compute in fp32. ZeRO sends bf16, DDP fp32."""
    check(Place(tmp_path, causal_lm, bf16=True, worker=worker), world, (world, "zero3-4"), tolerance=2e-2)


def continued(place: Place, folder: Path, before: int) -> tuple[list[float], list[float], list[str]]:
    """Losses of the steps after a state was saved, and in a new model that loaded it; and the names in the state."""
    first = Run.start(place.recipe("single-1"))
    first.steps(0, before)
    save_state(first.trainer.engine, folder)
    expected = first.steps(before, before + STEPS)
    again = Run.start(place.recipe("single-1"))
    load_state(again.trainer.engine, folder)
    losses = again.steps(before, before + STEPS)
    assert_equal(again.contents(), first.contents())
    return losses, expected, list(first.contents()["state"])


@pytest.mark.parametrize("before", [0, 3])
def test_one_process_continues_bit_for_bit_also_from_before_its_first_step(
    tmp_path: Path, causal_lm: Path, before: int
) -> None:
    losses, expected, _ = continued(Place(tmp_path, causal_lm), tmp_path / "state", before)
    assert losses == expected


@pytest.mark.parametrize(
    ("more", "name", "tensors"),
    [("}\nlora: {rank: 4", "lora_A", 2 * 7 * 2 + 1), (", freeze: backbone", "score", 1)],  # 7 matrices in 2 layers
)
def test_only_trainable_parameters_are_saved(
    tmp_path: Path, causal_lm: Path, more: str, name: str, tensors: int
) -> None:
    losses, expected, names = continued(Place(tmp_path, causal_lm, more), tmp_path / "state", 3)
    assert losses == expected
    assert len(names) == 3 * tensors + 1
    assert sum(name in each for each in names) >= 3


def test_loading_replaces_a_state_of_later_steps(place: Place, tmp_path: Path) -> None:
    run = Run.start(place.recipe("single-1"))
    run.steps(0, 2)
    save_state(run.trainer.engine, tmp_path / "state")
    saved = run.contents()
    later = run.steps(2, 4)
    load_state(run.trainer.engine, tmp_path / "state")
    assert_equal(run.contents(), saved)
    assert run.steps(2, 4) == later


def test_a_state_before_the_first_step_is_what_adamw_creates(place: Place) -> None:
    """Keys, dtypes and shapes; torch has no function that creates it without a step."""
    run = Run.start(place.recipe("single-1"))
    weight = run.trainer.model.backbone.layers[0].mlp.up_proj.weight
    created = training_state._state(torch.optim.AdamW([weight], fused=True), weight)
    weight.grad, optimizer = torch.zeros_like(weight), torch.optim.AdamW([weight], fused=True)
    optimizer.step()
    kinds = [{key: (v.dtype, v.shape, v.stride(), v.device) for key, v in each.items()}
             for each in (created, optimizer.state[weight])]  # fmt: skip
    assert kinds[0] == kinds[1]


def test_state_bytes_is_what_is_written(place: Place, tmp_path: Path) -> None:
    run = Run.start(place.recipe("single-1"))
    save_state(run.trainer.engine, tmp_path / "state")
    written = sum(path.stat().st_size for path in (tmp_path / "state").iterdir())
    tensors = 3 * sum(1 for _ in run.trainer.model.parameters()) + 1
    assert 0 < written - state_bytes(run.trainer.engine) < 2500 * tensors  # torch.save's headers, and DCP's index


def test_a_state_of_other_parameters_is_not_loaded(tmp_path: Path, causal_lm: Path) -> None:
    place = Place(tmp_path, causal_lm)
    run = Run.start(place.recipe("single-1"))
    save_state(run.trainer.engine, tmp_path / "state")
    del run.trainer.model.backbone.layers[1]  # fewer parameters than the state has
    fewer = raised(run, tmp_path / "state")
    assert "classifier.model.layers.1." in fewer.what
    assert (fewer.id, fewer.exit_code) == ("E0604", 6)
    assert fewer.found is not None
    assert fewer.found.endswith("none in the model")
    place.more = ", freeze: backbone"
    frozen = Run.start(place.recipe("single-1"))
    save_state(frozen.trainer.engine, tmp_path / "frozen")
    more = raised(Run.start(Place(tmp_path / "all", causal_lm).recipe("single-1")), tmp_path / "frozen")
    assert more.found is not None
    assert more.found.startswith("none in the state")
    head = frozen.trainer.model.classifier.score
    head.weight.data = head.weight.data[:, :-1]
    frozen.trainer.engine.optimizer.optimizer.state.clear()
    assert raised(frozen, tmp_path / "frozen").found == "32 elements in the state, 31 elements in the model"


def raised(run: Run, folder: Path) -> RmtoolError:
    with pytest.raises(RmtoolError) as caught:
        load_state(run.trainer.engine, folder)
    return caught.value


def test_a_disk_that_fails_is_named(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.start(place.recipe("single-1"))
    (tmp_path / "file").touch()
    with pytest.raises(RmtoolError) as caught:
        save_state(run.trainer.engine, tmp_path / "file" / "state")
    assert (caught.value.id, caught.value.found) == (
        "E0502",
        f"rank 0: [Errno 20] Not a directory: '{tmp_path}/file/state'",
    )
    assert raised(run, tmp_path / "nothing").id == "E0501"
    save_state(run.trainer.engine, tmp_path / "state")
    next((tmp_path / "state").glob("*.distcp")).unlink()
    assert raised(run, tmp_path / "state").id == "E0501"


def test_every_file_is_synced(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, synced, sync = Run.start(place.recipe("single-1")), set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), sync(file)))
    save_state(run.trainer.engine, tmp_path / "state")
    assert synced == {path.stat().st_ino for path in (tmp_path / "state").iterdir()}
