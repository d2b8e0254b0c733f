"""The training state: what one engine saved, every engine continues, bit for bit where the engine is the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pair_rows, write_jsonl
from test_engine import free_port

WORKER = Path(__file__).parent / "state_worker.py"
WORLDS = ("single-1", "ddp-2", "zero2-2", "zero2-2-offload", "zero3-2", "zero3-2-offload", "zero3-4")
STEPS = 5


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


class Place:
    """A folder with a model, data, and what the runs of a recipe saved and computed, each run once."""

    def __init__(self, folder: Path, causal_lm: Path, more: str = "", bf16: bool = False):
        self.folder, self.more, self.bf16 = folder, more, bf16
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
        count, port = int(world.split("-")[1]), str(free_port())
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        if count > 1 or world.startswith("zero"):
            environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment |= {"ACCELERATE_USE_CPU": str(world.startswith("ddp")).lower()}
        plan = json.dumps({"parts": parts, "bf16": self.bf16})
        words = [sys.executable, str(WORKER), self.recipe(world), plan, str(self.folder)]
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {} for rank in range(count)]
        running = [
            subprocess.Popen(words, env=environment | rank, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for rank in ranks
        ]
        shown = [process.communicate(timeout=250)[0] for process in running]
        assert not any(process.returncode for process in running), "\n".join(shown)
        return [torch.load(self.folder / f"{part['name']}.pt") for part in parts]

    def saved(self, world: str) -> Path:
        """The state after STEPS steps; beside it, what was saved, and the same run's next STEPS steps."""
        folder = self.folder / f"state-{world}"
        if not folder.exists():
            self.run(
                world,
                {"name": f"{world}-saved", "steps": (0, STEPS), "save": str(folder)},
                {"name": f"{world}-next", "steps": (STEPS, 2 * STEPS)},
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
                  {"name": f"{name}-next", "steps": (STEPS, 2 * STEPS)}]  # fmt: skip
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
def place(tmp_path_factory: pytest.TempPathFactory, causal_lm: Path) -> Place:
    return Place(tmp_path_factory.mktemp("states"), causal_lm)


@pytest.mark.parametrize(
    ("world", "sources"),
    [
        ("ddp-2", ("ddp-2", "single-1")),
        slow("single-1", ("single-1", *WORLDS[1:])),
        *(slow(world, (world, *(other for other in WORLDS if other != world))) for world in WORLDS[1:]),
    ],
)
def test_every_engine_continues_what_every_engine_saved(place: Place, world: str, sources: tuple[str, ...]) -> None:
    check(place, world, sources)
