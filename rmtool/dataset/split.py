"""Training and eval set of a recipe: loaded, split and tokenized.

In: a recipe and an encoder. Out: a `Split`, and the held-out pairs as a file that `rmtool eval` reads.
Cost: every row is parsed once per node and tokenized once, on all cores; both results stay in the cache for other
processes and later runs (`rmtool.data.record_store`, `rmtool.dataset.cache`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
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
from rmtool.errors import Place, RmtoolError
from rmtool.recipe import as_source, resolve
from rmtool.tokenization.encoder import Encoder
from rmtool.tokenization.tokenized_dataset import GroupSink, TokenizedDataset, tokenize_records, without_identical
from rmtool.ui import Ui

# What became of rows, by the keys of TokenizedDataset.counts.
DROP_REASONS = {
    "too_long": "dropped: longer than max length",
    "truncated": "with truncated prompt",
    "continued": "whose prompt ends in an assistant message, which the response continues",
    "assistant_twice": "with consecutive assistant messages, which stay messages of their own",
    "media_token": "whose prompt has the placeholder of an image, video or audio, which is tokenized as plain text",
    "ends_in_token": "with a response that ends in the text of a special token, which is tokenized as plain text",
    "same_ids": "with different responses that have the same token ids: the chat template leaves out the difference",
    "empty_response": "dropped: empty response",
    "identical_text": "with identical responses (row or pair dropped)",
    "identical_after_rendering": "with identical responses after templating and truncation (row or pair dropped)",
    "no_preference": "dropped: tie",
}
MORE_ROWS = "pass data with more pairs"
# What keeps the rows of a reason.
KEEP_ROWS = {
    "too_long": "set data.on_long=truncate_prompt, or raise data.max_length",
    "empty_response": "set data.on_empty=keep",
    "identical_text": "pass data with two different responses to a prompt",
    "identical_after_rendering": "pass data with two different responses to a prompt, or raise data.max_length",
    "no_preference": "pass data with a preference: in these rows, no response is better than the other",
}


def describe_counts(counts: Mapping[str, int], of: str = "") -> list[tuple[str, str]]:
    """Return (what became of rows, how many, followed by `of`) for each count that is a number of rows."""
    removed = (
        f" ({counts.get('truncated_messages', 0):,} messages, {counts.get('truncated_tokens', 0):,} tokens removed)"
    )
    return [
        (DROP_REASONS[name], f"{count:,}{of}{removed if name == 'truncated' else ''}")
        for name, count in sorted(counts.items())
        if name in DROP_REASONS
    ]


@dataclass(frozen=True)
class Split:
    """The tokenized training and eval set, and counts of each source; `eval_records` is the text of the eval set."""

    train: TokenizedDataset
    eval: TokenizedDataset
    sources: tuple[SourceCount, ...] = ()
    skipped_rows: int = 0
    eval_records: RecordSubset = field(default_factory=RecordSubset)


def row_options(data: DataConfig) -> RowOptions:
    """How the rows of a recipe's sources are parsed."""
    return RowOptions(tuple(data.columns.items()), data.rating_margins, data.max_pairs_per_prompt)


def resolve_sources(items: Sequence[str | Source]) -> list[Source]:
    """Sources with resolved paths (bundled: files)."""
    return [replace(as_source(item), path=resolve(as_source(item).path)) for item in items]


