"""A recipe's pairs: read, split into training and held out, and encoded.

In: a recipe and an encoder. Out: a `Split`, and the held-out pairs as a file that `rmtool eval` reads back.
Cost: every row is rendered and tokenised once, on one core; ids stay in memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rmtool.config import DataConfig, Recipe, Source
from rmtool.data.encode import Encoded, Encoder, encode_all
from rmtool.data.formats import Reading, Record
from rmtool.data.messages import Message
from rmtool.data.rejects import Rejects
from rmtool.data.sources import Mixture, SourceCount, read_mixture
from rmtool.errors import RmtoolError
from rmtool.recipe import as_source, resolve
from rmtool.steps import hold_out
from rmtool.ui import Ui


@dataclass(frozen=True)
class Split:
    """Encoded training and held-out pairs, and what was read of each source."""

    train: Encoded
    held_out: Encoded
    sources: tuple[SourceCount, ...] = ()
    rejected: int = 0


def reading_of(data: DataConfig) -> Reading:
    """How this recipe's rows are read."""
    return Reading(tuple(data.columns.items()), data.rating_margins)


def sources_of(items: Sequence[str | Source]) -> list[Source]:
    """Sources with the paths where they lie."""
    return [replace(as_source(item), path=resolve(as_source(item).path)) for item in items]


def load_split(recipe: Recipe, encoder: Encoder, rejects: Rejects, ui: Ui) -> Split:
    """Read, shape, split and encode a recipe's data.

    Raises:
        RmtoolError: E0302 nothing is left to train on; E03xx as reading and encoding say. Bad rows go to `rejects`;
            where it does not set them aside, they are raised together.
    """
    data = recipe.data

    def read(items: Sequence[str | Source]) -> Mixture:
        sources = sources_of(items)
        names = ", ".join(Path(source.path).name for source in sources)
        with ui.progress(f"Reading {names}", None, "rows") as bar:
            return read_mixture(sources, reading_of(data), recipe.train.seed, rejects, bar.advance)

    def encode(records: Sequence[Record], label: str) -> Encoded:
        with ui.progress(f"Tokenising {label} pairs", len(records), "rows") as bar:
            encoded = encode_all(encoder, records, data.on_identical, bar.advance, rejects)
        for reason, count in sorted(encoded.counts.items()):
            ui.say(f"{label} rows {FATES[reason]}: {count} of {len(records)}")
        return encoded

    mixture = read(data.train)
    evaluated = read(data.eval) if data.eval else Mixture()
    train, held_out = mixture.records, evaluated.records
    if data.holdout:
        train, held_out = hold_out(train, data.holdout, recipe.train.seed)
    train_encoded = encode(train, "training")
    held_encoded = encode(held_out, "held-out") if held_out else Encoded()
    rejects.settle()
    if not train_encoded.records:
        raise RmtoolError("E0302", "no training pairs are left", "check data.holdout, data.on_long and data.max_length")
    return Split(train_encoded, held_encoded, (*mixture.sources, *evaluated.sources), rejects.count)


FATES = {
    "long": "dropped, over data.max_length",
    "truncated": "with their prompt cut on the left, over data.max_length",
    "empty": "dropped, a response is empty",
    "identical": "dropped or cut, a chosen and a rejected response are the same",
    "tied": "dropped, no response is preferred",
}


def write_held_out(path: Path, records: Sequence[Record]) -> None:
    """The held-out pairs as rows that `rmtool eval` reads back."""

    def messages(items: Sequence[Message]) -> list[dict[str, Any]]:
        return [item.as_dict() for item in items]

    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            for (winner, loser), margin in zip(record.preferences, record.margins, strict=True):
                row: dict[str, Any] = {
                    "chosen": messages((*record.prompt, *record.responses[winner])),
                    "rejected": messages((*record.prompt, *record.responses[loser])),
                    "source": str(record.place),
                }
                extra = {"margin": margin, "subset": record.subset, "tools": record.tools or None}
                extra["weight"] = None if record.weight == 1 else record.weight
                row |= {name: value for name, value in extra.items() if value is not None}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
