"""The cache: what was parsed and tokenized is read again, unless anything it depends on changed or it is corrupted."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from helpers import PROGRAM, pair_rows, write_jsonl
from safetensors import SafetensorError

from rmtool.config import Source
from rmtool.data.cache_files import cache_folder
from rmtool.data.record import PLAIN
from rmtool.data.rejects import Rejects
from rmtool.data.sources import select
from rmtool.dataset import cache
from rmtool.dataset.split import read_sources, tokenize_subset
from rmtool.errors import RmtoolError
from rmtool.tokenization.encoder import Encoder
from rmtool.tokenization.tokenized_dataset import TokenizedDataset
from rmtool.ui import SilentUi, TerminalUi


def tokenized(
    path: Path, encoder: Encoder, rejects: Rejects | None = None, on_identical: str = "drop", use_cache: bool = True
) -> TokenizedDataset:
    rejects = rejects or Rejects()
    selection = select([Source(str(path))], PLAIN, 0, rejects)
    return tokenize_subset(
        encoder,
        selection,
        on_identical=on_identical,
        use_cache=use_cache,
        label="training",
        rejects=rejects,
        ui=SilentUi(),
    )


def entries() -> list[Path]:
    folder = cache_folder(cache.TOKENS)
    return sorted(folder.iterdir()) if folder.exists() else []


def same(a: TokenizedDataset, b: TokenizedDataset) -> bool:
    equal = (a.metadata, list(a.indices), a.counts, a.failed) == (b.metadata, list(b.indices), b.counts, b.failed)
    pairs = zip(a.groups, b.groups, strict=True)
    return equal and all(all(map(np.array_equal, x.sequences(), y.sequences())) for x, y in pairs)


def write_rows(path: Path) -> Path:
    """A pair of equal responses, one too long, one empty, one tied, and others."""
    rows: list[dict[str, Any]] = pair_rows(12)
    rows[2]["rejected"] = rows[2]["chosen"]
    rows[4]["prompt"] = "long " * 200
    rows[6]["chosen"] = ""
    return write_jsonl(path, rows)


def test_what_was_tokenized_is_taken_from_the_cache(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path, encoder = write_rows(tmp_path / "p.jsonl"), Encoder(tokenizer, 64, "drop", "drop")
    first = tokenized(path, encoder)
    assert first.counts == {"identical_text": 1, "too_long": 1, "empty_response": 1}
    monkeypatch.setattr(Encoder, "encode_many", None)
    second = tokenized(path, encoder)
    assert same(first, second)
    assert len(entries()) == 1
    copy = path.rename(tmp_path / "elsewhere.jsonl")  # what counts is content, not a name or a time
    assert len(tokenized(copy, encoder).metadata) == len(first.metadata)
    assert tokenized(copy, encoder).metadata[0].place.file == str(copy)


def test_bad_rows_are_refused_from_the_cache_too(tokenizer: Any, tmp_path: Path) -> None:
    path, encoder = write_rows(tmp_path / "p.jsonl"), Encoder(tokenizer, 64)
    for _ in range(2):
        rejects = Rejects()
        found = tokenized(path, encoder, rejects, "error")
        assert (found.failed, rejects.count) == ([2, 4, 6], 3)
        with pytest.raises(RmtoolError) as caught:
            rejects.raise_if_any()
        assert [row.partition(": ")[0] for row in caught.value.rows] == [f"{path}:{line}" for line in (3, 5, 7)]
    assert len(entries()) == 1


def test_nothing_else_is_taken_for_it(tokenizer: Any, tmp_path: Path) -> None:
    """Another character, template, vocabulary, limit or choice is another entry."""
    import copy

    path, base = write_jsonl(tmp_path / "p.jsonl", pair_rows(5)), Encoder(tokenizer, 64)
    tokenized(path, base)
    template, vocabulary = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    template.chat_template = tokenizer.chat_template + " "
    vocabulary.add_tokens(["indeed"])
    others = [Encoder(template, 64), Encoder(vocabulary, 64), Encoder(tokenizer, 65), Encoder(tokenizer, 64, "drop")]
    others += [Encoder(tokenizer, 64, on_empty="keep"), Encoder(tokenizer, 64, strip_trailing_id=2)]
    for count, other in enumerate(others, 2):
        tokenized(path, other)
        assert len(entries()) == count
    tokenized(path, base, on_identical="error")
    rows = pair_rows(5)
    rows[4]["rejected"] += "."
    tokenized(write_jsonl(path, rows), base)
    tokenized(write_jsonl(path, pair_rows(4)), base)
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in pair_rows(5)]
    tokenized(write_jsonl(path, swapped), base)
    assert len(entries()) == len(others) + 5


@pytest.mark.parametrize("change", ["truncated", "flipped", "gone", "empty", "[]", '{"counts": 5}', "[" * 10**5])
def test_a_corrupted_entry_is_made_again(tokenizer: Any, tmp_path: Path, change: str) -> None:
    path, encoder = write_jsonl(tmp_path / "p.jsonl", pair_rows(5)), Encoder(tokenizer, 64)
    first = tokenized(path, encoder, use_cache=False)
    assert not entries()
    tokenized(path, encoder)
    (entry,) = entries()
    content = bytearray(entry.read_bytes())
    if change == "gone":
        entry.unlink()
    elif change in ("truncated", "flipped"):
        middle = len(content) // 2
        content[middle] ^= 0x55
        entry.write_bytes(content[:middle] if change == "truncated" else content)
    else:
        entry.write_text(change.removeprefix("empty"))
    notes = list[str]()
    assert cache.get(entry.name.partition("-")[0], notes.append) is None
    assert (change == "gone") == (not notes)
    assert all(note.startswith(f"note: token cache {entry} is corrupted") for note in notes)
    assert same(tokenized(path, encoder), first)
    assert entries() == [entry]


def test_every_flipped_bit_of_an_entry_is_seen(tokenizer: Any, tmp_path: Path) -> None:
    tokenized(write_jsonl(tmp_path / "p.jsonl", pair_rows(3)), Encoder(tokenizer, 64))
    (entry,) = entries()
    content = entry.read_bytes()
    for at, offset in enumerate(range(0, len(content), max(1, len(content) // 400))):
        changed = bytearray(content)
        changed[offset] ^= 1 << at % 8
        entry.write_bytes(changed)
        assert cache.get(entry.name.partition("-")[0], lambda text: None) is None, offset


def test_an_entry_is_a_safetensors_file(tokenizer: Any, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    first = tokenized(write_jsonl(tmp_path / "p.jsonl", pair_rows(5)), Encoder(tokenizer, 64))
    arrays = load_file(entries()[0])
    expected = [np.concatenate((group.prompt, *group.responses)) for group in first.groups]
    assert np.array_equal(arrays["ids"], np.concatenate(expected))


def test_old_entries_go_and_nothing_else(tokenizer: Any, tmp_path: Path) -> None:
    path, encoder = write_jsonl(tmp_path / "p.jsonl", pair_rows(5)), Encoder(tokenizer, 64)
    tokenized(path, encoder)
    root, now, day = cache_folder(cache.TOKENS), time.time(), 24 * 3600
    ages = {
        entries()[0]: 31,
        root / ".tmp-killed": 2,
        root / ".tmp-at_work": 0,
        root / "mine": 400,
        root.parent / "mine": 400,
        root / ("0" * 32): 400,
        root / f"{'a' * 32}-{'0' * 8}.safetensors": 29,
    }
    for file, days in ages.items():
        file.touch()
        os.utime(file, (now - days * day, now - days * day))
    tokenized(path, Encoder(tokenizer, 65))
    assert {file for file in ages if not file.exists()} == set(list(ages)[:2])


def test_entries_may_be_written_at_the_same_time() -> None:
    """The same entry, and others, by two threads in step: what another one renames or removes is no error."""
    together, rounds = threading.Barrier(2), 150

    def write(mine: int) -> int:
        for at in range(rounds):
            together.wait(20)
            cache.put(f"{at:032x}", lambda groups: TokenizedDataset(groups=groups))
            cache.put(f"{mine}{at:031x}", lambda groups: TokenizedDataset(groups=groups))
        return rounds

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(write, (1, 2))) == [rounds, rounds]
    assert len(entries()) == 3 * rounds
    assert all(cache.get(entry.name.partition("-")[0], pytest.fail) for entry in entries())


def test_a_cache_that_may_only_be_read_is_not_damaged(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path, encoder = write_jsonl(tmp_path / "p.jsonl", pair_rows(5)), Encoder(tokenizer, 64)
    first = tokenized(path, encoder)

    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("rmtool.data.cache_files.os.utime", refuse)
    found = cache.get(entries()[0].name.partition("-")[0], pytest.fail)
    assert found is not None
    assert found.indices == first.indices


def test_a_cache_that_cannot_be_written_says_so(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("RMTOOL_CACHE", str(tmp_path / "file"))
    with pytest.raises(RmtoolError) as caught:
        tokenized(write_jsonl(tmp_path / "p.jsonl", pair_rows(5)), Encoder(tokenizer, 64))
    assert caught.value.id == "E0502"
    # eval has no --set
    assert caught.value.hint.endswith("to a different folder; rmtool train also has --set data.cache=false")


HOOK = """
import os, sys
def note(event, arguments):
    if event == "open" and str(arguments[0]) == os.environ["WATCHED"]:
        with os.fdopen(os.open(os.environ["WATCHED"] + ".log", os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w") as log:
            log.write(f"{os.getpid()} {os.environ.get('RANK', 'launcher')}\\n")
sys.addaudithook(note)
"""


def test_a_disk_that_gets_full_is_reported(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(4))
    full = Mock(side_effect=SafetensorError("IoError: No space left on device"))
    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(RmtoolError, match="No space left") as caught:
        tokenized(path, Encoder(tokenizer, 512))
    assert caught.value.id == "E0502"


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_disk_that_gets_full_while_tokenizing_is_reported(
    tokenizer: Any, tmp_path: Path, monkeypatch: Any, use_cache: bool
) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(4))
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("rmtool.tokenization.token_store.TokenStore.append", full)
    with pytest.raises(RmtoolError, match="No space left") as caught:
        tokenized(path, Encoder(tokenizer, 512), use_cache=use_cache)
    assert caught.value.id == "E0502"
    assert ("TMPDIR" in caught.value.hint) != use_cache


def test_an_error_of_the_tokenizer_is_not_one_of_the_disk(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(4))
    broken = Mock(side_effect=OSError(5, "Input/output error"))
    monkeypatch.setattr(Encoder, "encode_many", broken)
    with pytest.raises(OSError, match="Input/output error"):
        tokenized(path, Encoder(tokenizer, 512))


@pytest.mark.slow
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_node_parses_a_source_once(causal_lm: Path, tmp_path: Path, use_cache: bool) -> None:
    """The launcher and two ranks: who opens the file, by Python's audit events; and invalid rows are written once."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(40))
    with open(data, "a") as file:
        file.write("[]\n")
    settings = ("data.holdout=4", "train.batch_size=8", "train.max_steps=2", "train.precision=fp32",
                "launch.engine=ddp", f"data.cache={str(use_cache).lower()}")  # fmt: skip
    command = [PROGRAM, "train", "--recipe", "smollm2-135m", "--model", causal_lm, "--data", data,
               "--on-bad-row", "skip", "--gpus-per-node", "2", "--output", tmp_path / "run"]  # fmt: skip
    command += [word for setting in settings for word in ("--set", setting)]
    places = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    shown = subprocess.run(command, env=os.environ | {"PYTHONPATH": places, "WATCHED": str(data)}, capture_output=True,
                           text=True, cwd=tmp_path)  # fmt: skip
    assert shown.returncode == 1, shown.stderr
    readers = {line.partition(" ")[2] for line in Path(f"{data}.log").read_text().splitlines()}
    assert readers == ({"launcher"} if use_cache else {"launcher", "0", "1"})
    assert len((tmp_path / "run" / "rejects.jsonl").read_text().splitlines()) == 1


def test_a_cache_hit_counts_its_rows_and_reports_a_corrupted_entry(tmp_path: Path, capsys: Any) -> None:
    sources = [Source(str(write_jsonl(tmp_path / "pairs.jsonl", pair_rows(6))))]
    for _ in range(2):
        read_sources(sources, PLAIN, 0, Rejects(), TerminalUi())
        assert "pairs.jsonl: 6 rows" in capsys.readouterr().err
    (entry,) = cache_folder("records").iterdir()
    entry.write_bytes(entry.read_bytes()[:-9])
    read_sources(sources, PLAIN, 0, Rejects(), TerminalUi())
    assert f"record cache {entry} is corrupted" in capsys.readouterr().err


def test_records_are_kept_for_a_shorter_time_than_tokens(tmp_path: Path) -> None:
    """They contain the text, and a copy of a file is a different entry."""
    path = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(3))
    select([Source(str(path))], PLAIN, 0, Rejects(), use_cache=True)
    (entry,) = cache_folder("records").iterdir()
    old = time.time() - 3 * 24 * 3600
    os.utime(entry, (old, old))
    select([Source(str(write_jsonl(tmp_path / "more.jsonl", pair_rows(4))))], PLAIN, 0, Rejects(), use_cache=True)
    assert not entry.exists()
