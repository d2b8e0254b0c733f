"""A recipe's pairs: read, split into training and held out, and encoded.

In: a recipe and an encoder. Out: a `Split`, and the held-out pairs as a file that `rmtool eval` reads back.
Cost: every row is rendered and tokenized once, on all cores, and the ids are kept in a file, for later runs too
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
from rmtool.data.record import Message, PairMetadata, RowOptions
from rmtool.data.rejects import Rejects
from rmtool.data.sources import RecordSubset, SourceCount, select
from rmtool.dataset import cache
from rmtool.dataset.batches import count_pairs
from rmtool.errors import RmtoolError
from rmtool.recipe import as_source, resolve
from rmtool.tokenization.encoder import Encoder
from rmtool.tokenization.token_store import TokenStore
from rmtool.tokenization.tokenized_dataset import TokenizedDataset, tokenize_records, without_identical
from rmtool.ui import Ui


@dataclass(frozen=True)
class Split:
    """TokenizedDataset training and held-out pairs, and what was read of each source; `held_out_text` has the held-out
    records.
    """

    train: TokenizedDataset
    held_out: TokenizedDataset
    sources: tuple[SourceCount, ...] = ()
    skipped_rows: int = 0
    held_out_text: RecordSubset = field(default_factory=RecordSubset)


def reading_of(data: DataConfig) -> RowOptions:
    """How this recipe's rows are read."""
    return RowOptions(tuple(data.columns.items()), data.rating_margins)


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
    held = read_sources(sources_of(data.eval), reading_of(data), seed, rejects, ui) if data.eval else RecordSubset()
    if data.rating_margins:
        _say_without_margins(train, ui)
    counts = tuple(scan.count for scan in (*train.scans, *held.scans))
    if data.holdout:
        kept, apart = hold_out(list(train.metadata()), data.holdout, seed)
        train, held = train.take(kept), train.take(apart)
    encode = functools.partial(tokenize_subset, encoder, on_identical=data.on_identical, kept=data.cache)
    trained_on = encode(train, label="training", rejects=rejects, ui=ui)
    held_out = encode(held, label="held-out", rejects=rejects, ui=ui)
    rejects.raise_if_any()
    if not trained_on.metadata:
        raise RmtoolError("E0302", "no training pairs are left", "check data.holdout, data.on_long and data.max_length")
    return Split(trained_on, held_out, counts, rejects.count, held.take(held_out.indices))


def _say_without_margins(selection: RecordSubset, ui: Ui) -> None:
    """A mixture may have sources without ratings, but not unseen."""
    for scan in selection.scans:
        margins = {margin for metadata in scan.metadata for margin in metadata.margins}
        if margins == {None}:
            ui.say(f"note: data.rating_margins is set, and {scan.count.path} has no ratings: its pairs have no margins")


def read_sources(sources: Sequence[Source], reading: RowOptions, seed: int, rejects: Rejects, ui: Ui) -> RecordSubset:
    """The sources' labels, read with a progress bar; says what each was recognized as."""
    names = ", ".join(Path(source.path).name for source in sources)
    with ui.progress(f"Reading {names}", None, "rows") as bar:
        selection = select(sources, reading, seed, rejects, bar.advance)
    for scan in selection.scans:
        ui.say(f"{scan.count.path}: {scan.count.format}")
    return selection


