"""Scoring: rewards for a file of responses, in input order.

In: rows with prompt and response(s), or messages. Out: the same rows with "reward" added; a row with N responses gets
"rewards" and "best", the index of the highest. A reward that is NaN or inf is null, with "error": "nonfinite".
The file is read twice: first to check and tokenize every row, so that an invalid last row is reported before the first
forward pass; then to write the rows with their rewards, in the form that the output's name says (`output.py`). The
output is renamed into place when it is complete.
Cost: one forward pass over the unique tokens of the file (`rewards_with_fidelity`); 4 bytes of disk per token next to
the output while it runs; less than 1 KB of memory per response for the packs.
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmtool.checkpoint import cannot_write
from rmtool.data.fields import require_known_columns
from rmtool.data.record import PLAIN, Record, RowOptions
from rmtool.data.rejects import Rejects
from rmtool.data.responses import SCORE_FIELDS, has_list, score_record
from rmtool.data.rows import Row, read_rows
from rmtool.dataset.split import describe_counts
from rmtool.errors import Place, RmtoolError
from rmtool.model.fidelity import Fidelity, rewards_with_fidelity
from rmtool.model.loading import LoadedModel
from rmtool.scoring.output import write_rows
from rmtool.tokenization.encoder import Encoder
from rmtool.tokenization.token_store import TokenStore
from rmtool.tokenization.tokenized_dataset import renders_alike
from rmtool.ui import Ui


@dataclass(frozen=True)
class ScoreSummary:
    """Counts of a finished `score`, as printed and in `--json`.

    Attributes:
        nonfinite: responses whose reward is null.
        truncated: rows whose prompt was truncated to max length.
        skipped_rows: invalid rows.
        unread_fields: names of fields that no reward depends on.
        converted: fields whose values JSON cannot hold: dates, bytes, decimals, NaN.
        fidelity: of the rewards, where that was measured.
    """

    rows: int
    responses: int
    nonfinite: int
    truncated: int
    skipped_rows: int
    unread_fields: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()
    fidelity: Fidelity | None = None


def score_file(
    source: Path,
    output: Path,
    loaded: LoadedModel,
    tokens: int,
    rejects: Rejects,
    ui: Ui,
    options: RowOptions = PLAIN,
    sample: int | None = None,
) -> ScoreSummary:
    """Score every row of `source` into `output`.

    Args:
        tokens: unique tokens per forward pass.
        rejects: skips invalid rows, or raises.
        sample: responses whose rewards are compared with fp32; see `sample_size`.

    Raises:
        RmtoolError: without output: E0204, E03xx a mapped field or a row is invalid, or the file changes while it is
            scored; E0502 the output cannot be written; E0503 out of memory.
    """
    unread, temporary = set[str](), output.with_name(f".tmp-{output.name}-{os.getpid()}")
    try:
        with TokenStore(output.parent) as groups:
            signature = _signature(source)
            counts, skipped = _tokenize(source, options, unread, loaded.encoder, groups, rejects, ui)
            with ui.progress("Scoring", len(groups), "rows") as bar:
                rewards, fidelity = rewards_with_fidelity(loaded.model, groups, tokens, bar, sample)
        _require_unchanged(source, signature)
        with ui.progress("Writing", len(rewards), "rows") as bar:
            rows = functools.partial(_scored_rows, source, options, skipped, rewards)
            converted = write_rows(temporary, output.name, rows, bar.advance)
        _require_unchanged(source, signature)
        os.replace(temporary, output)
    except OSError as error:
        raise cannot_write(output, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    numbers = counts["truncated"], rejects.count
    return ScoreSummary(len(rewards), *_count(rewards), *numbers, tuple(sorted(unread)), tuple(converted), fidelity)


def _count(rewards: Sequence[Sequence[float]]) -> tuple[int, int]:
    """Return the number of responses, and of those whose reward is NaN or inf."""
    finite = [math.isfinite(value) for values in rewards for value in values]
    return len(finite), finite.count(False)


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
    source: Path,
    options: RowOptions,
    unread: set[str],
    encoder: Encoder,
    groups: TokenStore,
    rejects: Rejects,
    ui: Ui,
) -> tuple[Counter[str], set[Place]]:
    """Check and tokenize every row; return counts of what became of rows, and the places of skipped JSON rows."""
    require_known_columns(options, SCORE_FIELDS)
    counts, skipped = Counter[str](), set[Place]()

    def records() -> Iterator[Record]:
        for row in read_rows(str(source), rejects):
            bar.advance()
            try:
                yield score_record(row, options, unread)
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
            counts.update(result.counts)
            counts.update(["same_ids"] * renders_alike(result.record, result.group))
    rejects.raise_if_any()
    if not len(groups):
        raise RmtoolError("E0302", "no valid rows to score", f"check the errors in {rejects.path}", Place(str(source)))
    for what, count in describe_counts(counts, f" of {len(groups):,}"):
        ui.say(f"note: rows {what}: {count}")
    return counts, skipped


def _scored_rows(
    source: Path,
    options: RowOptions,
    skipped: set[Place],
    rewards: Sequence[Sequence[float]],
    advance: Callable[[], None],
) -> Iterator[dict[str, Any]]:
    """Read the file again, and yield the rows that have rewards, with them."""
    with Rejects(Path(os.devnull)) as ignored:
        rows = (row for row in read_rows(str(source), ignored) if row.place not in skipped)
        for row, values in zip(rows, rewards, strict=False):
            yield _with_rewards(row, values, options)
            advance()


def _with_rewards(row: Row, rewards: Sequence[float], options: RowOptions) -> dict[str, Any]:
    finite = [value if math.isfinite(value) else None for value in rewards]
    error = {} if None not in finite else {"error": "nonfinite"}
    if not has_list(row, options):
        return {**row.data, "reward": finite[0], **error}
    known = [value for value in finite if value is not None]
    return {**row.data, "rewards": finite, "best": finite.index(max(known)) if known else None, **error}
