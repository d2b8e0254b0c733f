"""The optimizer."""

from __future__ import annotations

from dataclasses import replace

import torch

from rmtool.config import TrainConfig
from rmtool.training.optim import build_optimizer

TRAIN = TrainConfig(batch_size=4, learning_rate=1e-3)


def test_the_optimizer_is_the_recipes_and_decays_only_matrices() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    model[0].weight.requires_grad_(True)
    optimizer = build_optimizer(model, replace(TRAIN, weight_decay=0.1, eps=1e-5))
    decays = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {(2, 3): 0.1, (2,): 0.0}
    assert all(group["eps"] == 1e-5 and group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)
