"""Commands without the packages that few of them need, as on an image for GPUs or on macOS."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from helpers import PROGRAM, pair_rows, write_jsonl

MISSING = ("deepspeed", "liger_kernel", "wandb", "datasets", "peft", "tensorboard", "bitsandbytes")
# At the start of every process: neither a module nor a distribution of these names is found.
HIDE = f"""
import sys
from importlib.machinery import PathFinder
MISSING = {MISSING!r}
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, *others):
        return None if name.partition(".")[0] in MISSING else super().find_spec(name, *others)
    @classmethod
    def find_distributions(cls, *context):
        found = super().find_distributions(*context)
        return (each for each in found if (each.metadata["Name"] or "").replace("-", "_") not in MISSING)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


@pytest.fixture
def without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder to run commands in."""
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "sitecustomize.py").write_text(HIDE)
    paths = [str(tmp_path / "startup"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return tmp_path


def shell(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, cwd=folder)


@pytest.mark.slow
def test_train_eval_and_score_run(without: Path) -> None:
    data = write_jsonl(without / "pairs.jsonl", pair_rows(20))
    settings = ["--set", "data.holdout=4", "--set", "train.max_steps=2", "--set", "train.save_every=1"]
    done = shell(without, "train", "--data", str(data), *settings, "--set", "train.delete_snapshots=false")
    assert done.returncode == 0, done.stderr
    assert (without / "runs/debug/model/model.safetensors").exists()
    evaluated = shell(without, "eval", "runs/debug", "--json")
    assert json.loads(evaluated.stdout)["pairs"] == 4, evaluated.stderr
    responses = write_jsonl(without / "responses.jsonl", [{"prompt": "a", "response": "b"}] * 20)
    scored = shell(without, "score", str(responses), "--model", "runs/debug", "--output", "scored.jsonl")
    assert scored.returncode == 0, scored.stderr
    assert len((without / "scored.jsonl").read_text().splitlines()) == 20
    two = shell(without, "train", "--data", str(data), *settings, "--gpus-per-node", "2", "--output", "two")
    assert two.returncode == 0, two.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "package"),
    [
        ("track.wandb=true", "wandb"),
        ("track.tensorboard=true", "tensorboard"),
        ("lora.rank=2", "peft"),
        ("launch.engine=zero2", "deepspeed"),
        ("data.train=[owner/name]", "datasets"),
    ],
)
def test_a_package_that_a_setting_requires_is_named_before_anything_starts(
    setting: str, package: str, without: Path
) -> None:
    (without / "wandb").mkdir()  # a folder of this name is not the package
    done = shell(without, "train", "--set", setting)
    assert done.returncode == 5, done.stderr
    assert f"requires {package}, but it is not installed" in " ".join(done.stderr.split())
    assert f"run pip install {package}, or" in " ".join(done.stderr.split())
    assert not (without / "runs/debug/rank-0.json").exists()
