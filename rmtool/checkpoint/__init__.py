"""Checkpoint folders: find, download, read, and write atomically.

In: a run folder, checkpoint folder or Hub id. Out: a local folder with a transformers checkpoint (safetensors, config,
tokenizer, chat template) and `rmtool.json`, the manifest that records how its conversations were tokenized.
A folder is filled under a temporary name next to its target and then renamed, so a reader never sees a partial one.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from rmtool.checkpoint.download import download
from rmtool.checkpoint.foreign import ADAPTER, foreign_weights, require_complete
from rmtool.errors import Place, RmtoolError
from rmtool.recipe import BUNDLED
from rmtool.ui import Ui

MANIFEST = "rmtool.json"
LOADED_IN_BF16 = "loaded in bf16"  # in the manifest's fidelity: what other tools do by default
HELD_OUT_FILE = "held_out.jsonl"  # in a run folder, next to model/
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
    eval_precision: str = ""  # of the metrics
    fidelity: dict[str, dict[str, Any]] = field(default_factory=dict)  # of rewards of eval responses, by precision
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
    """Write the manifest into a checkpoint folder, or replace it at once."""
    temporary = folder / f".tmp-{MANIFEST}"
    temporary.write_text(json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(folder / MANIFEST)


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary folder, then rename it to `folder`, which must not exist. All files get the
    permissions that the user's umask gives.

    Raises:
        RmtoolError: E0502 when the disk is full or not writable.
    """
    from safetensors import SafetensorError

    outer = folder
    try:
        outer = Path(tempfile.mkdtemp(prefix=f".tmp-{folder.name}-", dir=folder.parent))
        temporary = outer / folder.name
        temporary.mkdir()  # with the user's umask, unlike mkdtemp and safetensors
        fill(temporary)
        mode = temporary.stat().st_mode & 0o666
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(mode)
                fsync(path)
        temporary.rename(folder)
        fsync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from error
    finally:
        if outer != folder:
            shutil.rmtree(outer, ignore_errors=True)


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


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
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
        RmtoolError: E0404 when there is no such folder and it is not a Hub id, E0407 when its weights are in a format
            that is not read, E0413 when it is a PEFT adapter, and as from `download`.
    """
    given = Path(model).expanduser()
    for folder in (given / "model", given):
        if (folder / "config.json").is_file() or (folder / ADAPTER).is_file():
            return require_complete(folder)
    if given.is_dir():
        inner = [str(path.parent) for path in sorted(given.glob("*/config.json"))]
        hint = f"pass {' or '.join(inner[:3])}" if inner else "pass a folder that contains config.json"
        raise foreign_weights(given) or RmtoolError("E0404", f"{model} contains no checkpoint", hint)
    if given.is_file():
        hint = (
            "use the safetensors checkpoint that it was converted from"
            if given.suffix == ".gguf"
            else "pass its folder"
        )
        raise RmtoolError("E0404", f"{model} is a file, not a checkpoint folder", hint)
    if not is_hub_id(model):
        raise RmtoolError("E0404", f"checkpoint not found: {model}", "pass a checkpoint folder or a Hub id owner/name")
    return require_complete(download(model, revision, ui, weights))
