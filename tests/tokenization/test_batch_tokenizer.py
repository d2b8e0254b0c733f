"""Many conversations at once have the ids that transformers gives them one by one; what is kept is what was made."""

from __future__ import annotations

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import KINDS, TEMPLATES, with_template
from helpers import pair_rows, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from rmtool.config import Source
from rmtool.data.record import PLAIN, Message
from rmtool.data.rejects import Rejects
from rmtool.data.sources import select
from rmtool.dataset import cache
from rmtool.dataset.split import tokenize_subset
from rmtool.errors import RmtoolError
from rmtool.tokenization import encoder as encode
from rmtool.tokenization.batch_tokenizer import BatchTokenizer, Conversation
from rmtool.tokenization.encoder import Encoder
from rmtool.tokenization.tokenized_dataset import TokenizedDataset
from rmtool.ui import SilentUi

TEXT = st.text(alphabet=st.sampled_from("ab \n\tü你👋'<|im_startend>.,1"), max_size=25)
SAMPLES = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def slow(tokenizer: Any, conversation: Conversation) -> list[int]:
    chat = [message.as_dict() for message in conversation.messages]
    ids: list[int] = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, sanitize_control_tokens=True)
    return ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ChatML", "Llama 3", "Llama 2", "Tulu", "DeepSeek"])
@SAMPLES
@given(st.lists(st.lists(TEXT, min_size=2, max_size=4), min_size=1, max_size=3))
def test_ids_are_those_of_transformers(tokenizer: Any, name: str, kind: str, groups: list[list[str]]) -> None:
    reader = with_template(KINDS[kind](tokenizer), name)
    prompt = (Message("user", "Hello, 你."), Message("assistant", " a "), Message("user", groups[0][0]))
    conversations = [[Conversation((*prompt, Message("assistant", text))) for text in group] for group in groups]
    for group, results in zip(conversations, BatchTokenizer(reader).read(conversations), strict=True):
        for conversation, ids in zip(group, results, strict=True):
            assert list(ids) == slow(reader, conversation)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_common_beginning_is_tokenized_once(tokenizer: Any, name: str) -> None:
    batch_tokenizer = BatchTokenizer(with_template(KINDS["byte-level BPE"](tokenizer), name))
    prompt = (Message("user", "a " * 50), Message("assistant", "b " * 50), Message("user", "c " * 50))
    group = [Conversation((*prompt, Message("assistant", text))) for text in ("yes", "no")]
    (draft,) = batch_tokenizer.render([group])
    assert sum(map(len, (draft.head, *draft.tails))) < 1.8 * len(batch_tokenizer.tokenizer.apply_chat_template(
        [message.as_dict() for message in group[0].messages], tokenize=False
    ))  # fmt: skip


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("\n<|im_start|>", normalized=False),
        AddedToken("<|im_start|> y", normalized=False),
        AddedToken("q<", normalized=False),
        AddedToken("<|im_start|>", normalized=False, lstrip=True),
        AddedToken("<|im_start|>", normalized=False, single_word=True),
        AddedToken("<|im_start|>", normalized=False, rstrip=True),
    ],
    ids=str,
)
def test_text_is_cut_only_where_the_tokenizer_would(tokenizer: Any, token: AddedToken) -> None:
    reader = KINDS["byte-level BPE"](tokenizer)
    reader.add_tokens([token])
    reader.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    prompt = (Message("user", "Hello q"), Message("assistant", "q \n"), Message("user", " more q"))
    for count in (1, 2, 3):
        group = [Conversation((*prompt[:count], Message("assistant", text))) for text in (" yes", " no")]
        for conversation, ids in zip(group, BatchTokenizer(reader).read([group])[0], strict=True):
            assert list(ids) == slow(reader, conversation)


