"""The Bradley-Terry loss of preference pairs.

In: rewards float32[B] of the chosen and of the rejected response of each pair. Out: the loss of each pair, float32[B].
The caller divides the sum by the global number of pairs in the step, so that no cut into packs or ranks changes it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def bradley_terry(chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | None = None) -> torch.Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin), float32[B] (Ouyang et al., arXiv 2203.02155, p. 8, eq. 1; the
    margin: Touvron et al., arXiv 2307.09288, p. 11, eq. 2).

    `chosen`, `rejected` and `margin` are float[B]; a shape of [B, 1] would broadcast to [B, B] and is refused.
    """
    assert chosen.shape == rejected.shape
    assert chosen.ndim == 1
    difference = chosen - rejected
    if margin is not None:
        assert margin.shape == difference.shape
        difference = difference - margin
    return -F.logsigmoid(difference)
