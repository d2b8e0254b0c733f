"""A process's place among those that share work, and how their parts are added up.

In: nothing. Out: `Ranks`; `ALONE` is the one process that does everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ranks:
    """`rank` of `world`; `sum` adds a tensor up over all of them, which all must call."""

    rank: int = 0
    world: int = 1
    sum: Callable[[torch.Tensor], torch.Tensor] = lambda values: values


ALONE = Ranks()
