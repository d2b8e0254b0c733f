"""The config of a checkpoint: config.json, without the keys that rmtool decides itself.

In: a folder. Out: a transformers config.
Cost: reads config.json.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig

from rmtool.checkpoint.foreign import config_values, require_unquantized
from rmtool.errors import Place, RmtoolError, first_line

# Keys of config.json that rmtool decides itself: attention, outputs, dtype, and what the one label means.
_DECIDED = {"_attn_implementation", "attn_implementation", "output_attentions", "output_hidden_states", "return_dict"}
_DECIDED |= {"dtype", "torch_dtype", "problem_type"}
# What transformers raises for values of another type.
_REFUSED = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, StrictDataclassError)


def read_config(folder: Path) -> Any:
    """Load the folder's transformers config.

    Raises:
        RmtoolError: E0404 it cannot be loaded; E0406 it needs code of its own; E0414 its weights are quantized;
            E0415 its pad token has no embedding.
    """
    require_unquantized(folder)
    values = config_values(folder)
    _require_own_classes(folder, values)
    kind = values.get("model_type")
    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        what = f"transformers {transformers.__version__} has no model type {kind!r} (config.json of {folder})"
        hint = "upgrade transformers, or use a model that it has (Llama, Qwen, Mistral, Gemma, OLMo, ...)"
        raise RmtoolError("E0404", what, hint)
    try:
        config = _parse_config(folder, values)
    except _REFUSED as error:
        # A validator's message: its name, then the reason.
        reason = str(error).splitlines()[-1].strip() if isinstance(error, StrictDataclassError) else first_line(error)
        raise RmtoolError("E0404", f"cannot load the model config: {reason}", f"check {folder}/config.json") from error
    try:
        text = config.get_text_config()
    except ValueError as error:
        what = f"{config.model_type} is not supported: it has several text models"
        raise RmtoolError("E0406", what, "use a decoder-only model (Llama, Qwen, ...)") from error
    pad, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if pad is not None and rows is not None and pad >= rows:
        what = f"pad_token_id is {pad}, but the model has only {rows} embeddings"
        raise RmtoolError("E0415", what, "set it to null", Place(f"{folder}/config.json"))
    if pad is not None and pad < 0:  # as in configs of the first Llama: none
        text.pad_token_id = config.pad_token_id = None
    return config


def _parse_config(folder: Path, values: dict[str, Any]) -> Any:
    """Parse config.json without the keys that rmtool decides itself: transformers refuses some of their values."""
    inner = values.get("text_config") or {}
    if not isinstance(inner, dict):
        raise TypeError("text_config must be an object")
    for section in (values, inner):
        for name in _DECIDED & section.keys():
            del section[name]
    with tempfile.TemporaryDirectory() as copy:
        (Path(copy) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        # Without a type, it is refused, with the name of the folder.
        config = AutoConfig.from_pretrained(copy if "model_type" in values else folder, trust_remote_code=False)
    config.name_or_path = str(folder)
    return config


@functools.cache
def _transformers_names() -> frozenset[str]:
    return frozenset(name.lower() for name in dir(transformers))  # a second: it imports much of the library


def _require_own_classes(folder: Path, values: dict[str, Any]) -> None:
    """Check that transformers alone computes what the config says."""
    own = values.get("auto_map")
    classes = [name for name in own.values() if isinstance(name, str)] if isinstance(own, dict) else []
    if own := [name for name in classes if name.rpartition(".")[2].lower() not in _transformers_names()]:
        raise RmtoolError(
            "E0406",
            f"{folder} needs its own code ({own[0]}), which is not run: trust_remote_code is off",
            "use a checkpoint of a model class that is part of transformers",
        )