def load_split(recipe: Recipe, encoder: Encoder, rejects: Rejects, ui: Ui) -> Split:
    """Load, split and tokenize a recipe's data.

    Raises:
        RmtoolError: E0302 no training pairs are left; E03xx as loading and tokenizing do. Invalid rows go to
            `rejects`; unless it skips them, they are raised together.
    """
    data, seed = recipe.data, recipe.train.seed
    read = functools.partial(read_sources, options=row_options(data), seed=seed, use_cache=data.cache)
    train = read(resolve_sources(data.train), rejects=rejects, ui=ui)
    held_out = read(resolve_sources(data.eval), rejects=rejects, ui=ui) if data.eval else RecordSubset()
    if data.rating_margins:
        _report_missing_margins(train, ui)
    counts = tuple(loaded.count for loaded in (*train.loaded, *held_out.loaded))
    if data.holdout:
        indices, held_out_indices = hold_out(list(train.metadata()), data.holdout, seed)
        train, held_out = train.take(indices), train.take(held_out_indices)
    tokenize = functools.partial(tokenize_subset, encoder, on_identical=data.on_identical, use_cache=data.cache)
    train_set = tokenize(train, label="training", rejects=rejects, ui=ui)
    eval_set = tokenize(held_out, label="eval", rejects=rejects, ui=ui)
    rejects.raise_if_any()
    require_pairs("training", train_set, rejects)
    if data.eval or data.holdout:
        require_pairs("eval", eval_set, rejects)
    return Split(train_set, eval_set, counts, rejects.count, held_out.take(eval_set.indices))


def require_pairs(label: str, tokenized: TokenizedDataset, rejects: Rejects, place: Place | None = None) -> None:
    """Check that pairs are left.

    Raises:
        RmtoolError: E0302 with the number of rows that were dropped for each reason, and what keeps them.
    """
    if tokenized.metadata:
        return
    rows = {reason: count for reason, count in sorted(tokenized.counts.items()) if count and reason in KEEP_ROWS}
    dropped = [f"{count:,} row{'s' * (count > 1)} {DROP_REASONS[reason]}" for reason, count in rows.items()]
    advice = dict.fromkeys(KEEP_ROWS[reason] for reason in rows)
    if rejects.count:
        dropped.append(f"{rejects.count:,} invalid row{'s' * (rejects.count > 1)} skipped")
        advice[f"fix the rows in {rejects.path}"] = None
    what = ": ".join([f"no {label} pairs are left", *([", ".join(dropped)] if dropped else [])])
    raise RmtoolError("E0302", what, "; ".join(advice) or MORE_ROWS, place)


def _report_missing_margins(subset: RecordSubset, ui: Ui) -> None:
    """A mixture may have sources without ratings, but not unseen."""
    for loaded in subset.loaded:
        margins = {margin for metadata in loaded.metadata for margin in metadata.margins}
        if margins == {None}:
            ui.say(f"note: data.rating_margins is set, but {loaded.count.path} has no ratings: its pairs get no margin")


def read_sources(
    sources: Sequence[Source], options: RowOptions, seed: int, rejects: Rejects, ui: Ui, use_cache: bool = True
) -> RecordSubset:
    """Load the sources with a progress bar, and print the format of each.

    Raises:
        RmtoolError: as `rmtool.data.sources.select`.
    """
    names = ", ".join(Path(source.path).name for source in sources)
    with ui.progress(f"Reading {names}", None, "rows") as bar:
        subset = select(sources, options, seed, rejects, bar.advance, ui.say, use_cache)
    for loaded in subset.loaded:
        unread = f"; unread fields: {', '.join(loaded.count.unread)}" if loaded.count.unread else ""
        ui.say(f"{loaded.count.path}: {loaded.count.format}{unread}")
        if dropped := loaded.count.dropped_pairs:
            what = f"dropped {dropped:,} pairs: prompts have at most {options.max_pairs:,}, drawn at random"
            ui.say(f"note: {loaded.count.path}: {what}")
    return subset


