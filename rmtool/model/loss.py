"""Losses of preference pairs.

In: rewards float32[B] of the chosen and of the rejected response of each pair. Out: the loss of each pair, float32[B].
The caller divides the sum by the global number of pairs in the step, so that no cut into packs or ranks changes it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rmtool.config import TrainConfig


def bradley_terry(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | None = None, smoothing: float = 0.0
) -> torch.Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin), float32[B] (Ouyang et al., arXiv 2203.02155, p. 8, eq. 1; the
    margin: Touvron et al., arXiv 2307.09288, p. 11, eq. 2).

    With `smoothing` e it is (1 - e) times that plus e times the loss of the pair turned round: the expected loss
    where a share e of the labels is wrong.

    `chosen`, `rejected` and `margin` are float[B]; a shape of [B, 1] would broadcast to [B, B] and is refused.
    """
    difference = _difference(chosen, rejected, margin)
    loss = -F.logsigmoid(difference)
    # -log sigmoid(-d) = d - log sigmoid(d)
    return loss + smoothing * difference if smoothing else loss


def hinge(chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | None = None) -> torch.Tensor:
    """max(0, 1 - (r_chosen - r_rejected - margin)), float32[B]: nothing more to learn once the pair is 1 apart."""
    return F.relu(1 - _difference(chosen, rejected, margin))


def pair_losses(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | None, train: TrainConfig
) -> torch.Tensor:
    """The recipe's loss of each pair, float32[B]: `train.loss`, plus `train.center_rewards_coefficient`
    times (r_chosen + r_rejected)^2, which holds rewards around 0 (Eisenstein et al., arXiv 2312.09244, section 3).
    """
    losses = (
        hinge(chosen, rejected, margin)
        if train.loss == "hinge"
        else bradley_terry(chosen, rejected, margin, train.label_smoothing)
    )
    return (
        losses + train.center_rewards_coefficient * (chosen + rejected) ** 2
        if train.center_rewards_coefficient
        else losses
    )


def _difference(chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | None) -> torch.Tensor:
    assert chosen.shape == rejected.shape
    assert chosen.ndim == 1
    if margin is None:
        return chosen - rejected
    assert margin.shape == chosen.shape
    return chosen - rejected - margin
