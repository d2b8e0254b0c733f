"""Losses of preference pairs.

In: rewards of the chosen and the rejected response of each pair, float32[B]. Out: the loss of each pair, float32[B].
The caller divides their sum by the global batch size, so that packs and ranks do not change it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rmtool.config import TrainConfig


def bradley_terry(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | None = None, smoothing: float = 0.0
) -> torch.Tensor:
    """Compute -log sigmoid(r_chosen - r_rejected - margin), float32[B] (Ouyang et al., arXiv 2203.02155, p. 8, eq. 1;
    the margin: Touvron et al., arXiv 2307.09288, p. 11, eq. 2).

    With `smoothing` e it is (1 - e) times that plus e times the loss of the swapped pair: the expected loss where a
    fraction e of the labels is wrong. Inputs must be float[B]; [B, 1] would broadcast to [B, B].
    """
    difference = _difference(chosen, rejected, margin)
    loss = -F.logsigmoid(difference)
    # -log sigmoid(-d) = d - log sigmoid(d)
    return loss + smoothing * difference if smoothing else loss


def hinge(chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | None = None) -> torch.Tensor:
    """Compute max(0, 1 - (r_chosen - r_rejected - margin)), float32[B]: zero once the rewards are 1 apart."""
    return F.relu(1 - _difference(chosen, rejected, margin))


def pair_losses(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | None, train: TrainConfig
) -> torch.Tensor:
    """Compute the recipe's loss of each pair, float32[B]: `train.loss`, plus `train.center_rewards_coefficient` times
    (r_chosen + r_rejected)^2, which keeps rewards around 0 (Eisenstein et al., arXiv 2312.09244, section 3).
    """
    if train.loss == "hinge":
        losses = hinge(chosen, rejected, margin)
    else:
        losses = bradley_terry(chosen, rejected, margin, train.label_smoothing)
    if not train.center_rewards_coefficient:
        return losses
    return losses + train.center_rewards_coefficient * (chosen + rejected) ** 2


def _difference(chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | None) -> torch.Tensor:
    assert chosen.shape == rejected.shape
    assert chosen.ndim == 1
    if margin is None:
        return chosen - rejected
    assert margin.shape == chosen.shape
    return chosen - rejected - margin
