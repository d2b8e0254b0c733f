"""What is downloaded from a repository, and which copy is used without a network. The Hub is local."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from hub_stub import GATEWAY_PAGE, Repo, StubHub

from rmtool.checkpoint import resolve_checkpoint
from rmtool.checkpoint.download import download
from rmtool.errors import RmtoolError
from rmtool.ui import SilentUi

INDEX = "model.safetensors.index.json"
SHARDS = {f"model-0000{n}-of-00002.safetensors": bytes(3 * 2**20 // n) for n in (1, 2)}
SMALL = {
    **dict.fromkeys(("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"), b"{}"),
    **dict.fromkeys(("chat_template.jinja", "additional_chat_templates/rag.jinja", "merges.txt"), b"x"),
    **dict.fromkeys(("rmtool.json", "vocab.json", "tekken.json", "qwen.tiktoken", "spiece.model", "vocab.txt"), b"x"),
    "tokenizer.model": b"x",
}
SHARDED = {
    **SMALL,
    INDEX: json.dumps({"weight_map": {f"weight of {name}": name for name in SHARDS}}).encode(),
    **SHARDS,
}
REST = dict.fromkeys(
    (
        *("consolidated.00.pth", "consolidated.safetensors", "original/params.json", "original/tokenizer.model"),
        *("checkpoint-500/model.safetensors", "checkpoint-500/config.json", "checkpoint-500/tokenizer.json"),
        *("adapter/adapter_model.safetensors", "adapter_model.safetensors", "onnx/model.onnx", "onnx/config.json"),
        *("pytorch_model.bin", "model.fp16.safetensors", "model-00001-of-00005.safetensors", "flax_model.msgpack"),
        *("trainer_state.json", "all_results.json", "params.json", "log.txt", "requirements.txt", "training_args.json"),
        *("README.md", ".gitattributes", "img/templates/a.jinja", "additional_chat_templates/old/rag.jinja"),
    ),
    b"not a part of the checkpoint",
)


class Recorder(SilentUi):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.total, self.steps = 0, []

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, label: str, total: int | None, unit: str) -> Any:
        self.total = total or 0
        return super().progress(label, total, unit)

    def advance(self, count: int = 1, note: str = "") -> None:
        self.steps.append(count)


@pytest.fixture
def repo(stub: StubHub) -> Repo:
    stub.repos["me/rm"] = Repo(False, {**SHARDED, **REST})
    return stub.repos["me/rm"]


def get(revision: str | None = None, weights: bool = True, ui: Any = None) -> Path:
    return resolve_checkpoint("me/rm", revision, ui or SilentUi(), weights)


def refusal(**options: Any) -> RmtoolError:
    with pytest.raises(RmtoolError) as caught:
        get(**options)
    return caught.value


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def requested(stub: StubHub) -> set[str]:
    return set(re.findall(r"/resolve/\w+/(\S+)\n", "".join(seen.body.decode() + "\n" for seen in stub.seen)))


def local(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_the_files_of_the_checkpoint_are_requested_and_the_copy_is_found_offline(
    stub: StubHub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = get()
    assert requested(stub) == set(SHARDED)
    assert local(folder) == SHARDED
    asked = len(stub.seen)
    offline(monkeypatch)
    ui = Recorder()
    assert get(ui=ui) == folder
    assert "using the downloaded copy of me/rm" in ui.said[0]
    assert len(stub.seen) == asked


def test_one_weights_file_is_preferred_to_an_index_as_transformers_does(stub: StubHub, repo: Repo) -> None:
    repo.files["model.safetensors"] = b"w"
    get()
    assert requested(stub) == {*SHARDED.keys() - SHARDS.keys(), "model.safetensors"}


def test_without_weights_only_small_files_are_requested_and_that_copy_is_not_one_with_weights(
    stub: StubHub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = get(weights=False)
    assert requested(stub) == {*SMALL, INDEX}
    offline(monkeypatch)
    assert get(weights=False) == folder
    error = refusal()
    assert (error.id, "model-00001-of-00002.safetensors" in error.what) == ("E0701", True)


def test_a_download_that_breaks_off_is_an_error_and_is_not_used_offline(
    stub: StubHub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.fail("get", 404)
    assert refusal().id == "E0701"
    stub.faults.clear()
    Path(get(), min(SHARDS)).resolve().unlink()
    offline(monkeypatch)
    assert min(SHARDS) in refusal().what


def test_the_revision_is_followed_and_each_has_its_own_copy(
    stub: StubHub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, sha = get(), repo.sha
    repo.commits.append(["config.json"])
    repo.files["config.json"] = b'{"v": 2}'
    repo.revisions = ("v2",)
    assert refusal(revision="v3").id == "E0701"
    new = get("v2")
    assert (local(new)["config.json"], local(old)["config.json"]) == (b'{"v": 2}', b"{}")
    offline(monkeypatch)
    assert (get("v2"), get(), get(sha)) == (new, old, old)
    assert refusal(revision="v3").id == "E0701"


def test_progress_is_in_bytes_while_a_file_arrives_and_complete_at_the_end(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 2**19)
    first, again = Recorder(), Recorder()
    get(ui=first)
    get(ui=again)  # from the cache
    assert first.total == sum(first.steps) == again.total == sum(again.steps) == 5
    assert first.steps.count(1) == 5
    assert max(again.steps) == 3


@pytest.mark.parametrize(
    ("files", "id", "named"),
    [
        ({**SMALL, "pytorch_model.bin": b"w" * 9}, "E0407", "pytorch_model.bin"),
        ({**SMALL, "consolidated.safetensors": b"w" * 9}, "E0407", "consolidated.safetensors"),
        ({**SMALL, "checkpoint-5/model.safetensors": b"w" * 9}, "E0407", "checkpoint-5/model.safetensors"),
        (SMALL, "E0407", "no safetensors weights"),
        ({"a.gguf": b"w"}, "E0404", "config.json not found"),
        ({"fp16/config.json": b"{}", "fp16/model.safetensors": b"w"}, "E0404", "config.json not found"),
        ({}, "E0404", "config.json not found"),
        ({name: value for name, value in SHARDED.items() if name != min(SHARDS)}, "E0471", min(SHARDS)),
        ({**SHARDED, INDEX: b"[]"}, "E0472", INDEX),
        ({**SHARDED, INDEX: b"{"}, "E0472", INDEX),
    ],
)
def test_a_repository_without_the_weights_is_an_error_before_any_are_requested(
    stub: StubHub, repo: Repo, files: dict[str, bytes], id: str, named: str
) -> None:
    repo.files = files
    error = refusal()
    assert (error.id, named in error.what) == (id, True)
    assert requested(stub) <= {INDEX}


def test_a_repository_with_folders_names_the_one_to_pass(repo: Repo) -> None:
    repo.files = {"fp16/config.json": b"{}"}
    assert "--include 'fp16/*'" in refusal().hint


def test_of_an_adapter_only_small_files_are_requested(stub: StubHub, repo: Repo) -> None:
    repo.files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w", "tokenizer.json": b"{}"}
    download("me/rm", None, SilentUi(), weights=True)
    assert requested(stub) == {"adapter_config.json", "tokenizer.json"}


def test_a_disk_without_space_is_an_error_before_weights_are_requested_unless_they_are_there(
    stub: StubHub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**20))
    error = refusal()
    assert (error.id, "5 MiB needed, 1 MiB free" in error.what) == ("E0502", True)
    assert requested(stub) <= {INDEX}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40))
    get()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**20))
    get()


def test_a_disk_that_becomes_full_is_not_taken_for_the_network(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    assert refusal().id == "E0502"


def test_the_page_of_a_proxy_is_no_bug(stub: StubHub, repo: Repo) -> None:
    stub.fail("info", 200, body=GATEWAY_PAGE)
    assert refusal().id == "E0701"
