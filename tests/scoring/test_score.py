"""Scoring a file: which rewards belong to which rows when invalid rows are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers import pair_rows, scored, write_jsonl

ROWS = [{"prompt": row["prompt"], "response": row["chosen"]} for row in pair_rows(4)]


def test_rows_that_are_not_rows_to_score_are_skipped_and_the_others_keep_their_rewards(
    rmtool: Any, model: Path, tmp_path: Path
) -> None:
    """Valid JSON of an unknown format, before and between the others."""
    invalid = {"question": "no response here"}
    source = write_jsonl(tmp_path / "r.jsonl", [invalid, ROWS[0], invalid, *ROWS[1:]])
    assert rmtool("score", source, "--model", model, "--on-bad-row", "skip").code == 1
    clean = write_jsonl(tmp_path / "clean.jsonl", ROWS)
    assert rmtool("score", clean, "--model", model).code == 0
    assert scored(tmp_path / "r.scored.jsonl") == scored(tmp_path / "clean.scored.jsonl")
