"""Downloading a checkpoint from the Hub: only the files that transformers reads, into the Hub's cache.

In: a repository and a revision. Out: the folder of that commit in the cache, with config, tokenizer, chat templates and
the weights that the index names: not those of other formats, earlier checkpoints and adapters in the same repository.
Cost: one listing, and each file once. When the Hub cannot be reached, a complete copy in the cache is used.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from rmtool.checkpoint.foreign import ADAPTER, PICKLED_HEADS, QUANTIZATION_FILES
from rmtool.errors import Place, RmtoolError, first_line
from rmtool.packages import hub_http
from rmtool.ui import Ui

WEIGHTS = "model.safetensors"
# What transformers and rmtool read, by the names in the tokenizers' `vocab_files_names`; quantize_config.json and the
# like are read to refuse such weights. Not a trainer's states and logs.
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja", "chat_template*.json"),
    *("vocab*", "*merges*.txt", "*.model", "*.tiktoken", "tekken.json", "prophetnet.tokenizer", "bpe.codes"),
    *("byte_maps.json", "emoji.json", "entity_vocab.json", "dict.txt"),
)
NON_WEIGHT_FILES = (
    *("config.json", "generation_config.json", "rmtool.json", ADAPTER, *QUANTIZATION_FILES),
    *(*TOKENIZER_FILES, f"{WEIGHTS}.index.json"),
)
TEMPLATES = "additional_chat_templates/"
HEADS = ("*head*.safetensors", *PICKLED_HEADS)  # LLaMA-Factory's value_head
_OF_THIS_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def download(repo_id: str, revision: str | None, ui: Ui, weights: bool) -> Path:
    """Return the folder of a checkpoint, downloaded file by file: snapshot_download has no timeout.

    Raises:
        RmtoolError: E0404 the repository has no checkpoint in its root; E0407 it has no safetensors weights; E0471 a
            weights file is missing; E0472 the index is corrupted; E0502 the disk is full; E0701 the Hub has no such
            repository or cannot be reached, and the cache has no complete copy.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=30)
        return _fetch(repo_id, info, revision, ui, weights)
    # RuntimeError: the Xet storage; ValueError: the page of a proxy.
    except (hub_http().HTTPError, OSError, RuntimeError, ValueError) as error:
        if getattr(error, "errno", None) in _OF_THIS_MACHINE:
            raise _cannot_store(repo_id, os.strerror(error.errno)) from error  # type: ignore[union-attr, arg-type]
        try:
            folder = _cached(repo_id, revision, weights)
        except LocalEntryNotFoundError:
            what = f"cannot find the model {repo_id} locally or on the Hub"
        except RmtoolError as incomplete:
            what = f"cannot find the model {repo_id} on the Hub, and its copy is incomplete: {incomplete.what}"
        else:
            ui.say(f"note: cannot reach the Hub, using the downloaded copy of {repo_id}")
            return folder
        hint = "check the name, revision and network, run `hf auth login` if it is gated, or pass a local folder"
        raise RmtoolError("E0701", what, hint, found=first_line(error)) from error


def _fetch(repo_id: str, info: Any, revision: str | None, ui: Ui, weights: bool) -> Path:
    """Download the files of the commit `info`, and note it as the cache's copy of the revision."""
    from huggingface_hub import hf_hub_download

    found = {file.rfilename: file for file in info.siblings or []}

    def fetch(name: str, **options: Any) -> Path:
        return Path(hf_hub_download(repo_id, name, revision=info.sha, **options))

    names = checkpoint_files(repo_id, found, fetch, weights)
    _check_space(repo_id, [found[name] for name in names])
    sizes = {name: found[name].size or 0 for name in names}
    done = 0
    with ui.progress(f"Downloading {repo_id}", _mib(sum(sizes.values())), "MiB") as bar:

        def advance(to: int, name: str) -> None:
            nonlocal done
            bar.advance(_mib(to) - _mib(done), name)
            done = to

        for name, size in sizes.items():
            end = done + size
            fetch(name, tqdm_class=_reporter(lambda count, name=name: advance(done + count, name)))  # type: ignore[misc]
            advance(end, name)  # a file in the cache reports nothing
    folder = fetch("config.json" if "config.json" in names else ADAPTER).parent
    ref = folder.parent.parent / "refs" / (revision or "main")  # hf_hub_download of a commit writes none
    if ref.name != info.sha:
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(info.sha)
    return folder


