"""Scoring: rewards for a file of responses, in input order.

In: rows with prompt and response(s), or messages. Out: the same rows with "reward" added; a row with N responses gets
"rewards" and "best", the index of the highest. A reward that is NaN or inf is null, with "error": "nonfinite".
The file is read twice: first to check and tokenize every row, so that an invalid last row is reported before the first
forward pass; then to write the rows with their rewards, in the form that the output's name says (`output.py`). The
output is renamed into place when it is complete.
Cost: one forward pass over the unique tokens of the file (`compute_rewards`); 4 bytes of disk per token next to the
output while it runs; less than 1 KB of memory per response for the packs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmtool.checkpoint import cannot_write
from rmtool.data.formats import score_record
from rmtool.data.record import Record
from rmtool.data.rejects import Rejects
from rmtool.data.rows import Row, read_rows
from rmtool.errors import Place, RmtoolError
from rmtool.model.loading import LoadedModel
from rmtool.model.rewards import compute_rewards
from rmtool.scoring.output import ColumnTypes, write_rows
from rmtool.tokenization.encoder import Encoder
from rmtool.tokenization.token_store import TokenStore
from rmtool.ui import Bar, Ui


@dataclass(frozen=True)
class ScoreSummary:
    """Counts of a finished `score`, as printed and in `--json`.

    Attributes:
        nonfinite: responses whose reward is null.
        truncated: rows whose prompt was truncated to max length.
        skipped_rows: invalid rows.
        converted: fields whose values JSON cannot hold: dates, bytes, decimals, NaN.
    """

    rows: int
    responses: int
    nonfinite: int
    truncated: int
    skipped_rows: int
    converted: list[str]


def score_file(
    source: Path, output: Path, loaded: LoadedModel, max_tokens: int, rejects: Rejects, ui: Ui
) -> ScoreSummary:
    """Score every row of `source` into `output`.

    Args:
        max_tokens: unique tokens per forward pass.
        rejects: skips invalid rows, or raises.

    Raises:
        RmtoolError: E03xx when a row is invalid and `rejects` does not skip it, or the file changes while it is scored;
            E0502 when the output cannot be written; E0503 when out of memory. No output is written then.
    """
    temporary, types = output.with_name(f".tmp-{output.name}-{os.getpid()}"), ColumnTypes()
    try:
        with TokenStore(output.parent) as groups:
            signature = _signature(source)
            note = types.add if output.name.lower().endswith(".parquet") else None
            truncated, skipped = _tokenize(source, loaded.encoder, groups, rejects, ui, note)
            with ui.progress("Scoring", len(groups), "rows") as bar:
                rewards = compute_rewards(loaded.model, groups, max_tokens, bar)
        with ui.progress("Writing", len(rewards), "rows") as bar:
            _require_unchanged(source, signature)
            rows = _scored_rows(source, skipped, rewards, bar)
            converted = write_rows(temporary, output.name, rows, types.schema())
            _require_unchanged(source, signature)
        os.replace(temporary, output)
    except OSError as error:
        raise cannot_write(output, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    flat = [value for values in rewards for value in values]
    nonfinite = sum(not math.isfinite(value) for value in flat)
    return ScoreSummary(len(rewards), len(flat), nonfinite, truncated, rejects.count, converted)


def _signature(source: Path) -> tuple[int, int] | None:
    try:
        status = source.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _require_unchanged(source: Path, signature: tuple[int, int] | None) -> None:
    """Refuse a file that was changed between its two readings: other rows would get these rewards."""
    if _signature(source) != signature:
        raise RmtoolError("E0301", "the file changed while it was scored", "run rmtool score again", Place(str(source)))


def _tokenize(
    source: Path, encoder: Encoder, groups: TokenStore, rejects: Rejects, ui: Ui, note: Callable[[Any], None] | None
) -> tuple[int, set[Place]]:
    """Check and tokenize every row; return how many prompts were truncated, and the places of skipped JSON rows. `note`
    gets each row as it is written later.
    """
    truncated, skipped = 0, set[Place]()

    def records() -> Iterator[Record]:
        for row in read_rows(str(source), rejects):
            bar.advance()
            try:
                record = score_record(row)
                if note:
                    note(_with_rewards(row, [0.0] * len(record.responses)))
                yield record
            except RmtoolError as error:
                skip(error, row.place, row.data)

    def skip(error: RmtoolError, place: Place, row: dict[str, Any]) -> None:
        rejects.add(error, row)
        skipped.add(place)

    with ui.progress(f"Reading {source.name}", None, "rows") as bar:
        for result in encoder.encode_many(records()):
            if result.error:
                skip(result.error, result.record.place, result.record.row)
                continue
            assert result.group is not None, "score drops no rows"
            groups.append(result.group)
            truncated += result.event == "truncated"
    rejects.raise_if_any()
    if not len(groups):
        raise RmtoolError("E0302", "no valid rows to score", f"check the errors in {rejects.path}", Place(str(source)))
    return truncated, skipped


def _scored_rows(
    source: Path, skipped: set[Place], rewards: Sequence[Sequence[float]], bar: Bar
) -> Iterator[dict[str, Any]]:
    """Read the file again, and yield the rows that have rewards, with them."""
    with Rejects(Path(os.devnull)) as ignored:
        rows = (row for row in read_rows(str(source), ignored) if row.place not in skipped)
        for row, values in zip(rows, rewards, strict=False):
            yield _with_rewards(row, values)
            bar.advance()


def _with_rewards(row: Row, rewards: Sequence[float]) -> dict[str, Any]:
    finite = [value if math.isfinite(value) else None for value in rewards]
    error = {} if None not in finite else {"error": "nonfinite"}
    if row.data.get("responses") is None:
        return {**row.data, "reward": finite[0], **error}
    known = [value for value in finite if value is not None]
    return {**row.data, "rewards": finite, "best": finite.index(max(known)) if known else None, **error}
