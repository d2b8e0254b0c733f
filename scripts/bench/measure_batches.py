"""Differences of a trained model's rewards between precisions and between ways to batch responses.

    python scripts/bench/measure_batches.py runs/smollm2-135m --pairs 1000 --data harmless-base.jsonl.gz

In: a run folder, for its model, and preference pairs: its held-out ones, or those of a file. Out: for each two ways to
score them, the differences of the rewards (root mean square and largest, in standard deviations of the fp32 rewards,
and relative to the largest reward) and the number of pairs whose order changes.
Cost: scores the pairs in every precision and pack size; the first `--singles` pairs also in padded batches and response
by response.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from benchlib import say

from rmtool.data.formats import preference_record
from rmtool.data.rows import read_rows
from rmtool.model.loading import LoadedModel, load_for_inference
from rmtool.model.reward_model import RewardModel
from rmtool.model.rewards import compute_rewards
from rmtool.tokenization.response_group import ResponseGroup
from rmtool.tokenization.tokenized_dataset import tokenize_records
from rmtool.ui import SilentUi

# Prefix sharing, tokens of a pack.
PACKS = {"packs of 8,192": (True, 8192), "packs of 600": (True, 600)}
SINGLES = {"padded batches": (False, 8192), "one at a time": (False, 1)}
EXACT = "fp32, packs of 8,192"
Rewards = dict[str, np.ndarray]


def load_groups(loaded: LoadedModel, data: str, pairs: int) -> list[ResponseGroup]:
    """Tokenize the first pairs of a file whose responses are not too long or empty."""
    encoder, groups = loaded.encoder, list[ResponseGroup]()
    for row in read_rows(data):
        found = tokenize_records(encoder, [preference_record(row)], "drop", lambda: None).groups
        groups += [group for group in found if len(group.responses) == 2]
        if len(groups) == pairs:
            break
    return groups


def measure(model: RewardModel, groups: list[ResponseGroup], precisions: list[str], singles: int) -> Rewards:
    """Compute the rewards of the pairs, float[pairs, 2], by way; of the first pairs alone in the ways of SINGLES."""
    rewards = Rewards()
    for precision in precisions:
        for name, (shares, max_tokens) in (PACKS | (SINGLES if singles else {})).items():
            model.precision = precision
            model.share_prompts(shares)
            some = groups if name in PACKS else groups[:singles]
            rewards[f"{precision}, {name}"] = np.array(compute_rewards(model, some, max_tokens, SilentUi()))
            say(f"scored: {precision}, {name}")
    return rewards


def compare(rewards: Rewards, one: str, other: str) -> str:
    count = min(len(rewards[one]), len(rewards[other]))
    ones, others, exact = rewards[one][:count], rewards[other][:count], rewards[EXACT]
    difference, deviation, largest = np.abs(ones - others), exact.std(), np.abs(exact).max()
    root, most = np.sqrt((difference**2).mean()), difference.max()
    changed = int((np.diff(ones, axis=1) * np.diff(others, axis=1) <= 0).sum())
    return (
        f"{one} / {other}: rms {root / deviation:.2g}, largest {most / deviation:.2g} standard deviations "
        f"({most / largest:.2g} of the largest reward); {changed} of {count} pairs change their order"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--singles", type=int, default=150)
    parser.add_argument("--data")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "fp16", "bf16"])
    given = parser.parse_args()
    loaded = load_for_inference(given.run / "model", precision="fp32", on_long="drop", on_empty="drop")
    groups = load_groups(loaded, given.data or str(given.run / "held_out.jsonl"), given.pairs)
    rewards = measure(loaded.model, groups, list(dict.fromkeys(("fp32", *given.precisions))), given.singles)
    for precision in given.precisions:
        first = f"{precision}, packs of 8,192"
        for name in (name for name in rewards if name.startswith(precision)):
            for base in dict.fromkeys((first, EXACT)):
                if name != base and (base == EXACT or precision != "fp32"):
                    sys.stdout.write(compare(rewards, name, base) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
