"""Weights of a checkpoint before they are loaded: names, shapes, and which of them the model reads.

In: a folder with safetensors files, and what transformers would load of them. Out: the name of a trained score head, or
an error that names weights.
Cost: reads the headers of the files, and tensors of one row.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rmtool.checkpoint.foreign import foreign_weights
from rmtool.errors import RmtoolError, first_line

INDEX = "model.safetensors.index.json"
HEAD_WEIGHT = "score.weight"
# One linear layer, as other tools call it (OpenRLHF, TRL and LLaMA-Factory, PKU, Eurus, Open-Assistant, NeMo).
_HEAD = re.compile(
    r"((?:base_|pretrained_|reward_)?model\.|module\.|_orig_mod\.|(?:rw)?transformer\.)*((\w+_)?head|fc|linear|dense"
    r"|(value|reward|regression|score|output)(_layer|_proj|_model)?|scorer|regressor|classifier|out_proj)"
    r"(\.(summary|out_proj|linear|dense|fc))?\.weight"
)
# Buffers of rotary embeddings and causal masks that older versions saved, and layers that predict further tokens.
_BUFFERS = re.compile(r"(inv_freq|(cos|sin)_cached|position_ids|masked_bias|(attn|attention)\.bias)$|(^|\.)mtp\b")
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
# What wrappers write into names: torch.compile, FSDP, activation checkpointing.
_WRAPPER = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")


@dataclass(frozen=True)
class StoredWeights:
    """The weights that the safetensors files of `folder` contain, by name."""

    folder: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def new_head(self) -> str:
        """Return the hint to train a new score head."""
        return f"train a new one: rmtool train --model {shlex.quote(str(self.folder))} --set model.head=new"

    def change(self, name: str, change: str) -> str:
        """Return the command that changes the tensors `w` of the file with this one."""
        code = f"p = {str(self.files[name])!r}; w = load_file(p); {change}; save_file(w, p, {{'format': 'pt'}})"
        return f"python -c {shlex.quote(f'from safetensors.torch import load_file, save_file; {code}')}"

    def rename(self, name: str) -> str:
        """Return the command that makes this tensor the score head."""
        return self.change(name, f"w[{HEAD_WEIGHT!r}] = w.pop({name!r}).reshape(1, -1)")

    def pickled_heads(self) -> list[Path]:
        """List files of score heads that are not read."""
        return sorted(self.folder.glob("*head*.bin"))


def read_headers(folder: Path) -> StoredWeights:
    """Read the headers of the files that transformers loads, and of any other with weights of a score head.

    Raises:
        RmtoolError: E0404 a file is corrupted or missing; E0407 no safetensors.
    """
    loaded = _files(folder)
    paths = [*loaded, *(path for path in sorted(folder.glob("*.safetensors")) if path not in loaded)]
    files, shapes, dtypes = dict[str, Path](), dict[str, tuple[int, ...]](), dict[str, str]()
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                # LLaMA-Factory writes value_head.safetensors; consolidated.safetensors repeats the model's weights.
                names = [name for name in file.keys() if path in loaded or _HEAD.fullmatch(name) or "_head." in name]  # noqa: SIM118
                found = {name: file.get_slice(name) for name in names if name not in shapes}
                shapes |= {name: tuple(each.get_shape()) for name, each in found.items()}
                dtypes |= {name: each.get_dtype() for name, each in found.items()}
        except (SafetensorError, OSError) as error:
            raise _corrupted(path, error) from error
        files |= dict.fromkeys(found, path)
    return StoredWeights(folder, files, shapes, dtypes)


def _files(folder: Path) -> list[Path]:
    """The files that transformers loads."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).is_file():
        raise foreign_weights(folder) or RmtoolError(
            "E0407", f"no safetensors weights found in {folder}", "save the model with save_pretrained"
        )
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise _corrupted(folder / INDEX, error) from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        what = f"{len(missing)} of {len(names)} weight files are missing from {folder} (first: {missing[0]})"
        raise RmtoolError("E0404", what, "download or copy the checkpoint again")
    return [folder / name for name in names]


def _corrupted(path: Path, error: Exception) -> RmtoolError:
    hint = f"download or copy {path.name} again"
    if path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
        what = f"{path} is a Git LFS pointer, not the weights"
        return RmtoolError("E0404", what, f"run cd {shlex.quote(str(path.parent))} && git lfs pull")
    return RmtoolError("E0404", f"cannot load the model: {path} is corrupted: {first_line(error)}", hint)


