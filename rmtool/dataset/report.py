"""What the data is like, before a model is trained on it.

In: a `Split` and the recipe. Out: a `DataReport`: lines for people, data for scripts, and a picture of the lengths;
and one conversation as the model will read it.
Cost: a hash of every response's ids, and one sort of the lengths.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmtool.data.record import PairMetadata
from rmtool.data.sources import SourceCount
from rmtool.dataset.batches import count_pairs, epoch_steps
from rmtool.dataset.split import DROP_REASONS, Split
from rmtool.packing.packs import pack
from rmtool.tokenization.encoder import Encoder
from rmtool.tokenization.response_group import ResponseGroup
from rmtool.tokenization.tokenized_dataset import TokenizedDataset

LENGTHS_FILE = "lengths.png"
REPORT_FILE = "report.json"
PERCENTS = (0, 10, 50, 90, 99, 100)
_SHOWN = 300  # characters of each end of the example


@dataclass(frozen=True)
class Lengths:
    """Tokens, at each of PERCENTS."""

    percentiles: tuple[int, ...]

    def __str__(self) -> str:
        named = [
            f"{value:,} ({'shortest' if at == 0 else 'longest' if at == 100 else f'{at}%'})"
            for at, value in zip(PERCENTS, self.percentiles, strict=True)
        ]
        return ", ".join(named)


@dataclass(frozen=True)
class DataReport:
    """Counts are of pairs unless said otherwise.

    duplicates:    pairs that stand there again, prompt and both responses with the same ids
    conflicts:     prompts and two responses that stand there in both orders
    overlap:       held-out pairs whose prompt is trained on
    longer_chosen: share of the pairs of unequal length whose longer response is the chosen one; None if there is none
    padded, packed, shared: tokens of the training pairs, each step padded to its longest sequence, without padding,
        and with what a step shares computed once
    """

    sources: tuple[SourceCount, ...]
    skipped_rows: int
    dropped: dict[str, int]
    dropped_held_out: dict[str, int]
    records: int
    pairs: int
    held_out: int
    duplicates: int
    conflicts: int
    overlap: int
    longer_chosen: float | None
    prompt: Lengths
    response: Lengths
    padded: int
    packed: int
    shared: int

    def as_dict(self) -> dict[str, Any]:
        """The `--json` form."""
        return asdict(self) | {"percents": PERCENTS}

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for a table."""
        sources = [
            (
                f"source {source.path}",
                f"{source.format}: {source.records:,} {source.counted}, {source.taken:,} of them taken",
            )
            for source in self.sources
        ]
        fates = [(f"rows {DROP_REASONS[reason]}", f"{count:,}") for reason, count in sorted(self.dropped.items())]
        fates += [
            (f"held-out rows {DROP_REASONS[name]}", f"{count:,}")
            for name, count in sorted(self.dropped_held_out.items())
        ]
        longer = (
            "no pair has responses of unequal length" if self.longer_chosen is None else f"{self.longer_chosen:.1%}"
        )
        saved = [f"{1 - self.shared / tokens:.0%} of {name}" for name, tokens in self._without_sharing()]
        return [
            *sources,
            ("bad rows set aside", f"{self.skipped_rows:,}"),
            *fates,
            ("training pairs", f"{self.pairs:,} from {self.records:,} rows"),
            ("held-out pairs", f"{self.held_out:,}, of which {self.overlap:,} have a prompt that is trained on"),
            ("duplicates", f"{self.duplicates:,} pairs stand there again"),
            ("label conflicts", f"{self.conflicts:,} pairs stand there in both orders"),
            ("the longer response is chosen", longer),
            ("prompt tokens", str(self.prompt)),
            ("response tokens", str(self.response)),
            ("tokens per pair", ", ".join(self._per_pair()) + f"; sharing saves {' and '.join(saved)}"),
        ]

    def _without_sharing(self) -> tuple[tuple[str, int], ...]:
        return ("padded", self.padded), ("packed", self.packed)

    def _per_pair(self) -> Iterator[str]:
        for name, tokens in (*self._without_sharing(), ("shared", self.shared)):
            yield f"{tokens / self.pairs:,.0f} {name}"


def build_report(split: Split, batch_size: int, seed: int) -> DataReport:
    """The report of `split`, for steps of `batch_size` pairs."""
    train, held_out = split.train, split.eval
    prompts = {each.prompt_hash for each in train.metadata}
    overlap = [each for each in held_out.metadata if each.prompt_hash and each.prompt_hash in prompts]
    duplicates, conflicts = _count_repeated(train)
    padded, packed, shared = _step_tokens(train, batch_size, seed)
    return DataReport(
        sources=split.sources,
        skipped_rows=split.skipped_rows,
        dropped={"identical_text": 0, "identical_after_rendering": 0, **train.counts},
        dropped_held_out=dict(held_out.counts),
        records=len(train.metadata),
        pairs=count_pairs(train.metadata),
        held_out=count_pairs(held_out.metadata),
        duplicates=duplicates,
        conflicts=conflicts,
        overlap=count_pairs(overlap),
        longer_chosen=_longer_chosen(train),
        prompt=_lengths([len(group.prompt) for group in train.groups]),
        response=_lengths([len(ids) for group in train.groups for ids in group.responses]),
        padded=padded,
        packed=packed,
        shared=shared,
    )


