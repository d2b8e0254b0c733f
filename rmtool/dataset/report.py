"""Data report: statistics of the training and eval sets.

In: a `Split` and the recipe. Out: a `DataReport` (a table, and JSON), length histograms, and an example conversation.
Cost: a hash of every response's ids, and one sort of the lengths.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmtool.data.record import PairMetadata
from rmtool.data.sources import SourceCount
from rmtool.dataset.batches import count_pairs, epoch_steps
from rmtool.dataset.split import Split, describe_counts
from rmtool.tokenization.encoder import Encoder
from rmtool.tokenization.pack_plan import pack_tokens
from rmtool.tokenization.response_group import ResponseGroup
from rmtool.tokenization.tokenized_dataset import TokenizedDataset

LENGTHS_FILE = "lengths.png"
REPORT_FILE = "report.json"
PERCENTS = (0, 10, 50, 90, 99, 100)
_SHOWN = 300  # characters at each end of the example


@dataclass(frozen=True)
class Lengths:
    """Tokens, at each of PERCENTS."""

    percentiles: tuple[int, ...]

    def __str__(self) -> str:
        names = {0: "min", 100: "max"}
        percentiles = zip(PERCENTS, self.percentiles, strict=True)
        return ", ".join(f"{names.get(percent, f'p{percent}')} {value:,}" for percent, value in percentiles)


@dataclass(frozen=True)
class DataReport:
    """Statistics of a `Split`; counts are of pairs unless named otherwise.

    duplicates:    repeated pairs: prompt and both responses have the same ids as those of an earlier pair
    conflicts:     pairs that also occur with the opposite preference
    overlap:       eval pairs whose prompt is also in the training set
    longer_chosen: fraction of the pairs with unequal lengths whose chosen response is longer; None without such pairs
    padded, packed, shared: tokens of the training pairs, each step padded to its longest sequence, without padding,
        and with prefix sharing
    """

    sources: tuple[SourceCount, ...]
    skipped_rows: int
    dropped: dict[str, int]
    dropped_eval: dict[str, int]
    records: int
    pairs: int
    eval_pairs: int
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
        """(label, value) for a table."""
        longer = f"{self.longer_chosen:.1%} of pairs with unequal lengths" if self.longer_chosen is not None else ""
        overlap = f"({self.overlap:,} with a prompt that is also in the training set)"
        return [
            *((f"source {each.path}", _describe_source(each)) for each in self.sources),
            ("invalid rows skipped", f"{self.skipped_rows:,}"),
            *((f"rows {what}", count) for what, count in describe_counts(self.dropped)),
            *((f"eval rows {what}", count) for what, count in describe_counts(self.dropped_eval)),
            ("training pairs", f"{self.pairs:,} from {self.records:,} rows"),
            ("eval pairs", f"{self.eval_pairs:,} {overlap}"),
            ("duplicate pairs", f"{self.duplicates:,}"),
            ("conflicting pairs", f"{self.conflicts:,} (same responses, opposite preference)"),
            ("chosen response is longer", longer or "n/a (all lengths equal)"),
            ("prompt length (tokens)", str(self.prompt)),
            ("response length (tokens)", str(self.response)),
            ("tokens per pair", self._tokens_per_pair()),
        ]

    def _tokens_per_pair(self) -> str:
        padded, packed, shared = (f"{tokens / self.pairs:,.0f}" for tokens in (self.padded, self.packed, self.shared))
        less_padded, less_packed = (f"{1 - self.shared / tokens:.0%} less" for tokens in (self.padded, self.packed))
        saved = f"{less_padded} than padded, {less_packed} than packed"
        return f"{padded} padded, {packed} packed, {shared} with prefix sharing ({saved})"


def _describe_source(source: SourceCount) -> str:
    dropped = f"; {source.dropped_pairs:,} pairs dropped: over the limit per prompt" if source.dropped_pairs else ""
    return f"{source.format}; {source.records:,} {source.counted}, {source.taken:,} used{dropped}"


def build_report(split: Split, batch_size: int, seed: int) -> DataReport:
    """Compute the report of `split`, for steps of `batch_size` pairs."""
    train, prompts = split.train, {each.prompt_hash for each in split.train.metadata}
    overlap = [each for each in split.eval.metadata if each.prompt_hash and each.prompt_hash in prompts]
    duplicates, conflicts = _count_repeated(train)
    padded, packed, shared = _step_tokens(train, batch_size, seed)
    return DataReport(
        sources=split.sources,
        skipped_rows=split.skipped_rows,
        dropped={"identical_text": 0, "identical_after_rendering": 0, **train.counts},
        dropped_eval=dict(split.eval.counts),
        records=len(train.metadata),
        pairs=count_pairs(train.metadata),
        eval_pairs=count_pairs(split.eval.metadata),
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
    """Count duplicate and conflicting pairs, by 64-bit hashes of their ids."""
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
    """Count the tokens of the first epoch's steps: padded, packed, with prefix sharing."""
    padded = packed = shared = 0
    for items in epoch_steps(tokenized.metadata, tokenized.groups, seed, 0, batch_size):
        groups = [item.group for item in items]
        lengths = [len(group.prompt) + len(ids) for group in groups for ids in group.responses]
        padded += len(lengths) * max(lengths)
        packed += sum(lengths)
        shared += pack_tokens(groups)
    return padded, packed, shared


def example(encoder: Encoder, metadata: PairMetadata, group: ResponseGroup) -> str:
    """Show the chosen conversation of a record's first pair as the model gets it, and the token with the reward."""
    ids = group.sequence(metadata.preferences[0][0]).tolist()
    text = encoder.tokenizer.decode(ids)
    if len(text) > 2 * _SHOWN:
        text = f"{text[:_SHOWN]} [... {len(text) - 2 * _SHOWN:,} characters ...] {text[-_SHOWN:]}"
    last = encoder.tokenizer.convert_ids_to_tokens(ids[-1])
    return f"{text}\n({len(ids):,} tokens; the reward is taken at the last one, {last!r}, id {ids[-1]})"


def write_report(report: DataReport, tokenized: TokenizedDataset, folder: Path) -> None:
    """Write report.json and lengths.png."""
    (folder / REPORT_FILE).write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    draw_lengths(tokenized, folder / LENGTHS_FILE)


def add_skipped_steps(folder: Path, steps: Sequence[dict[str, Any]]) -> None:
    """Add the steps that training skipped, with their rows, to report.json."""
    if not steps:
        return
    report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    report["skipped_steps"] = list(steps)
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure for a PNG, with the size in inches."""
    os.environ["MPLBACKEND"] = "agg"  # one that matplotlib does not know would make its import fail
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_lengths(tokenized: TokenizedDataset, path: Path) -> None:
    """Draw histograms of prompt, chosen and rejected lengths, as a PNG."""
    pairs = [
        (len(group.prompt), len(group.responses[winner]), len(group.responses[loser]))
        for metadata, group in zip(tokenized.metadata, tokenized.groups, strict=True)
        for winner, loser in metadata.preferences
    ]
    prompt, chosen, rejected = (np.array(column) for column in zip(*pairs, strict=True))
    figure = new_figure(10, 3.6)
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
