"""Weights of a checkpoint before they are loaded: names, shapes, and which of them the model reads.

In: the headers of a checkpoint's files, and what transformers would load of them. Out: the name of a trained score
head, or an error that names weights.
Cost: reads tensors of one row.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rmtool.errors import RmtoolError
from rmtool.model.weight_files import HEAD_WEIGHT, StoredWeights, names_head, own_name

# Buffers of rotary embeddings and causal masks that older versions saved, and layers that predict further tokens.
_BUFFERS = re.compile(r"(inv_freq|(cos|sin)_cached|position_ids|masked_bias|(attn|attention)\.bias)$|(^|\.)mtp\b")
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
# What wrappers write into names: torch.compile, FSDP, activation checkpointing.
_WRAPPER = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")


@dataclass(frozen=True)
class LoadingInfo:
    """What transformers says about weights that it would load: names, and (name, found shape, wanted shape)."""

    missing: Sequence[str]
    unread: Sequence[str]
    mismatched: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def of(cls, info: Mapping[str, Any], beside: Sequence[str]) -> LoadingInfo:
        """Sort what `from_pretrained` returns with `output_loading_info`; it does not know the weights `beside`."""
        shapes = sorted((name, tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"])
        return cls(sorted(info["missing_keys"]), [*sorted(info["unexpected_keys"]), *beside], shapes)


def require_values(stored: StoredWeights, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Check that no weight of the model was saved without its values: where ZeRO-3 does not gather weights, it leaves
    tensors of shape [0], or [1] in older versions.

    Raises:
        RmtoolError: E0404 one was.
    """
    for name, shape in sorted(stored.shapes.items()):
        needs = next((shape for known, shape in wanted.items() if f".{known}".endswith(f".{own_name(name)}")), None)
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
    heads = [name for name in unread if names_head(name) and stored.shapes.get(name) in shapes]
    head = HEAD_WEIGHT if HEAD_WEIGHT not in info.missing else heads[0] if len(heads) == 1 else None
    bias = f"{head}".removesuffix("weight") + "bias"
    if others := [name for name in unread if name not in (head, bias) and not _is_copy(stored, name, head)]:
        raise _unread(stored, others, config.hidden_size, renames=head is None)
    if head is None and pickled:
        what = f"the score head is in {pickled[0]}, a pickled file, which can run code and is not supported"
        raise RmtoolError("E0407", what, f"save its tensors as {Path(pickled[0]).stem}.safetensors")
    for name in ([head] if head else []) + ([bias] if bias in unread else []):
        _require_values_of_head(stored, name)
    value = float(stored.tensor(bias).sum()) if bias in unread else 0.0
    if value:
        raise RmtoolError(
            "E0406",
            f"unexpected score head weights: {bias} is {value:g}, but a score head has no bias",
            f"remove it, which adds {-value:g} to every reward: {stored.change(bias, f'del w[{bias!r}]')}\n"
            f"or {stored.new_head()}",
        )
    return HeadOrigin(head, pickled)


def unread_notice(head: HeadOrigin) -> list[str]:
    """Return a notice of the weights that nothing reads, if there are any."""
    return [f"weights not read: {', '.join(head.unread[:3])}{_count_more(head.unread[3:])}"] if head.unread else []


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
    head = next(name for name in stored.shapes if f".{name}".endswith(f".{head}"))
    _require_floats(stored, [head])
    if not stored.tensor(head).isfinite().all():
        hint = f"use an earlier checkpoint of that training, or {stored.new_head()}"
        raise RmtoolError("E0404", f"{head} of {stored.folder} contains NaN or inf", hint)


def _is_copy(stored: StoredWeights, name: str, head: str | None) -> bool:
    """Whether a weight beside those that transformers loads is the score head once more, or its bias of zero."""
    if head is None or name not in stored.beside():
        return False
    head = next(known for known in stored.shapes if f".{known}".endswith(f".{head}"))
    copy, original = stored.tensor(name).flatten().float(), stored.tensor(head).flatten().float()
    return torch.equal(copy, original) or (copy.shape == (1,) and not copy.any())


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
    if not renames and (beside := [name for name in names if name in stored.beside()]):
        path = shlex.quote(str(stored.files[beside[0]]))
        hint = f"if {HEAD_WEIGHT} is the trained one, remove the other: rm {path}\nor {stored.new_head()}"
    what = f"{stored.folder} has weights that the model does not read: {shown}{_count_more(names[3:])}"
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


def _count_more(names: Sequence[str]) -> str:
    """Return " and N more" for the names that are not listed; nothing for none."""
    return f" and {len(names)} more" if names else ""
