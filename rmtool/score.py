"""Rewards for a JSONL file of responses, in input order.

In: rows with prompt and response(s), or messages. Out: the same rows with "reward" added; a row with N responses gets
"rewards" and "best", the index of the highest. A reward that is not a finite number is null, with an "error" field.
The file is read twice: once to check every row and count tokens, so that a bad last row shows before the first
forward; then chunk by chunk. The output appears under its name when it is whole.
Cost: one forward over the unique tokens; memory for one chunk of rows.
"""

from __future__ import annotations

import itertools
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
from rmtool.errors import RmtoolError
from rmtool.loading import Loaded
from rmtool.model import compute_rewards
from rmtool.tree import TokenTree
from rmtool.ui import Ui

CHUNK_ROWS = 2048


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
        RmtoolError: E03xx a row is malformed, empty or too long; E0502 the output cannot be written. Nothing is
            written in either case.
    """
    rows = check_rows(source, loaded.encoder, ui)
    temporary = output.with_name(f".tmp-{output.name}-{os.getpid()}")
    outcome = Outcome(0, 0, 0, 0)
    try:
        with open(temporary, "w", encoding="utf-8") as file, ui.progress("Scoring", rows, "rows") as bar:
            reader = read_rows(str(source))
            while chunk := list(itertools.islice(reader, CHUNK_ROWS)):
                trees, truncated = _encode(chunk, loaded.encoder)
                rewards = compute_rewards(loaded.model, trees, budget, bar)
                for row, values in zip(chunk, rewards, strict=True):
                    file.write(json.dumps(_with_rewards(row, values), ensure_ascii=False, allow_nan=False) + "\n")
                outcome = _add(outcome, rewards, truncated)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, output)
    except OSError as error:
        raise RmtoolError(
            "E0502", f"{output} cannot be written: {error.strerror}", "free or change the disk"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return outcome


def check_rows(source: Path, encoder: Encoder, ui: Ui) -> int:
    """Shape and tokenise every row; returns how many there are."""
    rows = 0
    with ui.progress(f"Checking {source.name}", None, "rows") as bar:
        for row in read_rows(str(source)):
            encoder.encode(score_record(row))
            _require_json(row)
            rows += 1
            bar.advance()
    return rows


def _require_json(row: Row) -> None:
    """The row is written back as JSON: dates and bytes of a parquet file, and infinite numbers, have no form there."""
    try:
        json.dumps(row.data, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RmtoolError(
            "E0303", f"a value of this row cannot be written as JSON: {error}", "remove that field", row.place
        ) from error


def _encode(rows: Sequence[Row], encoder: Encoder) -> tuple[list[TokenTree], int]:
    trees, truncated = [], 0
    for row in rows:
        tree, event = encoder.encode(score_record(row))
        assert tree is not None, "dropping rows is no choice when scoring"
        trees.append(tree)
        truncated += event == "truncated"
    return trees, truncated


def _with_rewards(row: Row, rewards: Sequence[float]) -> dict[str, Any]:
    finite = [value if math.isfinite(value) else None for value in rewards]
    error = {} if None not in finite else {"error": "nonfinite"}
    if "responses" not in row.data:
        return {**row.data, "reward": finite[0], **error}
    known = [value for value in finite if value is not None]
    return {**row.data, "rewards": finite, "best": finite.index(max(known)) if known else None, **error}


def _add(outcome: Outcome, rewards: Sequence[Sequence[float]], truncated: int) -> Outcome:
    flat = [value for values in rewards for value in values]
    return Outcome(
        outcome.rows + len(rewards),
        outcome.responses + len(flat),
        outcome.nonfinite + sum(not math.isfinite(value) for value in flat),
        outcome.truncated + truncated,
    )
