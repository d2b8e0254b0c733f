"""Differences of a trained model's rewards between precisions and between ways to batch responses.

    python scripts/bench/measure_batches.py runs/smollm2-135m --pairs 150

In: a run folder, for its model and its held-out pairs. Out: for each two ways to score them, the differences of the
rewards (root mean square and largest, in standard deviations of the fp32 rewards, and relative to the largest reward)
and the number of pairs whose order changes.
Cost: scores the pairs six times, once response by response.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from benchlib import say

from rmtool.data.formats import preference_record
from rmtool.data.rows import read_rows
from rmtool.model.loading import load_for_inference
from rmtool.model.rewards import compute_rewards
from rmtool.tokenization.tokenized_dataset import tokenize_records
from rmtool.ui import SilentUi

# Precision, prefix sharing, tokens of a pack.
WAYS = {
    "fp32, packs of 8,192": ("fp32", True, 8192),
    "fp32, packs of 600": ("fp32", True, 600),
    "bf16, packs of 8,192": ("bf16", True, 8192),
    "bf16, packs of 600": ("bf16", True, 600),
    "bf16, padded batches": ("bf16", False, 8192),
    "bf16, one at a time": ("bf16", False, 1),
}
EXACT, HALF = "fp32, packs of 8,192", "bf16, packs of 8,192"


def measure(folder: Path, pairs: int) -> dict[str, np.ndarray]:
    """Compute the rewards of the run's first held-out pairs, float[pairs, 2], by way."""
    loaded = load_for_inference(folder / "model", precision="bf16", on_long="error")
    rows = [row for row, _ in zip(read_rows(str(folder / "held_out.jsonl")), range(pairs), strict=False)]
    groups = tokenize_records(loaded.encoder, [preference_record(row) for row in rows], "error", lambda: None).groups
    rewards = {}
    for name, (precision, shares, max_tokens) in WAYS.items():
        loaded.model.precision = precision
        loaded.model.share_prompts(shares)
        rewards[name] = np.array(compute_rewards(loaded.model, groups, max_tokens, SilentUi()))
        say(f"scored: {name}")
    return rewards


def compare(rewards: dict[str, np.ndarray], one: str, other: str) -> str:
    difference, exact = rewards[one] - rewards[other], rewards[EXACT]
    deviation, largest = exact.std(), np.abs(exact).max()
    root, most = np.sqrt((difference**2).mean()), np.abs(difference).max()
    changed = int((np.diff(rewards[one], axis=1) * np.diff(rewards[other], axis=1) <= 0).sum())
    return (
        f"{one} / {other}: rms {root / deviation:.2g}, largest {most / deviation:.2g} standard deviations "
        f"({most / largest:.2g} of the largest reward); {changed} of {len(exact)} pairs change their order"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--pairs", type=int, default=150)
    given = parser.parse_args()
    rewards = measure(given.run, given.pairs)
    compared = [(name, EXACT) for name in WAYS if name != EXACT]
    compared += [(name, HALF) for name in WAYS if name.startswith("bf16") and name != HALF]
    sys.stdout.write("\n".join(compare(rewards, *names) for names in compared) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