def tokenize_subset(
    encoder: Encoder, subset: RecordSubset, *, on_identical: str, use_cache: bool, label: str, rejects: Rejects, ui: Ui
) -> TokenizedDataset:
    """Tokenize records, or load them from the token cache; invalid ones go to `rejects`.

    Args:
        label: the name of the set in messages.

    Raises:
        RmtoolError: E0502 the cache cannot be written; as `tokenize_records`.
    """
    if not len(subset):
        return TokenizedDataset()
    identity = encoder.identity() if use_cache else None
    key = hashlib.sha256(f"{identity} {subset.digest()} {on_identical}".encode()).hexdigest()[:32]
    tokenized = cache.get(key, ui.say) if identity else None
    if tokenized is None:
        with ui.progress(f"Tokenizing {label} pairs", len(subset), "rows") as bar:

            def encode(groups: GroupSink) -> TokenizedDataset:
                known = subset.metadata()
                return tokenize_records(encoder, subset.records(), on_identical, bar.advance, rejects, groups, known)

            tokenized = cache.put(key, encode) if identity else cache.store(encode, Path(tempfile.gettempdir()))
    else:
        ui.say(f"{label} pairs: loaded from the token cache")
        tokenized.metadata = _metadata_of(subset, tokenized, on_identical)
        _reject_again(encoder, subset.take(tokenized.failed), on_identical, rejects)
    for what, count in describe_counts(tokenized.counts, f" of {len(subset):,}"):
        ui.say(f"{label} rows {what}: {count}")
    return tokenized


def _metadata_of(subset: RecordSubset, tokenized: TokenizedDataset, on_identical: str) -> list[PairMetadata]:
    """The metadata of records from the token cache, as `tokenize_records` returns it."""
    metadata = list(subset.take(tokenized.indices).metadata())
    if on_identical != "drop" or not tokenized.counts["identical_text"] + tokenized.counts["identical_after_rendering"]:
        return metadata
    pairs = zip(metadata, tokenized.groups, strict=True)
    return [without_identical(each, group, on_identical, None)[0] for each, group in pairs]


def _reject_again(encoder: Encoder, failed: RecordSubset, on_identical: str, rejects: Rejects) -> None:
    """Tokenize the records that failed before, for their errors."""
    if len(failed):
        again = tokenize_records(encoder, failed.records(), on_identical, lambda: None, rejects)
        assert not again.metadata, "records that failed now succeed"


def write_held_out(path: Path, split: Split) -> None:
    """Write the eval set as rows that `rmtool eval` reads."""

    def messages(items: Sequence[Message]) -> list[dict[str, Any]]:
        return [item.as_dict() for item in items]

    with open(path, "w", encoding="utf-8") as file:
        for record, metadata in zip(split.eval_records.records(), split.eval.metadata, strict=True):
            for (winner, loser), margin in zip(metadata.preferences, metadata.margins, strict=True):
                row: dict[str, Any] = {
                    "chosen": messages(record.conversation(winner)),
                    "rejected": messages(record.conversation(loser)),
                    "source": str(record.place),
                }
                extra = {"margin": margin, "subset": record.subset, "tools": record.tools or None}
                extra["weight"] = None if record.weight == 1 else record.weight
                extra["chat_template_kwargs"] = record.template_kwargs or None
                row |= {name: value for name, value in extra.items() if value is not None}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def hold_out(metadata: Sequence[PairMetadata], pairs: int | float, seed: int) -> tuple[list[int], list[int]]:
    """Split records by prompt; returns the indices of the training records and those of the held-out ones.

    Prompts are drawn at random; one with more pairs than are still missing is not held out. A record without a prompt
    counts as a prompt.

    Args:
        pairs: the number to hold out; or, below 1, the fraction to hold out at most.

    Raises:
        RmtoolError: E0308 no set of complete prompts has `pairs` pairs.
    """
    fraction, is_fraction = pairs, isinstance(pairs, float)
    pairs = int(pairs * count_pairs(metadata)) if is_fraction else int(pairs)
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
    if wanted and not is_fraction:
        raise RmtoolError(
            "E0308",
            f"cannot hold out exactly {pairs} pairs without splitting a prompt; {pairs - wanted} is possible",
            f"set data.holdout={pairs - wanted}, or set data.eval to a file",
        )
    if is_fraction and wanted == pairs:
        raise none_held_out(fraction, count_pairs(metadata))
    return [index for index in range(len(metadata)) if index not in held], sorted(held)


def none_held_out(holdout: int | float, pairs: int) -> RmtoolError:
    """Return the error for a fraction that selects no complete prompt."""
    what = f"data.holdout={holdout:g} holds out none of {pairs:,} pairs"
    return RmtoolError("E0308", what, "set a larger data.holdout, or a number of pairs, or data.holdout=0")
