"""Checkpoint folders: what is a Hub id, finding and downloading, atomic writing, and the manifest."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import write_jsonl

from rmtool.checkpoint import (
    default_model,
    is_hub_id,
    public_name,
    read_manifest,
    resolve_checkpoint,
    write_folder,
)
from rmtool.errors import RmtoolError
from rmtool.ui import SilentUi


@pytest.mark.parametrize("name", ["owner/name", "HuggingFaceTB/SmolLM2-135M", "a/b.c_d-e"])
def test_owner_and_name_is_a_hub_id(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name",
    [
        *("name", "a/b/c", "./a", "../a", "/a", "~/a", "runs/debug", "a/b c", "a--b/c", "a/b.git", "", "a/" + "b" * 97),
        *("a/pairs.jsonl", "a/pairs.JSONL.gz", "a/pairs.parquet", "a/recipe.yaml", "a/\0"),
    ],
)
def test_a_local_path_or_a_malformed_name_is_not_a_hub_id(name: str) -> None:
    assert not is_hub_id(name)


def test_an_existing_path_is_not_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("owner/name")
    Path("owner/name").mkdir(parents=True)
    assert not is_hub_id("owner/name")


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        *(("owner/name", "owner/name"), ("owner/name:split", "owner/name:split")),
        *(("bundled:debug/model", "bundled:debug/model"), ("/home/me/pairs.jsonl", "pairs.jsonl")),
        *(("data/pairs.jsonl", "pairs.jsonl"), ("C:\\me\\b.jsonl", "b.jsonl"), ("/", "a local path")),
    ],
)
def test_published_names_contain_no_local_folder(source: str, shown: str) -> None:
    assert public_name(source) == shown


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write_folder(target, lambda folder: write_jsonl(folder / "a", [{"v": 1}]) and None)
    old = (target / "a").read_bytes()

    def fails(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RmtoolError) as caught:
        write_folder(target, fails)
    assert caught.value.id == "E0502"
    assert (target / "a").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("umask", "folder_mode", "file_mode"), [(0o022, 0o755, 0o644), (0o002, 0o775, 0o664), (0o077, 0o700, 0o600)]
)
def test_permissions_are_those_of_the_umask(umask: int, folder_mode: int, file_mode: int, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    def fill(folder: Path) -> None:
        save_file({"score.weight": np.zeros(2)}, folder / "model.safetensors")  # creates it with 0600
        (folder / "templates").mkdir()
        (folder / "templates" / "a.jinja").write_text("")

    before = os.umask(umask)
    try:
        write_folder(tmp_path / "model", fill)
    finally:
        os.umask(before)
    modes = {(path.is_dir(), path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    assert modes == {(True, folder_mode), (False, file_mode)}


def test_the_default_model_is_the_environments_then_the_newest_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_model(tmp_path) == "allenai/Llama-3.1-Tulu-3-8B-RM"
    for age, name in ((200, "old"), (100, "new"), (0, "unfinished")):
        folder = tmp_path / name / "model"
        folder.mkdir(parents=True)
        if name != "unfinished":
            (folder / "rmtool.json").write_text("{}")
            os.utime(folder / "rmtool.json", (1e9 - age, 1e9 - age))
    assert default_model(tmp_path) == str(tmp_path / "new" / "model")
    monkeypatch.setenv("RMTOOL_MODEL", "me/rm")
    assert default_model(tmp_path) == "me/rm"


def test_a_run_folder_stands_for_its_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "run" / "model")
    assert resolve_checkpoint(str(tmp_path / "run"), None, SilentUi()) == tmp_path / "run" / "model"
    assert read_manifest(tmp_path / "run" / "model") is None


@pytest.mark.parametrize(
    ("name", "id"), [("./no", "E0404"), ("runs/no/model", "E0404"), ("no", "E0404"), ("a/b", "E0701")]
)
def test_a_model_that_is_nowhere(name: str, id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RmtoolError) as caught:
        resolve_checkpoint(name, None, SilentUi())
    assert caught.value.id == id


@pytest.mark.parametrize(("layout", "reason"), [("shared", None), ("padded: it uses dropout", "it uses dropout")])
def test_manifests_with_the_older_layout_key_are_read(layout: str, reason: str | None, tmp_path: Path) -> None:
    texts = dict.fromkeys(("fingerprint", "precision", "on_long", "on_empty", "recipe", "base_model"), "x")
    values = {**texts, "max_length": 8, "train_data": [], "layout": layout}
    (tmp_path / "rmtool.json").write_text(json.dumps(values))
    manifest = read_manifest(tmp_path)
    assert manifest
    assert manifest.padded_reason == reason