def checkpoint_files(repo_id: str, names: Collection[str], path: Callable[[str], Path], weights: bool) -> list[str]:
    """Select the files of a checkpoint in a repository's root, and its chat templates.

    Args:
        names: all files of the repository.
        path: returns the local path of a file; called for the index of the weights.

    Raises:
        RmtoolError: E0404, E0407, E0471, E0472 as from `download`.
    """
    from huggingface_hub.utils import filter_repo_objects

    root = [name for name in names if "/" not in name.removeprefix(TEMPLATES)]
    files = sorted(filter_repo_objects(root, allow_patterns=list(NON_WEIGHT_FILES)))
    if ADAPTER in files:  # refused with what it adapts
        return files
    if "config.json" not in files:
        inner = next((name.partition("/")[0] for name in sorted(names) if name.endswith("/config.json")), None)
        hint = "check the name"
        if inner:
            pattern = shlex.quote(f"{inner}/*")
            hint = f"run hf download {repo_id} --include {pattern} --local-dir NAME, then pass NAME/{inner}"
        raise RmtoolError("E0404", f"{repo_id} contains no checkpoint: config.json not found", hint)
    if not weights:
        return files
    heads = sorted(filter_repo_objects(root, allow_patterns=list(HEADS)))
    return list(dict.fromkeys((*files, *heads, *_weights_of(repo_id, names, path))))


def _weights_of(repo_id: str, names: Collection[str], path: Callable[[str], Path]) -> list[str]:
    index = f"{WEIGHTS}.index.json"
    if WEIGHTS in names:  # transformers prefers it, too
        return [WEIGHTS]
    if index not in names:
        other = sorted(name for name in names if name.endswith((".bin", ".safetensors", ".gguf", ".pt", ".pth")))
        what = f"no safetensors weights found in {repo_id}" + (f", but {other[0]}" if other else "")
        hint = f"use a repository with {WEIGHTS}, or save the model with save_pretrained and pass its folder"
        raise RmtoolError("E0407", what, hint)
    file = path(index)
    try:
        shards = sorted({str(name) for name in json.loads(file.read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "use a different revision, or save the model with save_pretrained"
        raise RmtoolError("E0472", f"cannot read {index}: corrupted", hint, Place(str(file))) from error
    if missing := [name for name in shards if name not in names]:
        what = f"incomplete checkpoint: {', '.join(missing)} not found in {repo_id}, but named in {index}"
        raise RmtoolError("E0471", what, "use a different revision or repository")
    return shards


def _cached(repo_id: str, revision: str | None, weights: bool) -> Path:
    """Find a complete copy in the cache.

    Raises:
        LocalEntryNotFoundError: there is none of this revision.
        RmtoolError: it lacks files.
    """
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=["config.json"], local_files_only=True))
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    checkpoint_files(repo_id, names, folder.joinpath, weights)
    return folder


def _check_space(repo_id: str, files: list[Any]) -> None:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE)
    blobs = cache / repo_folder_name(repo_id=repo_id, repo_type="model") / "blobs"
    needed = sum(file.size or 0 for file in files if file.lfs and not (blobs / file.lfs.sha256).exists())
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if needed > free:
        raise _cannot_store(repo_id, f"{_mib(needed):,} MiB needed, {_mib(free):,} MiB free in {cache}")


def _cannot_store(repo_id: str, reason: str) -> RmtoolError:
    hint = "free disk space, or set HF_HOME to a different folder"
    return RmtoolError("E0502", f"cannot download {repo_id}: {reason}", hint)


def _mib(size: int) -> int:
    return -(-size // 2**20)


def _reporter(report: Callable[[int], None]) -> type:
    """Return a progress bar for hf_hub_download that only reports the bytes that have arrived."""
    from tqdm import tqdm

    class Reporter(tqdm):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            report(int(n or 0))

        # The Xet storage has a second count, of compressed bytes.
        def update_transfer(self, n: float | None = 1) -> None: ...
        def set_transfer_postfix_str(self, *_: object, **__: object) -> None: ...

    return Reporter
