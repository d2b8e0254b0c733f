"""What a run is computed with: versions, devices and processes, for trackers.

In: an Accelerator. Out: plain data.
"""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
from accelerate import Accelerator

from rmtool.packages import version_of

PACKAGES = ("rmtool", "torch", "transformers", "accelerate", "deepspeed")


def versions() -> dict[str, str | None]:
    """Versions of the packages that training depends on; None for one that is not installed."""
    return {name: version_of(name) for name in PACKAGES}


def system_figures(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, the world size, and the devices of this node."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "versions": {"python": platform.python_version(), **versions()},
        "world_size": accelerator.num_processes,
        "devices": gpus or [f"CPU, {len(os.sched_getaffinity(0))} cores"],
    }