def _count_repeated(tokenized: TokenizedDataset) -> tuple[int, int]:
    """Pairs that stand there again, and pairs that stand there in both orders; by 64-bit hashes of their ids."""
    winners, losers = array("Q"), array("Q")
    for metadata, group in zip(tokenized.metadata, tokenized.groups, strict=True):
        prompt = hashlib.blake2b(group.prompt.tobytes(), digest_size=8)
        keys = []
        for ids in group.responses:
            whole = prompt.copy()
            whole.update(ids.tobytes())
            keys.append(int.from_bytes(whole.digest()))
        winners.extend(keys[winner] for winner, _ in metadata.preferences)
        losers.extend(keys[loser] for _, loser in metadata.preferences)
    pairs = np.stack((np.asarray(winners), np.asarray(losers)), axis=1)
    seen = np.unique(pairs, axis=0)
    both = np.unique(np.sort(seen, axis=1), axis=0)
    return len(pairs) - len(seen), len(seen) - len(both)


def _longer_chosen(tokenized: TokenizedDataset) -> float | None:
    longer, unequal = 0, 0
    for metadata, group in zip(tokenized.metadata, tokenized.groups, strict=True):
        for winner, loser in metadata.preferences:
            difference = len(group.responses[winner]) - len(group.responses[loser])
            longer, unequal = longer + (difference > 0), unequal + (difference != 0)
    return longer / unequal if unequal else None


def _lengths(values: Sequence[int]) -> Lengths:
    return Lengths(tuple(int(value) for value in np.percentile(values, PERCENTS, method="nearest")))


def _step_tokens(tokenized: TokenizedDataset, batch_size: int, seed: int) -> tuple[int, int, int]:
    """Tokens of the first epoch's steps: padded, packed, shared."""
    padded = packed = shared = 0
    for units in epoch_steps(tokenized.metadata, tokenized.groups, seed, 0, batch_size):
        groups = [unit.group for unit in units]
        lengths = [len(group.prompt) + len(ids) for group in groups for ids in group.responses]
        padded += len(lengths) * max(lengths)
        packed += sum(lengths)
        shared += pack(groups).input_ids.numel()
    return padded, packed, shared


def example(encoder: Encoder, metadata: PairMetadata, group: ResponseGroup) -> str:
    """The chosen response of a record's first pair, as the model reads it, and where its reward is read."""
    ids = group.sequence(metadata.preferences[0][0]).tolist()
    text = encoder.tokenizer.decode(ids)
    if len(text) > 2 * _SHOWN:
        text = f"{text[:_SHOWN]} [... {len(text) - 2 * _SHOWN:,} characters ...] {text[-_SHOWN:]}"
    last = encoder.tokenizer.convert_ids_to_tokens(ids[-1])
    return f"{text}\n(the reward is read at the last of these {len(ids):,} tokens, {last!r}, id {ids[-1]})"


def write_report(report: DataReport, tokenized: TokenizedDataset, folder: Path) -> None:
    """report.json and lengths.png."""
    (folder / REPORT_FILE).write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    draw_lengths(tokenized, folder / LENGTHS_FILE)


def draw_lengths(tokenized: TokenizedDataset, path: Path) -> None:
    """Histograms of prompt, chosen and rejected lengths, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = [
        (len(group.prompt), len(group.responses[winner]), len(group.responses[loser]))
        for metadata, group in zip(tokenized.metadata, tokenized.groups, strict=True)
        for winner, loser in metadata.preferences
    ]
    prompt, chosen, rejected = (np.array(column) for column in zip(*pairs, strict=True))
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.hist(prompt, bins=_bins(prompt), color="#8a8a8a")
    left.set_title("prompts")
    bins = _bins(np.concatenate((chosen, rejected)))
    for values, name, color in ((chosen, "chosen", "#1f5fa8"), (rejected, "rejected", "#d1602b")):
        right.hist(values, bins=bins, histtype="step", linewidth=1.6, label=name, color=color)
    right.set_title("responses")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.set_xlabel("tokens")
        axis.set_ylabel("pairs")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _bins(values: np.ndarray) -> np.ndarray:
    return np.linspace(0, max(int(values.max()), 1), 41)
