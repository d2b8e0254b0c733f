"""A recipe's pairs: read, split into training and held out, and encoded.

In: a recipe and an encoder. Out: a `Split`, and the held-out pairs as a file that `rmtool eval` reads back.
Cost: every row is rendered and tokenised once, on all cores, and the ids are kept in a file, for later runs too
(`rmtool.dataset.cache`); the text is held in a file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rmtool.config import DataConfig, Recipe, Source
from rmtool.data.messages import Message
from rmtool.data.record import Labels, Reading
from rmtool.data.rejects import Rejects
from rmtool.data.sources import Selection, SourceCount, select
from rmtool.dataset import cache
from rmtool.dataset.batches import count_pairs
from rmtool.errors import RmtoolError
from rmtool.recipe import as_source, resolve
from rmtool.tokenization.encoder import Encoded, Encoder, encode_all, without_identical
from rmtool.tokenization.token_store import TreeSpool
from rmtool.ui import Ui


@dataclass(frozen=True)
class Split:
    """Encoded training and held-out pairs, and what was read of each source; `held_out_text` has the held-out
    records.
    """

    train: Encoded
    held_out: Encoded
    sources: tuple[SourceCount, ...] = ()
    rejected: int = 0
    held_out_text: Selection = field(default_factory=Selection)


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
    data, seed = recipe.data, recipe.train.seed
    train = read_sources(sources_of(data.train), reading_of(data), seed, rejects, ui)
    held = read_sources(sources_of(data.eval), reading_of(data), seed, rejects, ui) if data.eval else Selection()
    if data.rating_margins:
        _say_without_margins(train, ui)
    counts = tuple(scan.count for scan in (*train.scans, *held.scans))
    if data.holdout:
        kept, apart = hold_out(list(train.labels()), data.holdout, seed)
        train, held = train.take(kept), train.take(apart)
    encode = functools.partial(encode_selection, encoder, on_identical=data.on_identical, kept=data.cache)
    trained_on = encode(train, label="training", rejects=rejects, ui=ui)
    held_out = encode(held, label="held-out", rejects=rejects, ui=ui)
    rejects.settle()
    if not trained_on.labels:
        raise RmtoolError("E0302", "no training pairs are left", "check data.holdout, data.on_long and data.max_length")
    return Split(trained_on, held_out, counts, rejects.count, held.take(held_out.kept))


def _say_without_margins(selection: Selection, ui: Ui) -> None:
    """A mixture may have sources without ratings, but not unseen."""
    for scan in selection.scans:
        margins = {margin for labels in scan.labels for margin in labels.margins}
        if margins == {None}:
            ui.say(f"note: data.rating_margins is set, and {scan.count.path} has no ratings: its pairs have no margins")


def read_sources(sources: Sequence[Source], reading: Reading, seed: int, rejects: Rejects, ui: Ui) -> Selection:
    """The sources' labels, read with a progress bar; says what each was recognised as."""
    names = ", ".join(Path(source.path).name for source in sources)
    with ui.progress(f"Reading {names}", None, "rows") as bar:
        selection = select(sources, reading, seed, rejects, bar.advance)
    for scan in selection.scans:
        ui.say(f"{scan.count.path}: {scan.count.format}")
    return selection


def encode_selection(
    encoder: Encoder, selection: Selection, *, on_identical: str, kept: bool, label: str, rejects: Rejects, ui: Ui
) -> Encoded:
    """The selection's records, tokenised, or tokenised by an earlier run; bad ones go to `rejects`.

    Args:
        kept: whether to look for them in the cache, and leave them there.
        label: what to call them.
    """
    if not len(selection):
        return Encoded()
    identity = encoder.identity() if kept else None
    key = hashlib.sha256(f"{identity} {selection.digest()} {on_identical}".encode()).hexdigest()[:32]
    encoded = cache.get(key, ui.say) if identity else None
    if encoded is None:
        with ui.progress(f"Tokenising {label} pairs", len(selection), "rows") as bar:

            def encode(trees: TreeSpool) -> Encoded:
                known = selection.labels()
                result = encode_all(encoder, selection.records(), on_identical, bar.advance, rejects, trees, known)
                result.trees = trees
                return result

            encoded = cache.put(key, encode) if identity else encode(TreeSpool(Path(tempfile.gettempdir())))
    else:
        ui.say(f"{label} pairs: tokenised by an earlier run")
        encoded.labels = _labels_of(selection, encoded, on_identical)
        _reject_again(encoder, selection.take(encoded.failed), on_identical, rejects)
    for reason, count in sorted(encoded.counts.items()):
        ui.say(f"{label} rows {FATES[reason]}: {count} of {len(selection)}")
    return encoded