def test_batches_end_anywhere_and_errors_stay_in_their_place(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH", 16)
    rows = pair_rows(70)
    rows[33]["chosen"] = " "
    rows[69]["rejected"] = "<|im_end|>"
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    selection = select([Source(str(source))], PLAIN, 0, Rejects(), lambda: None)
    encoder = Encoder(tokenizer, 512)
    outcomes = list(encoder.encode_many(selection.records()))
    assert [outcome.record.place.line for outcome in outcomes] == list(range(1, 71))
    assert [at for at, outcome in enumerate(outcomes) if outcome.error] == [33]
    for outcome in outcomes[:33] + outcomes[34:]:
        assert outcome.group is not None
        alone, _ = encoder.encode(outcome.record)
        assert alone is not None
        assert all(map(np.array_equal, outcome.group.sequences(), alone.sequences()))


# ------------------------------------------------------------------------------------------------------ kept


def tokenized(
    path: Path, encoder: Encoder, rejects: Rejects | None = None, on_identical: str = "drop", kept: bool = True
) -> TokenizedDataset:
    rejects = rejects or Rejects()
    selection = select([Source(str(path))], PLAIN, 0, rejects, lambda: None)
    return tokenize_subset(
        encoder, selection, on_identical=on_identical, kept=kept, label="training", rejects=rejects, ui=SilentUi()
    )


def entries() -> list[Path]:
    folder = cache.cache_folder()
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


@pytest.mark.parametrize("file", ["ids.bin", "index.npz", "entry.json"])
@pytest.mark.parametrize("harm", ["cut", "flipped", "gone", "empty", "[]", '{"counts": 5}', "[" * 10**5])
def test_a_damaged_entry_is_made_again(tokenizer: Any, tmp_path: Path, file: str, harm: str) -> None:
    path, encoder = write_jsonl(tmp_path / "p.jsonl", pair_rows(5)), Encoder(tokenizer, 64)
    first = tokenized(path, encoder, kept=False)
    assert not entries()
    tokenized(path, encoder)
    target = entries()[0] / file
    content = bytearray(target.read_bytes())
    if harm == "gone":
        target.unlink()
    elif harm in ("cut", "flipped"):
        middle = len(content) // 2
        content[middle] ^= 0x55
        target.write_bytes(content[:middle] if harm == "cut" else content)
    else:
        target.write_text(harm.removeprefix("empty"))
    said = list[str]()
    assert cache.get(entries()[0].name, said.append) is None
    assert "is damaged" in said[0]
    assert same(tokenized(path, encoder), first)


def test_every_flipped_bit_of_an_entry_is_seen(tokenizer: Any, tmp_path: Path) -> None:
    tokenized(write_jsonl(tmp_path / "p.jsonl", pair_rows(3)), Encoder(tokenizer, 64))
    (entry,) = entries()
    saved = shutil.copytree(entry, tmp_path / "saved")
    places = [(file.name, at) for file in saved.iterdir() for at in range(file.stat().st_size)]
    for at, (name, offset) in enumerate(places[:: len(places) // 400]):
        shutil.copytree(saved, entry, dirs_exist_ok=True)
        content = bytearray((saved / name).read_bytes())
        content[offset] ^= 1 << at % 8
        (entry / name).write_bytes(content)
        assert cache.get(entry.name, lambda text: None) is None, (name, offset)


def test_old_entries_go_and_nothing_else(tokenizer: Any, tmp_path: Path) -> None:
    path, encoder = write_jsonl(tmp_path / "p.jsonl", pair_rows(5)), Encoder(tokenizer, 64)
    tokenized(path, encoder)
    root, now, day = cache.cache_folder(), time.time(), 24 * 3600
    ages = {
        entries()[0]: 31,
        root / ".tmp-killed": 2,
        root / ".tmp-at_work": 2,
        root / "mine": 400,
        root.parent / "mine": 400,
        root / ("0" * 31): 400,
        root / ("a" * 32): 29,
    }
    for folder, days in ages.items():
        folder.mkdir(exist_ok=True)
        (folder / "ids.bin").touch()
        for each in (folder / "ids.bin", folder):
            os.utime(each, (now - days * day, now - days * day))
    (root / ".tmp-at_work/ids.bin").write_bytes(b"grows")
    tokenized(path, Encoder(tokenizer, 65))
    gone = {folder for folder in ages if not folder.exists()}
    assert gone == set(list(ages)[:2])


def test_entries_may_be_written_at_the_same_time() -> None:
    """The same entry, and others, by two threads in step: what another renames or removes meanwhile is no error."""
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
    assert all(cache.get(entry.name, pytest.fail) for entry in entries())


def test_a_cache_that_may_only_be_read_is_not_damaged(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path, encoder = write_jsonl(tmp_path / "p.jsonl", pair_rows(5)), Encoder(tokenizer, 64)
    first = tokenized(path, encoder)

    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("rmtool.dataset.cache.os.utime", refuse)
    found = cache.get(entries()[0].name, pytest.fail)
    assert found is not None
    assert found.indices == first.indices


def test_a_cache_that_cannot_be_written_says_so(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("RMTOOL_CACHE", str(tmp_path / "file"))
    with pytest.raises(RmtoolError) as caught:
        tokenized(write_jsonl(tmp_path / "p.jsonl", pair_rows(5)), Encoder(tokenizer, 64))
    assert caught.value.id == "E0502"
    # eval has no --set
    assert caught.value.hint.endswith("another folder in $RMTOOL_CACHE; train also has --set data.cache=false")
