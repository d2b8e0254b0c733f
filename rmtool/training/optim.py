"""The optimizer and its learning-rate schedule, counted in optimizer steps.

In: a model and a `TrainConfig`. Out: AdamW, and for each step a factor on the learning rate.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from rmtool.config import TrainConfig
from rmtool.model.classifier import is_matrix


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what is trainable; weight decay only on matrices (not on norms and biases)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if is_matrix(p)], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if not is_matrix(p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, eps=train.eps, fused=True)


def lr_multiplier(train: TrainConfig, step: int, total: int) -> float:
    """The factor on the learning rate of `step` (from 0) of `total`.

    Warm-up rises from 1/warmup to 1; linear and cosine then fall to 0, reached after the last step.
    """
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return 1.0
    progress = (step - train.warmup_steps) / max(1, total - train.warmup_steps)
    return 1.0 - progress if train.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
