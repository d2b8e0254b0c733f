"""Optimizer.

In: a model and a `TrainConfig`. Out: AdamW over its trainable parameters.
"""

from __future__ import annotations

import torch
from torch import nn

from rmtool.config import TrainConfig
from rmtool.model.classifier import is_matrix


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """List the parameters that get gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters; weight decay applies to matrices, not to norms and biases."""
    parameters = trainable(model)
    groups = [
        {"params": [p for p in parameters if is_matrix(p)], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if not is_matrix(p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, eps=train.eps, fused=True)