def _labels_of(selection: Selection, encoded: Encoded, on_identical: str) -> list[Labels]:
    """The labels of kept records, as `encode_all` gives them."""
    labels = list(selection.take(encoded.kept).labels())
    if on_identical != "drop" or not encoded.counts["identical"] + encoded.counts["alike"]:
        return labels
    pairs = zip(labels, encoded.trees, strict=True)
    return [without_identical(each, tree, on_identical, None)[0] for each, tree in pairs]


def _reject_again(encoder: Encoder, failed: Selection, on_identical: str, rejects: Rejects) -> None:
    if len(failed):
        again = encode_all(encoder, failed.records(), on_identical, lambda: None, rejects)
        assert not again.labels, "records that fail and do not"


FATES = {
    "long": "dropped, over data.max_length",
    "truncated": "with their prompt cut on the left, over data.max_length",
    "empty": "dropped, a response is empty",
    "identical": "dropped or cut, a chosen and a rejected response are the same",
    "alike": "dropped or cut, a chosen and a rejected response are the same once rendered and truncated",
    "tied": "dropped, no response is preferred",
}


def write_held_out(path: Path, split: Split) -> None:
    """The held-out pairs as rows that `rmtool eval` reads back."""

    def messages(items: Sequence[Message]) -> list[dict[str, Any]]:
        return [item.as_dict() for item in items]

    with open(path, "w", encoding="utf-8") as file:
        for record, labels in zip(split.held_out_text.records(), split.held_out.labels, strict=True):
            for (winner, loser), margin in zip(labels.preferences, labels.margins, strict=True):
                row: dict[str, Any] = {
                    "chosen": messages((*record.prompt, *record.responses[winner])),
                    "rejected": messages((*record.prompt, *record.responses[loser])),
                    "source": str(record.place),
                }
                extra = {"margin": margin, "subset": record.subset, "tools": record.tools or None}
                extra["weight"] = None if record.weight == 1 else record.weight
                row |= {name: value for name, value in extra.items() if value is not None}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def hold_out(labels: Sequence[Labels], pairs: int | float, seed: int) -> tuple[list[int], list[int]]:
    """(places of the training records, places of the held-out ones): held out by prompt, so that no prompt stands on
    both sides.

    Prompts are taken in a random order; one with more pairs than are still wanted is passed over. A record without a
    prompt stands for itself.

    Args:
        pairs: how many are held out; or, below 1, at most which share of them.

    Raises:
        RmtoolError: E0308 whole prompts do not add up to `pairs`.
    """
    share = isinstance(pairs, float)
    pairs = int(pairs * count_pairs(labels)) if share else int(pairs)
    groups: dict[int, list[int]] = {}
    for index, each in enumerate(labels):
        groups.setdefault(each.prompt or -index - 1, []).append(index)
    members = list(groups.values())
    held: set[int] = set()
    wanted = pairs
    for group in np.random.default_rng([seed, 2**31]).permutation(len(members)):
        size = count_pairs(labels[index] for index in members[group])
        if size <= wanted:
            held.update(members[group])
            wanted -= size
    if wanted and not share:
        raise RmtoolError(
            "E0308",
            f"{pairs} pairs cannot be held out by whole prompts, {pairs - wanted} can",
            f"set data.holdout={pairs - wanted}, or name held-out files in data.eval",
        )
    return [index for index in range(len(labels)) if index not in held], sorted(held)
