"""Out of memory: which exceptions say so, and forwards that return instead of raising them.

In: a function that computes on the device. Out: its result, or None.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from rmtool.errors import Place, RmtoolError

# torch raises a plain RuntimeError when malloc fails; what comes before these words is a line of its source.
_CPU = re.compile(r"\[enforce fail at alloc_cpu\.cpp:\d+\] .*DefaultCPUAllocator: can't allocate memory")
# The CUDA runtime's and NCCL's, in errors of other types than the allocator's, and cuBLAS's for its workspace.
_CUDA = re.compile(r"CUDA error: out of memory|Cuda failure.*'out of memory'")
_CUBLAS = re.compile(r"CUDA error: CUBLAS_STATUS_ALLOC_FAILED")

T = TypeVar("T")


class PackOutOfMemoryError(RmtoolError):
    """The device is out of memory in a forward over the groups with these `indices`."""

    def __init__(self, indices: Sequence[int], tokens: int):
        super().__init__("E0503", "out of memory in a forward pass", "lower train.tokens_per_pack")
        self.indices, self.tokens = indices, tokens


def row_out_of_memory(place: Place, tokens: int) -> RmtoolError:
    """Return the error for a row that alone is too much: smaller packs do not help."""
    hint = "lower data.max_length, or set train.gradient_checkpointing=true"
    return RmtoolError("E0503", f"out of memory in a row of {tokens:,} tokens", hint, place)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch raised this because the GPU or the host is out of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, torch.AcceleratorError | torch.distributed.DistBackendError):
        return bool(_CUDA.search(str(error)))
    return type(error) is RuntimeError and bool(_CPU.match(str(error)) or _CUBLAS.match(str(error)))


def unless_out_of_memory(run: Callable[[], T]) -> T | None:
    """Return what `run` returns, or None when it is out of memory.

    The exception is gone by then: its frames hold the activations, which must be freed before the next try.
    """
    try:
        return run()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None
