"""The pack budget of a run: train.tokens_per_pack, or half of it and less after the device was out of memory.

In: a run folder and the recipe's tokens_per_pack. Out: the budget to start with. One process halves it and takes the
step again. Several cannot: the other ranks wait in a collective call for the one without memory. It writes the smaller
budget into the run folder and ends; the launcher of a single node starts all processes again, which read it.
Cost: one small file, read once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from rmtool.errors import RmtoolError
from rmtool.training.worker_status import PACK_BUDGET_FILE


def read_pack_budget(folder: Path, tokens_per_pack: int) -> int:
    """Return the budget that a run in this folder left, or `tokens_per_pack` if it left none or had a different one."""
    try:
        left = json.loads((folder / PACK_BUDGET_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return tokens_per_pack
    return int(left["budget"]) if left["tokens_per_pack"] == tokens_per_pack else tokens_per_pack


def write_pack_budget(folder: Path, tokens_per_pack: int, budget: int) -> None:
    """Leave a smaller budget for the next start with the same tokens_per_pack."""
    temporary = folder / f".tmp-{PACK_BUDGET_FILE}-{os.getpid()}"
    temporary.write_text(json.dumps({"tokens_per_pack": tokens_per_pack, "budget": budget}), encoding="utf-8")
    os.replace(temporary, folder / PACK_BUDGET_FILE)


def smaller_budget(plan: Callable[[int], list[list[int]]], budget: int) -> int:
    """Halve the budget until the step's packs change; a pack must have at least two groups."""
    packs = plan(budget)
    while plan(budget) == packs:
        budget //= 2
        assert budget, "packs of one group each have no smaller budget"
    return budget


def ended_out_of_memory(folder: Path, tokens_per_pack: int, budget: int, smaller: int) -> RmtoolError:
    """Leave the smaller budget for the next start, and return the error for this one."""
    hint = f"run the same command again: it continues from the last snapshot with {smaller:,} tokens per pack"
    try:
        write_pack_budget(folder, tokens_per_pack, smaller)
    except OSError:  # the disk may be full, too
        hint = f"set train.tokens_per_pack={smaller}; the steps stay the same"
    return RmtoolError("E0503", f"out of memory at {budget:,} tokens per pack", hint)
