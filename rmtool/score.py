"""Rewards for a JSONL file of responses, in input order.

In: rows with prompt and response(s), or messages. Out: the same rows with "reward" added; a row with N responses gets
"rewards" and "best", the index of the highest. A reward that is not a finite number is null, with an "error" field.
The file is read twice: once to check and tokenise every row, so that a bad last row shows before the first forward;
then to write the rows with their rewards. The output appears under its name when it is whole.
Cost: one forward over the tokens that are distinct in the whole file (`compute_rewards`); 4 bytes of disk per token
beside the output while it runs; in memory less than 1 KB per response while it
is planned.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmtool.data.encode import Encoder
from rmtool.data.formats import score_record
from rmtool.data.rows import Row, read_rows
from rmtool.errors import Place, RmtoolError
from rmtool.loading import Loaded
from rmtool.model import compute_rewards
from rmtool.spool import TreeSpool
from rmtool.ui import Ui


@dataclass(frozen=True)
class Outcome:
    """`nonfinite` responses have a null reward; `truncated` ones lost the left side of their prompt."""

    rows: int
    responses: int
    nonfinite: int
    truncated: int


def score_file(source: Path, output: Path, loaded: Loaded, budget: int, ui: Ui) -> Outcome:
    """Score every row of `source` into `output`.

    Raises:
        RmtoolError: E03xx a row is malformed, empty or too long, or the file changed meanwhile; E0502 the output cannot
            be written. Nothing is written in either case.
    """
    temporary = output.with_name(f".tmp-{output.name}-{os.getpid()}")
    try:
        with TreeSpool(output.parent) as trees:
            before = _signature(source)
            truncated = _read_trees(source, loaded.encoder, trees, ui)
            with ui.progress("Scoring", len(trees), "rows") as bar:
                rewards = compute_rewards(loaded.model, trees, budget, bar)
        with open(temporary, "w", encoding="utf-8") as file, ui.progress("Writing", len(rewards), "rows") as bar:
            _require_unchanged(source, before)
            for row, values in zip(read_rows(str(source)), rewards, strict=False):
                file.write(json.dumps(_with_rewards(row, values), ensure_ascii=False, allow_nan=False) + "\n")
                bar.advance()
            file.flush()
            os.fsync(file.fileno())
            _require_unchanged(source, before)
        os.replace(temporary, output)
    except OSError as error:
        raise RmtoolError(
            "E0502", f"{output} cannot be written: {error.strerror}", "free or change the disk"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    flat = [value for values in rewards for value in values]
    return Outcome(len(rewards), len(flat), sum(not math.isfinite(value) for value in flat), truncated)


def _signature(source: Path) -> tuple[int, int] | None:
    try:
        status = source.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _require_unchanged(source: Path, before: tuple[int, int] | None) -> None:
    """The file is read twice; rows of another file would get these rewards."""
    if _signature(source) != before:
        raise RmtoolError("E0301", "the file changed while it was scored", "score it again", Place(str(source)))


def _read_trees(source: Path, encoder: Encoder, trees: TreeSpool, ui: Ui) -> int:
    """Check and tokenise every row; returns how many lost the left side of their prompt."""
    truncated = 0
    with ui.progress(f"Reading {source.name}", None, "rows") as bar:
        for row in read_rows(str(source)):
            tree, event = encoder.encode(score_record(row))
            assert tree is not None, "dropping rows is no choice when scoring"
            _require_json(row)
            trees.append(tree)
            truncated += event == "truncated"
            bar.advance()
    return truncated


def _require_json(row: Row) -> None:
    """The row is written back as JSON: dates and bytes of a parquet file, and infinite numbers, have no form there."""
    try:
        json.dumps(row.data, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RmtoolError(
            "E0303", f"a value of this row cannot be written as JSON: {error}", "remove that field", row.place
        ) from error


def _with_rewards(row: Row, rewards: Sequence[float]) -> dict[str, Any]:
    finite = [value if math.isfinite(value) else None for value in rewards]
    error = {} if None not in finite else {"error": "nonfinite"}
    if "responses" not in row.data:
        return {**row.data, "reward": finite[0], **error}
    known = [value for value in finite if value is not None]
    return {**row.data, "rewards": finite, "best": finite.index(max(known)) if known else None, **error}
