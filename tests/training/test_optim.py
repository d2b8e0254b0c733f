"""The optimizer and the learning rate schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rmtool.config import TrainConfig
from rmtool.training.optim import build_optimizer
from rmtool.training.schedule import lr_multiplier

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


def test_the_optimizer_is_the_recipes_and_decays_only_matrices() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    model[0].weight.requires_grad_(True)
    optimizer = build_optimizer(model, replace(TRAIN, weight_decay=0.1, eps=1e-5))
    decays = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {(2, 3): 0.1, (2,): 0.0}
    assert all(group["eps"] == 1e-5 and group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)
