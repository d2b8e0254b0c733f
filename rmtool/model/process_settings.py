"""Settings of this process that make forwards faster or more exact, until the process ends.

In, out: none. Cost: none.
"""

from __future__ import annotations

import ctypes
import os

import torch

from rmtool.model.precision import default_device

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_MALLOC = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_"}


def apply_settings() -> None:
    """Apply all settings."""
    tune_malloc()
    sum_in_fp32()


def tune_malloc() -> None:
    """Let glibc reuse freed memory, on a CPU: it would return blocks over 32 MB to the system, and each layer then pays
    for zeroing new ones (10 to 20% of a forward of 8,192 tokens, scripts/bench/SPEED.md). Does nothing with a
    different C library, or where the user has set MALLOC_ variables.
    """
    library = ctypes.CDLL(None)
    if default_device().type == "cpu" and hasattr(library, "gnu_get_libc_version") and not _MALLOC & os.environ.keys():
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def sum_in_fp32() -> None:
    """Let cuBLAS add up the parts of half-precision products in fp32, as it adds up each part."""
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
