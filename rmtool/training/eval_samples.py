"""Sampled eval pairs with their rewards in the last evaluation: eval_samples.jsonl.

In: a `Split`, and the rewards of some of its eval rows. Out: a line per sampled pair; for trackers, rows of a table.
Cost: the text of SAMPLES rows is read per evaluation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # trackers read the file without the rest
    from rmtool.data.record import Message
    from rmtool.dataset.split import Split

SAMPLES_FILE = "eval_samples.jsonl"
SAMPLES = 32
COLUMNS = ("prompt", "chosen", "rejected", "chosen_reward", "rejected_reward", "source")
MAX_TEXT = 2000  # characters of a text that trackers show


def sample_rows(split: Split, samples: Sequence[tuple[int, list[float]]], step: int) -> list[dict[str, Any]]:
    """Return the first pair of each sampled eval row; `samples` has their indices, ascending, and their rewards."""
    records = split.eval_records.take(index for index, _ in samples).records()
    rows = []
    for record, (index, rewards) in zip(records, samples, strict=True):
        winner, loser = split.eval.metadata[index].preferences[0]
        rows.append(
            {
                "step": step,
                "prompt": "\n\n".join(f"{message.role}: {message.shown()}" for message in record.prompt),
                "chosen": _shown(record.responses[winner]),
                "rejected": _shown(record.responses[loser]),
                "chosen_reward": rewards[winner],
                "rejected_reward": rewards[loser],
                "source": str(record.place),
            }
        )
    return rows


def _shown(response: Iterable[Message]) -> str:
    return "\n\n".join(message.shown() for message in response)


def write_samples(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace the samples of the evaluation before."""
    temporary = folder / f".tmp-{SAMPLES_FILE}"
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, folder / SAMPLES_FILE)


def read_samples(folder: Path, step: int) -> list[list[Any]]:
    """Return a row of COLUMNS per sample, with shortened texts; none if the file is of another step."""
    try:
        text = (folder / SAMPLES_FILE).read_text(encoding="utf-8")
    except OSError:  # not written: the disk was full
        return []
    rows = [json.loads(line) for line in text.split("\n") if line]
    return [[_short(row[name]) for name in COLUMNS] for row in rows if row["step"] == step]


def _short(value: Any) -> Any:
    return f"{value[:MAX_TEXT]}..." if isinstance(value, str) and len(value) > MAX_TEXT else value
