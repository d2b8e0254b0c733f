"""A recipe's pairs: read, split into training and held out, and encoded.

In: a recipe and an encoder. Out: a `Split`, and the held-out pairs as a file that `rmtool eval` reads back.
Cost: every row is rendered and tokenised once, on one core; ids stay in memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmtool.config import Recipe
from rmtool.data.encode import Encoded, Encoder, encode_all
from rmtool.data.formats import Message, Record, preference_record
from rmtool.data.rows import read_all
from rmtool.errors import RmtoolError
from rmtool.recipe import resolve
from rmtool.steps import count_pairs, hold_out
from rmtool.ui import Ui


@dataclass(frozen=True)
class Split:
    """Encoded training and held-out pairs."""

    train: Encoded
    held_out: Encoded


def load_split(recipe: Recipe, encoder: Encoder, ui: Ui) -> Split:
    """Read, shape, split and encode a recipe's data.

    Raises:
        RmtoolError: E0302 nothing is left to train on; E03xx as reading and encoding say.
    """
    data = recipe.data

    def read(sources: Sequence[str]) -> list[Record]:
        with ui.progress(f"Reading {', '.join(Path(source).name for source in sources)}", None, "rows") as bar:
            return read_all([resolve(source) for source in sources], preference_record, bar.advance)

    def encode(records: Sequence[Record], label: str) -> Encoded:
        with ui.progress(f"Tokenising {label} pairs", len(records), "pairs") as bar:
            encoded = encode_all(encoder, records, data.on_identical, bar.advance)
        for reason, count in sorted(encoded.counts.items()):
            ui.say(f"{label} pairs {_FATES[reason]}: {count} of {len(records)}")
        return encoded

    train, held_out = read(data.train), read(data.eval) if data.eval else []
    if data.holdout:
        train, held_out = hold_out(train, data.holdout, recipe.train.seed)
    split = Split(encode(train, "training"), encode(held_out, "held-out") if held_out else Encoded())
    if not split.train.records:
        raise RmtoolError("E0302", "no training pairs are left", "check data.holdout, data.on_long and data.max_length")
    return split


_FATES = {
    "long": "dropped, over data.max_length",
    "truncated": "with their prompt cut on the left, over data.max_length",
    "empty": "dropped, a response is empty",
    "identical": "dropped, chosen and rejected are the same",
}


def write_held_out(path: Path, records: Sequence[Record]) -> None:
    """The held-out pairs as rows that `rmtool eval` reads back."""

    def messages(items: Sequence[Message]) -> list[dict[str, str]]:
        return [item._asdict() for item in items]

    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            for (winner, loser), margin in zip(record.preferences, record.margins, strict=True):
                row: dict[str, Any] = {
                    "chosen": messages((*record.prompt, *record.responses[winner])),
                    "rejected": messages((*record.prompt, *record.responses[loser])),
                    "source": str(record.place),
                }
                extra = {"margin": margin, "subset": record.subset}
                row |= {name: value for name, value in extra.items() if value is not None}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def describe_data(split: Split) -> str:
    """Pairs, and the tokens that sharing saves."""
    trees = split.train.trees
    unique = sum(tree.unique_tokens for tree in trees)
    whole = sum(len(sequence) for tree in trees for sequence in tree.sequences())
    pairs, held = count_pairs(split.train.records), count_pairs(split.held_out.records)
    return (
        f"data: {pairs:,} training pairs, {held:,} held out; {unique / pairs:.0f} unique tokens per pair "
        f"({whole / pairs:.0f} without sharing the prompt)"
    )
