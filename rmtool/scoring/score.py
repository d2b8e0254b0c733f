"""Rewards for a JSONL file of responses, in input order.

In: rows with prompt and response(s), or messages. Out: the same rows with "reward" added; a row with N responses gets
"rewards" and "best", the index of the highest. A reward that is not a finite number is null, with an "error" field.
The file is read twice: once to check and tokenize every row, so that a bad last row shows before the first forward;
then to write the rows with their rewards. The output appears under its name when it is whole.
Cost: one forward over the tokens that are distinct in the whole file (`compute_rewards`); 4 bytes of disk per token
beside the output while it runs; in memory less than 1 KB per response while it is planned.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmtool.data.formats import score_record
from rmtool.data.record import Record
from rmtool.data.rejects import Rejects
from rmtool.data.rows import Row, read_rows
from rmtool.errors import Place, RmtoolError
from rmtool.model.loading import LoadedModel
from rmtool.model.rewards import compute_rewards
from rmtool.tokenization.encoder import Encoder
from rmtool.tokenization.token_store import TokenStore
from rmtool.ui import Ui


@dataclass(frozen=True)
class ScoreSummary:
    """`nonfinite` responses have a null reward; `truncated` ones lost the left side of their prompt; `skipped_rows`
    were set aside.
    """

    rows: int
    responses: int
    nonfinite: int
    truncated: int
    skipped_rows: int


def score_file(
    source: Path, output: Path, loaded: LoadedModel, max_tokens: int, rejects: Rejects, ui: Ui
) -> ScoreSummary:
    """Score every row of `source` into `output`.

    Raises:
        RmtoolError: E03xx a row is malformed, empty or too long (unless `rejects` sets such rows aside), or the file
            changed meanwhile; E0502 the output cannot be written. No output is written in any case.
    """
    temporary = output.with_name(f".tmp-{output.name}-{os.getpid()}")
    try:
        with TokenStore(output.parent) as groups:
            before = _signature(source)
            truncated, left_out = _read_trees(source, loaded.encoder, groups, rejects, ui)
            with ui.progress("Scoring", len(groups), "rows") as bar:
                rewards = compute_rewards(loaded.model, groups, max_tokens, bar)
        with open(temporary, "w", encoding="utf-8") as file, ui.progress("Writing", len(rewards), "rows") as bar:
            _require_unchanged(source, before)
            for row, values in zip(_kept_rows(source, left_out), rewards, strict=False):
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
    nonfinite = sum(not math.isfinite(value) for value in flat)
    return ScoreSummary(len(rewards), len(flat), nonfinite, truncated, rejects.count)


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


def _read_trees(source: Path, encoder: Encoder, groups: TokenStore, rejects: Rejects, ui: Ui) -> tuple[int, set[Place]]:
    """Check and tokenize every row; returns how many lost the left side of their prompt, and where the rows stand that
    are JSON and were rejected all the same.
    """
    truncated, left_out = 0, set[Place]()

    def records() -> Iterator[Record]:
        for row in read_rows(str(source), rejects):
            bar.advance()
            try:
                _require_json(row)
                yield score_record(row)
            except RmtoolError as error:
                leave_out(error, row.place, row.data)

    def leave_out(error: RmtoolError, place: Place, row: dict[str, Any]) -> None:
        rejects.add(error, row)
        left_out.add(place)

    with ui.progress(f"Reading {source.name}", None, "rows") as bar:
        for outcome in encoder.encode_many(records()):
            if outcome.error:
                leave_out(outcome.error, outcome.record.place, outcome.record.row)
                continue
            assert outcome.group is not None, "dropping rows is no choice when scoring"
            groups.append(outcome.group)
            truncated += outcome.event == "truncated"
    rejects.raise_if_any()
    if not len(groups):
        raise RmtoolError(
            "E0302", "no row is left to score", "look at the rows that were set aside", Place(str(source))
        )
    return truncated, left_out


def _kept_rows(source: Path, left_out: set[Place]) -> Iterator[Row]:
    """The rows that have groups, once more."""
    with Rejects(Path(os.devnull)) as again:
        yield from (row for row in read_rows(str(source), again) if row.place not in left_out)


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
