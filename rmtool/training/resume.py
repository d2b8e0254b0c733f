"""What must be the same when a run resumes, and what may change.

In: a recipe, its data, its base model and the installed packages. Out: their identity, as plain data that a snapshot
keeps; and the differences between two of them. Nothing here imports torch: the launcher compares before it starts a
process.
Cost: one read of the base model's weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rmtool.checkpoint.download import HEADS, TOKENIZER_FILES
from rmtool.config import Recipe
from rmtool.data.sources import SourceCount
from rmtool.errors import RmtoolError
from rmtool.packages import version_of
from rmtool.recipe import as_dict

_COMPARED = "its content is compared"
_SPEED = "the steps are the same, but for rounding"
_STEPS = "batches are global: the steps are the same, but for rounding"
_SHOWN = "it does not touch the steps"
# Recipe keys, or sections, that may change between an interruption and its resumption, each with the reason.
HARMLESS = {
    "name": _SHOWN,
    "model.path": _COMPARED,
    "model.revision": _COMPARED,
    "model.chat_template": _COMPARED,
    "data.train": _COMPARED,
    "data.eval": _COMPARED,
    "data.cache": "it decides where rows and token ids are read from",
    "data.on_bad_row": "the rows that are left are compared",
    "train.tokens_per_pack": _SPEED,
    "train.gradient_checkpointing": _SPEED,
    "train.liger": _SPEED,
    "train.compile": _SPEED,
    "train.eval_every": "evaluations do not change weights",
    "train.early_stopping_patience": "it decides when the run ends; the evaluations without improvement are known",
    "train.on_nonfinite": "it decides whether a run ends",
    "train.max_skips": "it decides whether a run ends",
    "train.time_limit": _SHOWN,
    "train.save_every": _SHOWN,
    "train.save_minutes": _SHOWN,
    "train.keep_snapshots": _SHOWN,
    "train.delete_snapshots": _SHOWN,
    "launch": _STEPS,
    "track": _SHOWN,
    "hub": _SHOWN,
}
PACKAGES = ("rmtool", "torch", "transformers", "accelerate", "deepspeed", "numpy")
RESTART = "pass --restart to start at step 1 (the old run is moved to previous/)"
Identity = dict[str, Any]


def identity(
    recipe: Recipe, sources: Sequence[SourceCount | None], model: Path | None, pairs: str | None = None
) -> Identity:
    """Return what decides the steps of a run, by name. A value that is not known yet is None.

    Args:
        sources: of the training data, then of the eval data; None for one that is not loaded.
        model: the folder of the base model, None if it is not downloaded.
        pairs: a hash of all token ids, preferences and margins; None if the data is not tokenized.
    """
    names = [f"data.train[{number}]" for number in range(len(recipe.data.train))]
    names += [f"data.eval[{number}]" for number in range(len(recipe.data.eval))]
    return {
        **{key: json.dumps(value) for key, value in _flat(as_dict(recipe))},
        **{name: source and _describe(source) for name, source in zip(names, sources, strict=True)},
        **_model_identity(model, recipe.model.weights == "pretrained"),
        "training and eval pairs": pairs,
        **{f"version of {name}": version_of(name) for name in PACKAGES},
    }


def changes(old: Identity, new: Identity, harmless: bool = False) -> list[tuple[str, Any, Any]]:
    """Return (name, old, new) of all that changed: what must be the same, or what may change."""
    names = [name for name in dict.fromkeys((*old, *new)) if _is_harmless(name) == harmless]
    found = [(name, old.get(name, "none"), new.get(name, "none")) for name in names]
    return [each for each in found if None not in each and each[1] != each[2]]


def require_unchanged(old: Identity, new: Identity, step: int) -> None:
    """Refuse to resume a run that is a different one.

    Raises:
        RmtoolError: E0603 with everything that changed.
    """
    found = changes(old, new)
    if not found:
        return
    keys = [f"{name}={before}" for name, before, _ in found if name.partition(".")[2] and "[" not in name]
    rows = tuple(f"{name}: {before} -> {after}" for name, before, after in found)
    hint = f"set {', '.join(keys)} as before" if len(keys) == len(found) else "restore what changed"
    what = f"cannot resume from step {step}: {', '.join(name for name, *_ in found)} changed"
    raise RmtoolError("E0603", what, f"{hint}, or {RESTART}", rows=rows)


def _is_harmless(name: str) -> bool:
    return name in HARMLESS or name.partition(".")[0] in HARMLESS


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The keys of a recipe, with dots."""
    flat: list[tuple[str, Any]] = []
    for key, value in tree.items():
        section = isinstance(value, dict) and not prefix
        flat += _flat(value, f"{key}.") if section else [(f"{prefix}{key}", value)]
    return flat


def _describe(source: SourceCount) -> str:
    return f"{source.taken:,} of {source.records:,} {source.counted}, content {source.digest[:12]}"


def _model_identity(folder: Path | None, weights: bool) -> Identity:
    if folder is None:
        return dict.fromkeys(("model config", "model weights", "tokenizer"))

    def matching(*patterns: str) -> list[Path]:
        return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})

    return {
        "model config": _hash([folder / "config.json"]),
        "model weights": _hash(matching("*.safetensors", *HEADS)) if weights else "random",
        "tokenizer": _hash(matching(*TOKENIZER_FILES)),
    }


def _hash(files: Sequence[Path]) -> str:
    """Hash the names and contents of files.

    Raises:
        RmtoolError: E0501 when one cannot be read.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        try:
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        except OSError as error:
            hint = "check its permissions and the disk, or copy it again"
            raise RmtoolError("E0501", f"cannot read {file}: {error.strerror}", hint) from error
    return digest.hexdigest()[:16]
