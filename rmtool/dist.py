"""A process's place among those that share work, and how their parts are added up.

In: nothing. Out: `DistInfo`; `SINGLE_PROCESS` is the one process that does everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DistInfo:
    """`rank` of `world_size`; `sum` adds a tensor up over all of them, which all must call."""

    rank: int = 0
    world_size: int = 1
    sum: Callable[[torch.Tensor], torch.Tensor] = lambda values: values


SINGLE_PROCESS = DistInfo()
