"""The record cache: a source is parsed once, and what is read from its entry is what was parsed."""

from __future__ import annotations

import datetime
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from helpers import pair_rows, write_jsonl

from rmtool.config import Source
from rmtool.data import sources
from rmtool.data.cache_files import cache_folder
from rmtool.data.record import PLAIN, Message, Record, RowOptions
from rmtool.data.record_store import BATCH, RecordStore, RecordWriter
from rmtool.data.rejects import Rejects
from rmtool.data.sources import LoadedSource, load_source, select
from rmtool.errors import Place, RmtoolError


def entries() -> list[Path]:
    return sorted(cache_folder("records").glob("*"))


def load(path: Path, rejects: Rejects | None = None, options: RowOptions = PLAIN, **more: Any) -> LoadedSource:
    return load_source(str(path), options, rejects or Rejects(), use_cache=True, **more)


def content(loaded: LoadedSource) -> tuple[Any, ...]:
    records = [loaded.records[index] for index in range(len(loaded.metadata))]
    return loaded.count, loaded.metadata, loaded.digest, records, [record.row for record in records]


def no_parser(*arguments: Any) -> Any:
    pytest.fail("parsed again")


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    prompt, answers = (Message("user", "naïve \ud800?", '{"name": "x"}'),), ((Message("assistant", ""),),) * 3
    plain = Record(Place("f\udcff.jsonl", 3), prompt, answers, ((0, 1), (2, 1)), (None, 0.1), row={"a": [1, None]})
    other = Record(Place("g[1]"), (), answers, (), (), "s\u2028", 0.5, "[]", {}, (Place("g", 1, 2), Place("h")))
    records = [plain, other] * BATCH
    with open(tmp_path / "x", "w+b") as file:
        writer = RecordWriter(file, tmp_path)
        for record in records:
            writer.append(record)
            writer.append_invalid(RmtoolError("E0301", "what", "hint", Place("f", 1), "found"), {"row": 1})
        writer.finish(format="f")
        store = RecordStore(file)
        assert store.metadata() == [record.metadata() for record in records]
        for index in (0, 1, len(records) - 1, 77):
            assert (store[index], store[index].row) == (records[index], records[index].row)
        invalid = list(store.invalid_rows())
        assert (len(invalid), invalid[-1][1], invalid[-1][0].found) == (len(records), {"row": 1}, "found")
        assert store.facts["format"] == "f"


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet", "rated.jsonl"])
def test_a_source_is_parsed_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rows = tmp_path / name, [row | {"score_chosen": 2, "score_rejected": 1} for row in pair_rows(700)]
    if name == "pairs.parquet":
        dated = [row | {"when": datetime.datetime(2026, 1, 2)} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(dated), path)
    elif name == "rated.jsonl":
        write_jsonl(path, [{"prompt": f"p{n % 50}", "response": f"r{n}", "rating": n % 7} for n in range(300)])
    else:
        write_jsonl(path, rows)
    advanced = list[None]()
    first = load(path, advance=lambda: advanced.append(None), options=RowOptions(rating_margins=True))
    assert len(advanced) == first.count.records == (50 if name == "rated.jsonl" else 700)
    monkeypatch.setattr(sources, "read_rows", no_parser)
    second = load(path, options=RowOptions(rating_margins=True))
    assert content(second) == content(first)
    assert len(entries()) == 1
    subset = select([Source(str(path), fraction=0.3)], RowOptions(rating_margins=True), 0, Rejects(), use_cache=True)
    assert list(subset.metadata()) == [record.metadata() for record in subset.records()]


def test_without_the_cache_nothing_is_left(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", pair_rows(3))
    loaded = load_source(str(path), PLAIN, Rejects())
    assert not entries()
    assert content(loaded) == content(load(path))


def test_invalid_rows_are_neither_lost_nor_doubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.dumps(row) for row in pair_rows(600)]
    rows[1], rows[5], rows[300] = rows[1][:20], "[]", json.dumps({"prompt": "q", "chosen": 5, "rejected": "x"})
    (tmp_path / "p.jsonl").write_text("\n".join(rows) + "\n")
    written = []
    for name in ("first", "again"):
        with Rejects(tmp_path / name) as rejects:
            assert len(load(tmp_path / "p.jsonl", rejects).metadata) == 597
        written.append((tmp_path / name).read_text())
        monkeypatch.setattr(sources, "read_rows", no_parser)
        refused = Rejects()
        load(tmp_path / "p.jsonl", refused)
        with pytest.raises(RmtoolError) as caught:
            refused.raise_if_any()
        assert [row.partition(": ")[0].split(":")[1] for row in caught.value.rows] == ["2", "6", "301"]
    assert written[0].count("\n") == 3
    assert written[0] == written[1]


@pytest.mark.parametrize("change", ["flipped", "truncated", "empty"])
def test_a_corrupted_entry_is_parsed_again(tmp_path: Path, change: str) -> None:
    path, notes = write_jsonl(tmp_path / "p.jsonl", pair_rows(9)), list[str]()
    first = content(load(path))
    (entry,) = entries()
    changed = bytearray(entry.read_bytes())
    changed[len(changed) // 2] ^= 1
    entry.write_bytes({"flipped": changed, "truncated": changed[:-9], "empty": b""}[change])
    assert content(load(path, say=notes.append)) == first
    assert notes == [f"note: record cache {entry} is corrupted (checksum mismatch); creating it again"]
    assert entries() == [entry]
    assert content(load(path, say=pytest.fail)) == first


def test_a_changed_source_is_parsed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other text of the same size and with the same modification time, at once; other options; other code."""
    rows = pair_rows(5)
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    before = path.stat()
    load(path)
    write_jsonl(path, [rows[0] | {"chosen": rows[0]["chosen"].upper()}, *rows[1:]])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = load(path)
    assert changed.records[0].responses[0][0].content == rows[0]["chosen"].upper()
    load(path, options=replace(PLAIN, columns=(("chosen", "rejected"), ("rejected", "chosen"))))
    monkeypatch.setattr(sources, "_code", lambda: "changed")
    load(path)
    assert len(entries()) == 4


def test_a_file_that_was_changed_just_now_could_change_unseen_and_is_waited_for(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", pair_rows(5))
    sources._identity(str(path))
    assert time.time() - path.stat().st_ctime >= sources._CLOCK_TICK_S


def test_a_file_that_is_being_written_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", pair_rows(5))
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: os.utime(path))
    monkeypatch.setattr(sources.time, "time", lambda: path.stat().st_ctime)
    assert sources._identity(str(path)) is None
    assert len(load(path).metadata) == 5
    assert not entries()


def test_a_source_that_changes_while_it_is_read_has_no_entry(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", pair_rows(5))

    def advance() -> None:
        with open(path, "a") as file:
            file.write("\n")

    assert len(load(path, advance=advance).metadata) == 5
    assert not entries()
