"""The report on the data counts what is there: duplicates, conflicts, overlap; an example shows where the reward is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import pair_rows

from rmtool.data.formats import preference_record
from rmtool.data.rows import Row
from rmtool.data.sources import SourceCount
from rmtool.dataset.report import build_report, draw_lengths, example
from rmtool.dataset.split import Split
from rmtool.errors import Place
from rmtool.tokenization.encoder import Encoder
from rmtool.tokenization.tokenized_dataset import tokenize_records


def encoded(tokenizer: Any, rows: list[dict[str, Any]]) -> Any:
    records = [preference_record(Row(Place("f.jsonl", line), data)) for line, data in enumerate(rows, 1)]
    return tokenize_records(Encoder(tokenizer, 512), records, "drop", lambda: None)


def swapped(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


def test_a_report_counts_what_was_planted(tokenizer: Any, tmp_path: Path) -> None:
    rows = pair_rows(20)
    same = rows[5] | {"rejected": rows[5]["chosen"]}
    train = encoded(tokenizer, [*rows, rows[3], rows[3], swapped(rows[4]), same])
    held = encoded(tokenizer, [rows[7] | {"chosen": "another"}, {"prompt": "new", "chosen": "a", "rejected": "b"}])
    report = build_report(Split(train, held, (SourceCount("f.jsonl", "pairs", 24, 24),), 3), 4, 0)
    assert (report.records, report.pairs, report.eval_pairs) == (23, 23, 2)
    assert (report.duplicates, report.conflicts, report.overlap) == (2, 1, 1)
    assert (report.dropped, report.skipped_rows) == ({"identical_text": 1, "identical_after_rendering": 0}, 3)
    lengths = [(len(group.responses[0]), len(group.responses[1])) for group in train.groups]
    unequal = [pair for pair in lengths if pair[0] != pair[1]]
    assert report.longer_chosen == pytest.approx(sum(a > b for a, b in unequal) / len(unequal))
    assert report.response.percentiles[0] == min(map(min, lengths))
    assert report.response.percentiles[-1] == max(map(max, lengths))
    assert report.packed == sum(len(ids) for group in train.groups for ids in group.sequences())
    assert report.shared < report.packed < report.padded
    shown = dict(report.rows())
    assert shown["conflicting pairs"] == "1 (same responses, opposite preference)"
    assert shown["eval pairs"] == "2 (1 with a prompt that is also in the training set)"
    assert shown["source f.jsonl"] == "pairs; 24 rows, 24 used"
    draw_lengths(train, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_an_example_shows_special_tokens_and_where_the_reward_is_read(tokenizer: Any) -> None:
    train = encoded(tokenizer, pair_rows(1))
    text = example(Encoder(tokenizer, 512), train.metadata[0], train.groups[0])
    ids = train.groups[0].sequence(0)
    assert tokenizer.decode(ids) in text
    assert tokenizer.eos_token in text
    assert f"({len(ids)} tokens; the reward is taken at the last one" in text
    assert f"id {ids[-1]}" in text
