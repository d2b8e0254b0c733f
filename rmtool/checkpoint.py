"""Checkpoint folders: found, checked, read and written whole or not at all.

In: a folder or Hub id. Out: a local folder with an ordinary transformers checkpoint (safetensors, config, tokenizer,
chat template) and `rmtool.json`, the manifest that says how its conversations were read.
A folder is written under a temporary name beside its place and renamed: a reader never meets half of one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rmtool.errors import Place, RmtoolError
from rmtool.ui import Ui

MANIFEST = "rmtool.json"
PADDED = "padded: "  # `Manifest.layout` of a run that did not share prompts, before the reason
HELD_OUT_FILE = "held_out.jsonl"  # beside the checkpoint, in the folder of the run that made it
NON_WEIGHT_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*")
DOWNLOAD = ("*.safetensors", *NON_WEIGHT_FILES)
DEFAULT_MODEL = "allenai/Llama-3.1-Tulu-3-8B-RM"


@dataclass(frozen=True)
class Manifest:
    """How a checkpoint came to be, and what another process must do to read conversations as it was trained to."""

    fingerprint: str  # Encoder.fingerprint of the tokenizer and chat template
    max_length: int
    precision: str
    on_long: str
    on_empty: str
    recipe: str
    base_model: str
    train_data: list[str]
    layout: str = ""  # how training read prompts: "shared", or "padded: " and why
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format: int = 1

    @property
    def padded_reason(self) -> str | None:
        """Why training used padded batches; None if it shared prompts."""
        return self.layout.removeprefix(PADDED) if self.layout.startswith(PADDED) else None


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest, or None for a checkpoint that rmtool did not write.

    Raises:
        RmtoolError: E0408 it is there and cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RmtoolError(
            "E0408",
            f"{MANIFEST} is damaged or of another version",
            "copy the checkpoint again",
            Place(str(path)),
            str(error),
        ) from error


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary folder, then give it the name `folder`, which must be free.

    Raises:
        RmtoolError: E0502 the disk refuses.
    """
    from safetensors import SafetensorError

    temporary = folder
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{folder.name}-", dir=folder.parent))
        temporary.chmod(0o755)
        fill(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                _fsync(path)
        temporary.rename(folder)
        _fsync(folder.parent)
    except (OSError, SafetensorError) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise RmtoolError("E0502", f"{folder} cannot be written: {what}", "free or change the disk") from error
    finally:
        if temporary != folder:
            shutil.rmtree(temporary, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Write a file next to `path`, and remove it: better before hours of work than after.

    Raises:
        RmtoolError: E0501 it cannot be written.
    """
    probe = path.with_name(f".probe-{os.getpid()}-{path.name}")
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise RmtoolError("E0501", f"cannot write {path}: {error.strerror}", "pass a different --output") from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def public_name(source: str) -> str:
    """A Hub id as it is, of a local path only its last part: a manifest is published with its checkpoint."""
    return source if source.count("/") == 1 and not Path(source).exists() else Path(source).name


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def finished_runs(root: Path) -> list[Path]:
    """Checkpoints of the finished runs below `root`, the newest last."""
    manifests = sorted(root.glob(f"*/model/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
    return [path.parent for path in manifests]


def default_model(root: Path) -> str:
    """$RMTOOL_MODEL, else the newest finished run below `root`, else the Tulu 3 reward model."""
    chosen = os.environ.get("RMTOOL_MODEL")
    if chosen:
        return chosen
    runs = finished_runs(root)
    return str(runs[-1]) if runs else DEFAULT_MODEL


def resolve_checkpoint(model: str, revision: str | None, ui: Ui, weights: bool = True) -> Path:
    """A local folder for `model`: itself, its `model/` if it is a run folder, or a download from the Hub, without its
    weights if they are not wanted.

    Raises:
        RmtoolError: E0404 there is no such folder or repository, E0701 the Hub is not reachable.
    """
    folder = Path(model).expanduser()
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if (folder / "config.json").is_file():
        return folder
    if folder.is_dir():
        raise RmtoolError(
            "E0404", f"{model} holds no checkpoint (no config.json)", "name the folder that has config.json"
        )
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1 or model.startswith("runs/"):
        raise RmtoolError("E0404", f"there is no checkpoint {model}", "give a checkpoint folder or a Hub id owner/name")
    return _download(model, revision, ui, weights)


def _download(repo_id: str, revision: str | None, ui: Ui, weights: bool) -> Path:
    import fnmatch

    import httpx2
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=30)
        wanted = DOWNLOAD if weights else NON_WEIGHT_FILES
        files = [s for s in info.siblings or [] if any(fnmatch.fnmatch(s.rfilename, p) for p in wanted)]
        total = sum(item.size or 0 for item in files) >> 20
        with ui.progress(f"Downloading {repo_id}", total, "MiB") as bar:
            for item in files:
                hf_hub_download(repo_id, item.rfilename, revision=info.sha)
                bar.advance((item.size or 0) >> 20, item.rfilename)
        return _cached(repo_id, info.sha)
    except HFValidationError as error:
        raise RmtoolError("E0404", f"{repo_id} is neither a folder nor a Hub id", "give owner/name") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx2.HTTPError, OSError) as error:
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = _cached(repo_id, revision)
            ui.say(f"The Hub is not reachable; using the copy of {repo_id} downloaded before")
            return folder
        raise RmtoolError(
            "E0701",
            f"the model {repo_id} is neither a folder here nor to be had from the Hub",
            "check the name and the network, log in with `hf auth login` if it is gated, or give a local folder",
            found=(str(error).strip() or type(error).__name__).splitlines()[0],
        ) from error


def _cached(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(DOWNLOAD), local_files_only=True))
