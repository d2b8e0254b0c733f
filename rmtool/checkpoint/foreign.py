"""Folders that are not complete transformers checkpoints: PEFT adapters, and weights in formats that are not read.

In: a folder. Out: the error that says what it contains and how to convert it.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from rmtool.errors import RmtoolError

ADAPTER = "adapter_config.json"
PICKLED_HEADS = ("*head*.bin", "*head*.pt", "*head*.pth", "*head*.ckpt")  # refused when a score head is needed
# Where GPTQ, AWQ and ModelOpt describe quantized weights, if not in config.json.
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# Weights in formats that are not read: files, their name, and how to convert them.
_FOREIGN = (
    (("*.gguf", "*.ggml"), "GGUF weights", "use the safetensors checkpoint that they were converted from"),
    (
        ("global_step*", "zero_to_fp32.py", "*zero_pp_rank*", "mp_rank_*"),
        "DeepSpeed states",
        "run python {folder}/zero_to_fp32.py {folder} {folder} --safe_serialization",
    ),
    (
        ("pytorch_model_fsdp*", "*.distcp", "*/*.distcp"),
        "FSDP shards",
        "run accelerate merge-weights {folder}/pytorch_model_fsdp_0 {folder}",
    ),
    (
        ("pytorch_model*.bin", "model*.bin", "model*.pt", "consolidated*.pth", "*.ckpt"),
        "pickled weights, which can run code",
        "save them with save_pretrained",
    ),
    (("consolidated*.safetensors",), "weights in Mistral's format", "use the checkpoint for transformers"),
    (("model*-of-*.safetensors",), "shards without model.safetensors.index.json", "download or copy that file as well"),
    (("*.h5", "*.msgpack", "*.onnx", "*.nemo", "*.npz"), "weights of other frameworks", "save them for PyTorch"),
)


def require_complete(folder: Path) -> Path:
    """Check that the folder is not a PEFT adapter. One with the weights of its base model is refused, too: transformers
    would load the base model that the adapter names instead.
    """
    if not (folder / ADAPTER).is_file():
        return folder
    try:
        values = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        base, task = values.get("base_model_name_or_path"), values.get("task_type")
    except (ValueError, AttributeError, OSError):
        base, task = None, None
    auto, labels = ("CausalLM", "") if task == "CAUSAL_LM" else ("SequenceClassification", ", num_labels=1")
    raise RmtoolError(
        "E0413",
        f"{folder} is a PEFT adapter of {base or 'a base model'}, not a complete checkpoint",
        f"merge it: peft.AutoPeftModelFor{auto}.from_pretrained({str(folder)!r}{labels}).merge_and_unload()"
        ".save_pretrained('merged'), then copy the tokenizer's files",
    )


def config_values(folder: Path) -> dict[str, Any]:
    """Return what config.json contains; nothing if it cannot be read, which is reported where the model is loaded."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}
    return values if isinstance(values, dict) else {}


def require_unquantized(folder: Path) -> None:
    """Check that weights are as they were trained.

    Raises:
        RmtoolError: E0414 they are quantized.
    """
    values = config_values(folder)
    inner = values.get("text_config")
    quantized = values.get("quantization_config") or values.get("quantization") or values.get("compression_config")
    quantized = quantized or (inner.get("quantization_config") if isinstance(inner, dict) else None)
    files = [name for name in QUANTIZATION_FILES if (folder / name).is_file()]
    if quantized or files:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise RmtoolError(
            "E0414",
            f"the weights of {folder} are quantized ({method or (files or ['config.json'])[0]})",
            "use the checkpoint from before quantization",
        )


def foreign_weights(folder: Path) -> RmtoolError | None:
    """Return the error for a folder whose weights are in a format that is not read; None if it has none."""
    for patterns, what, hint in _FOREIGN:
        if found := sorted(path.name for pattern in patterns for path in folder.glob(pattern)):
            what = f"no safetensors weights found in {folder}, but {what}: {found[0]}"
            return RmtoolError("E0407", what, hint.format(folder=shlex.quote(str(folder))))
    return None