def tokenize_subset(
    encoder: Encoder, selection: RecordSubset, *, on_identical: str, kept: bool, label: str, rejects: Rejects, ui: Ui
) -> TokenizedDataset:
    """The selection's records, tokenized, or tokenized by an earlier run; bad ones go to `rejects`.

    Args:
        kept: whether to look for them in the cache, and leave them there.
        label: what to call them.
    """
    if not len(selection):
        return TokenizedDataset()
    identity = encoder.identity() if kept else None
    key = hashlib.sha256(f"{identity} {selection.digest()} {on_identical}".encode()).hexdigest()[:32]
    tokenized = cache.get(key, ui.say) if identity else None
    if tokenized is None:
        with ui.progress(f"Tokenizing {label} pairs", len(selection), "rows") as bar:

            def encode(groups: TokenStore) -> TokenizedDataset:
                known = selection.metadata()
                result = tokenize_records(
                    encoder, selection.records(), on_identical, bar.advance, rejects, groups, known
                )
                result.groups = groups
                return result

            tokenized = cache.put(key, encode) if identity else encode(TokenStore(Path(tempfile.gettempdir())))
    else:
        ui.say(f"{label} pairs: tokenized by an earlier run")
        tokenized.metadata = _labels_of(selection, tokenized, on_identical)
        _reject_again(encoder, selection.take(tokenized.failed), on_identical, rejects)
    for reason, count in sorted(tokenized.counts.items()):
        ui.say(f"{label} rows {DROP_REASONS[reason]}: {count} of {len(selection)}")
    return tokenized


def _labels_of(selection: RecordSubset, tokenized: TokenizedDataset, on_identical: str) -> list[PairMetadata]:
    """The labels of kept records, as `tokenize_records` gives them."""
    metadata = list(selection.take(tokenized.indices).metadata())
    if on_identical != "drop" or not tokenized.counts["identical_text"] + tokenized.counts["identical_after_rendering"]:
        return metadata
    pairs = zip(metadata, tokenized.groups, strict=True)
    return [without_identical(each, group, on_identical, None)[0] for each, group in pairs]


def _reject_again(encoder: Encoder, failed: RecordSubset, on_identical: str, rejects: Rejects) -> None:
    if len(failed):
        again = tokenize_records(encoder, failed.records(), on_identical, lambda: None, rejects)
        assert not again.metadata, "records that fail and do not"


DROP_REASONS = {
    "too_long": "dropped: longer than max length",
    "truncated": "with truncated prompt",
    "empty_response": "dropped: empty response",
    "identical_text": "with identical responses (row or pair dropped)",
    "identical_after_rendering": "with identical responses after templating and truncation (row or pair dropped)",
    "no_preference": "dropped: tie",
}


def write_held_out(path: Path, split: Split) -> None:
    """The held-out pairs as rows that `rmtool eval` reads back."""

    def messages(items: Sequence[Message]) -> list[dict[str, Any]]:
        return [item.as_dict() for item in items]

    with open(path, "w", encoding="utf-8") as file:
        for record, metadata in zip(split.held_out_text.records(), split.held_out.metadata, strict=True):
            for (winner, loser), margin in zip(metadata.preferences, metadata.margins, strict=True):
                row: dict[str, Any] = {
                    "chosen": messages((*record.prompt, *record.responses[winner])),
                    "rejected": messages((*record.prompt, *record.responses[loser])),
                    "source": str(record.place),
                }
                extra = {"margin": margin, "subset": record.subset, "tools": record.tools or None}
                extra["weight"] = None if record.weight == 1 else record.weight
                row |= {name: value for name, value in extra.items() if value is not None}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def hold_out(metadata: Sequence[PairMetadata], pairs: int | float, seed: int) -> tuple[list[int], list[int]]:
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
    pairs = int(pairs * count_pairs(metadata)) if share else int(pairs)
    groups: dict[int, list[int]] = {}
    for index, each in enumerate(metadata):
        groups.setdefault(each.prompt_hash or -index - 1, []).append(index)
    members = list(groups.values())
    held: set[int] = set()
    wanted = pairs
    for group in np.random.default_rng([seed, 2**31]).permutation(len(members)):
        size = count_pairs(metadata[index] for index in members[group])
        if size <= wanted:
            held.update(members[group])
            wanted -= size
    if wanted and not share:
        raise RmtoolError(
            "E0308",
            f"{pairs} pairs cannot be held out by whole prompts, {pairs - wanted} can",
            f"set data.holdout={pairs - wanted}, or name held-out files in data.eval",
        )
    return [index for index in range(len(metadata)) if index not in held], sorted(held)
