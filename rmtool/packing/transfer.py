"""The copy of a batch to its device.

In: a dataclass with tensors on the CPU, also inside other dataclasses. Out: the same with its tensors on the device.
Cost: one copy into pinned memory, and one from there that the host does not wait for, however many tensors there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch

ALIGNMENT = 64  # bytes: compiled code and kernels load vectors of 16

T = TypeVar("T")


def to_device(batch: T, device: torch.device) -> T:
    """Return `batch` with its tensors on `device`, all of them views of one buffer there."""
    return batch if device.type == "cpu" else _in_one_copy(batch, device, pinned=True)


def _in_one_copy(batch: T, device: torch.device, pinned: bool) -> T:
    tensors = list[torch.Tensor]()
    _map_tensors(batch, tensors.append)
    sizes = (-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)
    *starts, total = itertools.accumulate(sizes, initial=0)

    def part(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
        return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)

    host = torch.empty(total, dtype=torch.uint8, pin_memory=pinned)
    for start, tensor in zip(starts, tensors, strict=True):
        part(host, start, tensor).copy_(tensor)
    there = host.to(device, non_blocking=True)
    views = map(part, itertools.repeat(there), starts, tensors)
    return _map_tensors(batch, lambda _: next(views))


def _map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: _map_tensors(getattr(value, each.name), change) for each in fields(value)})
    return value
