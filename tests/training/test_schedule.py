"""Learning rates over the steps of a run, and settings that these steps cannot reach."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import pair_rows, write_jsonl
from transformers import TrainingArguments, get_scheduler

from rmtool.config import TrainConfig
from rmtool.errors import RmtoolError
from rmtool.recipe import CONFIG_FILE, dump_recipe, load_recipe
from rmtool.training import worker
from rmtool.training.schedule import Schedule, lr_multiplier, require_reachable, warmup_steps
from rmtool.ui import SilentUi

TRAIN = TrainConfig(batch_size=4, learning_rate=1e-3)


def test_warm_up_counts_optimizer_steps_once_and_the_fall_ends_at_zero() -> None:
    linear = replace(TRAIN, warmup_steps=4)
    factors = [lr_multiplier(linear, step, 10) for step in range(11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[7] == pytest.approx(0.5)
    assert factors[10] == 0.0
    cosine = replace(TRAIN, schedule="cosine")
    assert lr_multiplier(cosine, 0, 10) == 1.0
    assert lr_multiplier(cosine, 5, 10) == pytest.approx(0.5)
    assert lr_multiplier(replace(TRAIN, schedule="constant"), 9, 10) == 1.0


@pytest.mark.parametrize("total", [1, 3, 9, 130])
@pytest.mark.parametrize("ratio", [0.03, 0.1, 1 / 3, 0.9])
def test_a_ratio_is_as_many_steps_as_in_transformers(total: int, ratio: float, tmp_path: Path) -> None:
    theirs = TrainingArguments(str(tmp_path), warmup_steps=ratio, use_cpu=True).get_warmup_steps(total)
    assert warmup_steps(replace(TRAIN, warmup_ratio=ratio), total) == theirs


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_after_the_warmup_learning_rates_are_those_of_transformers(schedule: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=4, num_training_steps=10)
    train = replace(TRAIN, schedule=schedule, warmup_steps=4)
    for step in range(10):
        if step >= 4:
            assert lr_multiplier(train, step, 10) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_the_highest_and_last_value_are_those_of_the_curve(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {path: m}\ndata: {train: [x]}\ntrain: {batch_size: 8, learning_rate: 1e-3, epochs: 3}\n")
    schedule = Schedule(load_recipe(str(path), [("train.warmup_ratio", 0.2)]), 22)
    curve = [1e-3 * lr_multiplier(schedule.recipe.train, step, 9) for step in range(9)]
    assert (schedule.steps, schedule.warmup) == (9, 2)
    assert (schedule.highest_lr, schedule.last_lr) == (max(curve), curve[-1])


@pytest.mark.parametrize(
    ("settings", "reachable"),
    [
        ({"warmup_steps": 9}, True),
        ({"warmup_steps": 10}, False),
        ({"eval_every": 2, "early_stopping_patience": 3}, True),  # the fourth evaluation is after step 8
        ({"eval_every": 3, "early_stopping_patience": 2}, False),  # the third one is the last step
    ],
)
def test_what_nine_steps_can_reach(settings: dict[str, int], reachable: bool) -> None:
    train = replace(TRAIN, **settings)  # type: ignore[arg-type]
    if reachable:
        require_reachable(train, 9)
    else:
        with pytest.raises(RmtoolError) as caught:
            require_reachable(train, 9)
        assert caught.value.id == "E0209"


def test_the_training_process_checks_the_steps_of_the_pairs_that_are_left(causal_lm: Path, tmp_path: Path) -> None:
    """As for a Hub dataset, whose pairs the launcher does not count."""
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(4))
    path = tmp_path / CONFIG_FILE
    path.write_text(
        f"name: x\nmodel: {{path: {causal_lm}}}\ndata: {{train: [{data}]}}\n"
        "train: {batch_size: 2, learning_rate: 1e-3, warmup_steps: 3}\n"
    )
    recipe = load_recipe(str(path))
    assert load_recipe(str(path), [("train.warmup_ratio", 0.5)]).train.warmup_steps == 0
    assert "warmup_steps: 3" in dump_recipe(recipe)
    with pytest.raises(RmtoolError) as caught:
        worker.run(recipe, tmp_path, Accelerator(cpu=True), SilentUi())
    assert caught.value.id == "E0209"
