"""Random number generators of a process, as plain data.

In: the generators of torch (CPU and the current GPU), NumPy and Python. Out: JSON, and the same generators set from it.
"""

from __future__ import annotations

import json
import random

import numpy as np
import torch


def rng_state() -> bytes:
    """Return the state of all generators as JSON."""
    name, keys, *position = np.random.get_state()
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
        "numpy": [name, np.asarray(keys).tolist(), *position],
        "python": [version, list(internal), gauss],
    }
    return json.dumps(state).encode()


def set_rng_state(data: bytes) -> None:
    """Set all generators to a state from `rng_state`; that of the GPU if both have one."""
    state = json.loads(data)
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
    name, keys, *position = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *position))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
