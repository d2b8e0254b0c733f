"""Complete runs of `rmtool train`, killed at random instants: launcher, one rank or all; they end in the same run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import PROGRAM, SHARED, logged_steps, pair_rows, started_by, until, write_jsonl
from same_run import assert_same_run

CACHE = Path.home() / ".cache" / "rmtool"
HH = SHARED / "data" / "hh-rlhf-harmless-base.test.jsonl.gz"


class Command:
    """`rmtool train` in its own process group, and what it started."""

    def __init__(self, words: list[str], log: Path):
        self.log = open(log, "ab")  # noqa: SIM115 - closed by wait
        self.process = subprocess.Popen(words, stdout=self.log, stderr=self.log, start_new_session=True)

    def started(self) -> list[psutil.Process]:
        return started_by(self.process.pid)

    def kill(self, draw: random.Random) -> str:
        """Kill the launcher, one training process, or all; wait until nothing of it is left."""
        ranks = [each for each in self.started() if "RANK" in each.info["environ"]]
        kind = draw.choice(("launcher", "rank", "all") if ranks else ("launcher", "all"))
        victims = [self.process.pid] if kind != "rank" else []
        victims += [each.pid for each in self.started()] if kind == "all" else []
        victims += [draw.choice(ranks).pid] if kind == "rank" else []
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(60)
        until(lambda: not self.started(), 60)
        self.log.close()
        return kind

    def wait(self) -> None:
        code = self.process.wait()
        self.log.close()
        assert code == 0, Path(self.log.name).read_text()[-3000:]


def train_killed(words: list[str], root: Path, kills: int, seed: int) -> dict[str, Any]:
    """Train `alone` without a kill, then `killed` with so many; return what happened."""
    begun = time.monotonic()
    alone = Command([*words, "--output", str(root / "alone")], root / "alone.log")
    until(lambda: logged_steps(root / "alone") > 0 or alone.process.poll() is not None, 600)
    start_s = time.monotonic() - begun
    alone.wait()
    total, seconds = logged_steps(root / "alone"), time.monotonic() - begun
    draw, kinds, killed = random.Random(seed), list[str](), root / "killed"
    words = [*words, "--output", str(killed)]
    while len(kinds) < kills:
        run, before = Command(words, root / "killed.log"), logged_steps(killed)
        end, last_step = time.monotonic() + draw.uniform(0, start_s), 0.0
        if draw.random() < 0.7:  # in the steps; else more likely before the first one
            last_step = before + draw.uniform(0, 1.4 * total / (kills + 1))
        while logged_steps(killed) < last_step if last_step else time.monotonic() < end:
            assert run.process.poll() is None, (root / "killed.log").read_text()[-3000:]
            time.sleep(0.01)
        time.sleep(draw.uniform(0, (seconds - start_s) / total))
        kinds.append(run.kill(draw))
    Command(words, root / "killed.log").wait()
    assert_same_run(killed, root / "alone")
    said = (root / "killed.log").read_text(errors="replace")
    return {"kills": kinds, "resumed": said.count("resuming from step"), "steps": total, "seconds": round(seconds)}


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_ten_kills_of_two_processes_end_in_the_same_run(engine: str, tmp_path: Path, causal_lm: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(60))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"model: {{path: {causal_lm}}}\n"
        f"data: {{train: [{data}], holdout: 12, max_length: 256}}\n"
        "train: {batch_size: 4, learning_rate: 1e-3, epochs: 20, eval_every: 20, tokens_per_pack: 240, "
        "precision: fp32, save_every: 3, keep: best}\n"
        f"launch: {{engine: {engine}, gpus_per_node: 2}}\n"
    )
    found = train_killed([str(PROGRAM), "train", "--recipe", str(recipe)], tmp_path, kills=10, seed=15)
    print(engine, found)  # noqa: T201 - the figure
    assert found["resumed"] >= 3  # the others were killed before their steps


@pytest.mark.chaos
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("kills", [int(os.environ.get("RMTOOL_KILLS", "5"))])
def test_kills_of_a_real_model_on_real_pairs_end_in_the_same_run(kills: int, tmp_path: Path) -> None:
    """With the precision that the CPU is fast in; the eval metrics are the same to the last digit."""
    model = CACHE / "SmolLM2-135M-Instruct"
    if not (model.exists() and HH.exists()):
        pytest.skip("needs ../shared and the model of tests/test_real.py")
    sets = {"data.holdout": 60, "train.max_steps": 24, "train.eval_every": 8, "train.save_every": 3,
            "train.precision": "bf16", "train.keep": "best"}  # fmt: skip
    sets |= {"data.max_length": 512, "data.on_long": "drop"}
    words = [str(PROGRAM), "train", "--recipe", "smollm2-135m", "--model", str(model), "--data", str(HH)]
    words += [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
    found = train_killed(words, tmp_path, kills, seed=16)
    print(found, (tmp_path / "killed/metrics.jsonl").read_text().splitlines()[-1])  # noqa: T201 - the figure
    assert found["resumed"] >= kills // 2
