"""Optimizer and learning-rate schedule.

In: a model and a `TrainConfig`. Out: AdamW, and a multiplier on the learning rate for each optimizer step.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from rmtool.config import TrainConfig
from rmtool.model.classifier import is_matrix


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters; weight decay applies to matrices, not to norms and biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if is_matrix(p)], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if not is_matrix(p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, eps=train.eps, fused=True)


def lr_multiplier(train: TrainConfig, step: int, total: int) -> float:
    """Return the multiplier on the learning rate for `step` (from 0) of `total`.

    It rises from 1/warmup_steps to 1, and then falls linearly or as a cosine to 0 after the last step.
    """
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return 1.0
    progress = (step - train.warmup_steps) / max(1, total - train.warmup_steps)
    return 1.0 - progress if train.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
