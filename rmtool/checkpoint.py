"""Checkpoint folders: find, download, read, and write atomically.

In: a run folder, checkpoint folder or Hub id. Out: a local folder with a transformers checkpoint (safetensors, config,
tokenizer, chat template) and `rmtool.json`, the manifest that records how its conversations were tokenized.
A folder is filled under a temporary name next to its target and then renamed, so a reader never sees a partial one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from rmtool.errors import Place, RmtoolError, first_line
from rmtool.recipe import BUNDLED
from rmtool.ui import Ui

MANIFEST = "rmtool.json"
HELD_OUT_FILE = "held_out.jsonl"  # in a run folder, next to model/
NON_WEIGHT_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*")
DOWNLOAD = ("*.safetensors", *NON_WEIGHT_FILES)
DEFAULT_MODEL = "allenai/Llama-3.1-Tulu-3-8B-RM"
FILE_SUFFIXES = (
    ".json",
    ".jsonl",
    ".csv",
    ".parquet",
    ".arrow",
    ".gz",
    ".yaml",
    ".yml",
)  # names of files, never of Hub repos


def is_hub_id(name: str) -> bool:
    """Decide whether `name` is a Hub id: `owner/name`, and neither an existing path nor the name of a data file.

    A bare name is always local, and so is `runs/name`: the default run folders.
    """
    if name.count("/") != 1 or name.startswith("runs/") or name.lower().endswith(FILE_SUFFIXES) or os.path.exists(name):
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def public_name(source: str) -> str:
    """Return a Hub id (with its `:split`) or bundled name as it is, and only the last component of a local path.

    Manifest and model card are published, so they must not contain folders of this machine.
    """
    if source.startswith(BUNDLED) or is_hub_id(source.partition(":")[0]):
        return source
    return PureWindowsPath(source.rstrip("/\\")).name or "a local path"  # splits at / and at \


@dataclass(frozen=True)
class Manifest:
    """Origin of a checkpoint, and the settings that tokenize conversations as in its training."""

    fingerprint: str  # Encoder.fingerprint of the tokenizer and chat template
    max_length: int
    precision: str
    on_long: str
    on_empty: str
    recipe: str
    base_model: str
    train_data: list[str]
    padded_reason: str | None = None  # why training used padded batches; None with prefix sharing
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format: int = 1


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest; None for a checkpoint that rmtool did not write.

    Raises:
        RmtoolError: E0408 when it cannot be parsed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        layout = values.pop("layout", "")  # the older key: "shared", or "padded: " and the reason
        if layout.startswith("padded: "):
            values["padded_reason"] = layout.removeprefix("padded: ")
        return Manifest(**values)
    except (ValueError, TypeError, AttributeError) as error:
        what = f"cannot read {MANIFEST}: corrupted, or from a different rmtool version"
        raise RmtoolError("E0408", what, "copy the checkpoint again", Place(str(path)), str(error)) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into a checkpoint folder."""
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary folder, then rename it to `folder`, which must not exist.

    Raises:
        RmtoolError: E0502 when the disk is full or not writable.
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
        raise cannot_write(folder, error) from error
    finally:
        if temporary != folder:
            shutil.rmtree(temporary, ignore_errors=True)


def cannot_write(path: Path, error: Exception) -> RmtoolError:
    """Return the E0502 for an output that failed while it was written."""
    reason = getattr(error, "strerror", None) or str(error)
    return RmtoolError("E0502", f"cannot write {path}: {reason}", "free disk space, or pass a different --output")


def check_writable(path: Path) -> None:
    """Create and remove a file next to `path`, so that hours of work do not end in an error.

    Raises:
        RmtoolError: E0501 when it cannot be created.
    """
    probe = path.with_name(f".probe-{os.getpid()}-{path.name}")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RmtoolError("E0501", f"cannot write {path}: {error.strerror}", "pass a different --output") from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def default_model(root: Path) -> str:
    """Return $RMTOOL_MODEL, else the newest finished run below `root`, else the Tulu 3 reward model."""
    runs = sorted(root.glob(f"*/model/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
    return os.environ.get("RMTOOL_MODEL") or (str(runs[-1].parent) if runs else DEFAULT_MODEL)


def resolve_checkpoint(model: str, revision: str | None, ui: Ui, weights: bool = True) -> Path:
    """Return the local folder of `model`: a checkpoint folder, a run folder's `model/`, or a download from the Hub.

    Args:
        weights: also download the weights.

    Raises:
        RmtoolError: E0404 when there is no such folder and it is not a Hub id, E0701 when the Hub has no such
            repository or cannot be reached, and no copy was downloaded before.
    """
    given = Path(model).expanduser()
    for folder in (given / "model", given):
        if (folder / "config.json").is_file():
            return folder
    if given.is_dir():
        raise RmtoolError("E0404", f"{model} contains no checkpoint", "pass a folder that contains config.json")
    if not is_hub_id(model):
        raise RmtoolError("E0404", f"checkpoint not found: {model}", "pass a checkpoint folder or a Hub id owner/name")
    return _download(model, revision, ui, weights)


def _download(repo_id: str, revision: str | None, ui: Ui, weights: bool) -> Path:
    """Download file by file: snapshot_download has no timeout and no progress for `ui`."""
    import httpx2
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import filter_repo_objects

    try:
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=30)
        patterns = list(DOWNLOAD if weights else NON_WEIGHT_FILES)
        files = list(filter_repo_objects(info.siblings or [], allow_patterns=patterns, key=lambda file: file.rfilename))
        with ui.progress(f"Downloading {repo_id}", sum(file.size or 0 for file in files) >> 20, "MiB") as bar:
            for file in files:
                hf_hub_download(repo_id, file.rfilename, revision=info.sha)
                bar.advance((file.size or 0) >> 20, file.rfilename)
        return _cached(repo_id, info.sha)
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx2.HTTPError, OSError) as error:
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = _cached(repo_id, revision)
            ui.say(f"note: cannot reach the Hub, using the downloaded copy of {repo_id}")
            return folder
        raise RmtoolError(
            "E0701",
            f"cannot find the model {repo_id} locally or on the Hub",
            "check the name and the network, run `hf auth login` if it is gated, or pass a local folder",
            found=first_line(error),
        ) from error


def _cached(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(DOWNLOAD), local_files_only=True))