@dataclass(frozen=True)
class LoadingInfo:
    """What transformers says about weights that it would load: names, and (name, found shape, wanted shape)."""

    missing: Sequence[str]
    unread: Sequence[str]
    mismatched: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> LoadingInfo:
        """Sort what `from_pretrained` returns with `output_loading_info`."""
        shapes = sorted((name, tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"])
        return cls(sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), shapes)


def require_values(stored: StoredWeights, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Check that no weight of the model was saved without its values: where ZeRO-3 does not gather weights, it leaves
    tensors of shape [0], or [1] in older versions.

    Raises:
        RmtoolError: E0404 one was.
    """
    for name, shape in sorted(stored.shapes.items()):
        needs = next((shape for known, shape in wanted.items() if known == name or known.endswith(f".{name}")), None)
        if shape in ((0,), (1,)) and needs not in (None, shape):
            what = f"{name} has shape {list(shape)}, but the model needs {list(needs)}"
            raise RmtoolError(
                "E0404",
                f"{what}: {stored.folder} was saved from ZeRO-3 without gathering its weights",
                "set stage3_gather_16bit_weights_on_model_save and save again, or use the output of zero_to_fp32.py",
            )


@dataclass(frozen=True)
class HeadOrigin:
    """The weight in the checkpoint that a score head is, None for a new one; and weights that nothing reads."""

    name: str | None = None
    unread: tuple[str, ...] = ()


def find_score_head(stored: StoredWeights, info: LoadingInfo, config: Any, new: bool) -> HeadOrigin:
    """Find the trained score head. Every other weight must be read by the model.

    Args:
        config: of the text model.
        new: the score head is reinitialized: accept any, and weights that the model does not read.

    Raises:
        RmtoolError: E0402 more than one label; E0404 weights are missing, or their shape or value is wrong; E0406
            weights that the model does not read; E0407 the score head is pickled; E0414 weights are quantized.
    """
    pickled = tuple(path.name for path in stored.pickled_heads())
    _require_floats(stored, stored.shapes.keys() - {*info.unread, *([HEAD_WEIGHT] if new else [])})
    _check_shapes(stored, [each for each in info.mismatched if each[0] != HEAD_WEIGHT or not new])
    _check_missing(stored, [name for name in info.missing if name != HEAD_WEIGHT], info.unread)
    unread = [name for name in info.unread if not _is_harmless(name, stored.shapes.get(name, ()), config.vocab_size)]
    if new:
        return HeadOrigin(None, (*unread, *pickled))
    shapes = _head_shapes(config.hidden_size)
    heads = [name for name in unread if _HEAD.fullmatch(name) and stored.shapes.get(name) in shapes]
    head = HEAD_WEIGHT if HEAD_WEIGHT not in info.missing else heads[0] if len(heads) == 1 else None
    bias = f"{head}".removesuffix("weight") + "bias"
    if others := [name for name in unread if name not in (head, bias)]:
        raise _unread(stored, others, config.hidden_size, renames=head is None)
    if head is None and pickled:
        what = f"the score head is in {pickled[0]}, a pickled file, which can run code and is not supported"
        raise RmtoolError("E0407", what, f"save its tensors as {Path(pickled[0]).stem}.safetensors")
    if head:
        _require_values_of_head(stored, head)
    value = float(stored.tensor(bias).sum()) if bias in unread else 0.0
    if value:
        raise RmtoolError(
            "E0406",
            f"unexpected score head weights: {bias} is {value:g}, but a score head has no bias",
            f"remove it, which adds {-value:g} to every reward: {stored.change(bias, f'del w[{bias!r}]')}\n"
            f"or {stored.new_head()}",
        )
    return HeadOrigin(head, pickled)


def _head_shapes(hidden_size: int) -> tuple[tuple[int, ...], ...]:
    """The shapes in which a linear layer with one output is stored."""
    return (1, hidden_size), (hidden_size,), (hidden_size, 1)


def _require_floats(stored: StoredWeights, names: Iterable[str]) -> None:
    for name in sorted(names):
        if (dtype := stored.dtypes[name]) not in _FLOATS and not _BUFFERS.search(name):
            what = f"{name} is stored as {dtype}, which is not what a model is trained in: {stored.folder} is quantized"
            raise RmtoolError("E0414", what, "use the checkpoint from before quantization")


def _require_values_of_head(stored: StoredWeights, head: str) -> None:
    # transformers finds model.score.weight, too.
    head = next(name for name in stored.shapes if name == head or name.endswith(f".{head}"))
    _require_floats(stored, [head])
    if not stored.tensor(head).isfinite().all():
        hint = f"use an earlier checkpoint of that training, or {stored.new_head()}"
        raise RmtoolError("E0404", f"{head} of {stored.folder} contains NaN or inf", hint)


def _is_harmless(name: str, shape: tuple[int, ...], vocab_size: int) -> bool:
    """Whether a weight that the model does not read is a buffer or a language head."""
    language_head = shape[:1] == (vocab_size,) or ("lm_head" in name and shape[:1] > (vocab_size // 2,))
    return language_head or bool(_BUFFERS.search(name))


def _check_shapes(stored: StoredWeights, mismatched: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> None:
    for name, found, wanted in mismatched:
        if name == HEAD_WEIGHT and found[1:] == wanted[1:]:
            raise RmtoolError(
                "E0402",
                f"a reward model must have one label: {stored.folder} has {found[0]}",
                f"use a checkpoint with one label, or {stored.new_head()}",
            )
        more = f" ({len(mismatched) - 1} more do not fit)" if mismatched[1:] else ""
        what = f"{name} has shape {list(found)}, but the model needs {list(wanted)}{more}"
        hint = f"use config.json and weights of the same model in {stored.folder}"
        if name == HEAD_WEIGHT and found in _head_shapes(wanted[1]):
            hint = f"transpose it: {stored.rename(name)}"
        raise RmtoolError("E0404", what, hint)


def _check_missing(stored: StoredWeights, missing: Sequence[str], unread: Sequence[str]) -> None:
    if not missing:
        return
    prefix = next((name.removesuffix(missing[0]) for name in unread if name.endswith(f".{missing[0]}")), "")
    wrapper = next((found[0] for name in unread if (found := _WRAPPER.search(name))), "")
    added = f"remove {wrapper} from" if wrapper else f"remove the prefix {prefix} from" if prefix else ""
    hint = _origin_hint(unread, f"{added} the names of the weights" if added else None)
    what = f"{len(missing)} weights are missing from {stored.folder} (first: {missing[0]})"
    raise RmtoolError("E0404", what, hint or "download or save the checkpoint again")


def _unread(stored: StoredWeights, names: Sequence[str], hidden_size: int, renames: bool) -> RmtoolError:
    shown = ", ".join(f"{name} {list(stored.shapes.get(name, ()))}" for name in names[:3])
    hint = f"use a checkpoint whose score head is one linear layer without bias, or {stored.new_head()}"
    if renames and len(names) == 1 and stored.shapes[names[0]] in _head_shapes(hidden_size):
        hint = f"if it is the score head, rename it: {stored.rename(names[0])}\nor {stored.new_head()}"
    what = f"{stored.folder} has weights that the model does not read: {shown}{count_more(names[3:])}"
    return RmtoolError("E0406", what, _origin_hint(names) or hint)


def _origin_hint(names: Sequence[str], prefix: str | None = None) -> str | None:
    """Return what to do about weights of adapters, of quantization, or of layers that the config does not have; before
    the last, the hint about a prefix.
    """
    hints = (
        (
            r"\.lora_|\.base_layer\.|\.modules_to_save\.",
            "merge the adapter with merge_and_unload(), and save the model",
        ),
        (r"scales?(_inv)?$|\.qweight$|\.qzeros$|\.absmax$", "use the checkpoint from before quantization"),
        (r"" if prefix else r"\.\d+\..*\.weight$", prefix or "use config.json and weights of the same model"),
    )
    # A head of several layers has numbers, too, but at its beginning.
    names = [name for name in names if not re.match(r"(\w*\.)?\w*(head|score|classifier)\w*\.\d", name)]
    return next((hint for pattern, hint in hints if any(re.search(pattern, name) for name in names)), None)


def count_more(names: Sequence[str]) -> str:
    """Return " and N more" for the names that are not listed; nothing for none."""
    return f" and {len(names)} more" if names else ""
