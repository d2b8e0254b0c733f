"""Rank, world size, sum and maximum over ranks, without torch.distributed in the signatures that need them.

In: nothing. Out: `DistInfo`; `SINGLE_PROCESS` for a single process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DistInfo:
    """`rank` of `world_size` processes; `sum` adds a tensor over all ranks, `max` returns the largest of their values
    (NaN counts as inf). All ranks must call them.
    """

    rank: int = 0
    world_size: int = 1
    sum: Callable[[torch.Tensor], torch.Tensor] = lambda values: values
    max: Callable[[float], float] = lambda value: value


SINGLE_PROCESS = DistInfo()
