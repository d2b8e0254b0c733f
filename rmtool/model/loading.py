"""The one place where tokenizer, weights, head and layout come together, to train or to use a reward model.

In: a checkpoint folder and, to train, a recipe. Out: a `LoadedModel`: model, encoder, and notices for the user.
Cost: reads the weights once.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rmtool.checkpoint import Manifest, read_manifest
from rmtool.config import LoraConfig, Recipe
from rmtool.errors import Place, RmtoolError, first_line
from rmtool.model.bf16_emulation import lacks_bf16
from rmtool.model.classifier import (
    HEAD,
    apply_liger,
    backbone_parameters,
    build_classifier,
    disable_dropout,
    init_score_head,
    read_config,
    set_pad_token,
)
from rmtool.model.layout_choice import choose_layout
from rmtool.model.reward_model import PRECISIONS, RewardModel
from rmtool.packing.prefix_sharing import describe_sharing
from rmtool.tokenization.encoder import FINGERPRINT_CONVERSATIONS, Encoder
from rmtool.tokenization.tokenizer import ensure_pad_token, load_tokenizer

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_MALLOC = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_"}


@dataclass(frozen=True)
class LoadedModel:
    """`notices` are sentences for the user; `manifest` is None for a checkpoint that rmtool did not write;
    `padded_reason` says why prompts are not shared, None where they are.
    """

    model: RewardModel
    encoder: Encoder
    manifest: Manifest | None
    notices: tuple[str, ...]
    padded_reason: str | None = None


def load_for_inference(
    folder: Path,
    *,
    precision: str | None = None,
    max_length: int | None = None,
    on_long: str | None = None,
    on_empty: str | None = None,
    chat_template: str | None = None,
) -> LoadedModel:
    """A trained reward model, ready to give rewards. Arguments that are None follow the checkpoint's manifest.

    Raises:
        RmtoolError: E0401 no score head, E0403 the tokenizer reads otherwise than in training, E0402 and E0404 to
            E0408 as the functions called here say.
    """
    tune_malloc()
    manifest = read_manifest(folder)
    notices = []
    tokenizer = load_tokenizer(folder, chat_template)
    config = read_config(folder).get_text_config()
    encoder = Encoder(
        tokenizer,
        max_length or (manifest.max_length if manifest else int(getattr(config, "max_position_embeddings", 0) or 2048)),
        on_long or (manifest.on_long if manifest else "error"),
        on_empty or (manifest.on_empty if manifest else "error"),
        config.pad_token_id,
    )
    if config.pad_token_id is not None and last_id(tokenizer) == config.pad_token_id:
        notices.append(
            f"this checkpoint's responses end in its pad token (id {config.pad_token_id}): rewards are read before it, "
            "as transformers does, so an answer that stops and one that does not look alike"
        )
    if manifest and not chat_template:
        _check_fingerprint(encoder, manifest, folder)
    precision = precision or (manifest.precision if manifest else "fp32")
    classifier, has_head = build_classifier(folder, dtype=_dtype_for_use(precision))
    if not has_head:
        raise RmtoolError(
            "E0401",
            f"{folder} has no score head: it is a language model, not a reward model",
            f"train one from it: rmtool train --recipe smollm2-135m --model {folder}",
        )
    disable_dropout(classifier)
    getattr(classifier, HEAD).float()
    model = RewardModel(classifier, config.pad_token_id or 0, precision).to(default_device()).eval()
    notices += slow_precision(precision)
    reason = choose_layout(model, model, encoder.max_length)
    if reason:
        notices.append(f"prefix sharing: {describe_sharing(reason)}")
    return LoadedModel(model, encoder, manifest, tuple(notices), reason)


def slow_precision(precision: str) -> list[str]:
    """What to tell the user of a precision that this machine has no instructions for."""
    if precision == "fp32" or default_device().type == "cuda" or not lacks_bf16():
        return []
    return ["this CPU has no bf16 instructions: bf16 rounds as it should, but is no faster than fp32"]


def tune_malloc() -> None:
    """Let glibc keep what is freed, on a CPU: it would give blocks over 32 MB back to the system, and each layer then
    pays for clearing fresh ones (10 to 20% of a forward of 8,192 tokens, scripts/bench/SPEED.md). Holds until the
    process ends; nothing is done where another C library runs, or where MALLOC_ variables say what the user wants.
    """
    library = ctypes.CDLL(None)
    if default_device().type == "cpu" and hasattr(library, "gnu_get_libc_version") and not _MALLOC & os.environ.keys():
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype_for_use(precision: str) -> torch.dtype:
    """bfloat16 weights where they are used in bfloat16 on a GPU; on a CPU autocast casts them anyway."""
    return PRECISIONS[precision] if default_device().type == "cuda" else torch.float32


def last_id(tokenizer: Any) -> int:
    """The id that a rendered conversation ends with."""
    return Encoder(tokenizer, 2).ids(FINGERPRINT_CONVERSATIONS[0])[-1]


def _check_fingerprint(encoder: Encoder, manifest: Manifest, folder: Path) -> None:
    if encoder.fingerprint() != manifest.fingerprint:
        raise RmtoolError(
            "E0403",
            "this tokenizer and chat template read conversations otherwise than those the model was trained with",
            "restore the checkpoint's tokenizer files, or pass --chat-template to use another template on purpose",
            Place(str(folder)),
        )


# ------------------------------------------------------------------------------------------------- to train


def training_encoder(recipe: Recipe, folder: Path) -> tuple[Encoder, list[str]]:
    """The encoder of a training run, its pad token settled; and what to tell the user."""
    tokenizer = load_tokenizer(folder, recipe.model.chat_template)
    change = ensure_pad_token(tokenizer, last_id(tokenizer))
    data = recipe.data
    encoder = Encoder(tokenizer, data.max_length, data.on_long, data.on_empty)
    return encoder, [f"pad token: {change}"] if change else []


def training_model(recipe: Recipe, folder: Path, encoder: Encoder) -> tuple[RewardModel, list[str]]:
    """The model of a training run: fp32 weights, new or kept head, no dropout; and what to tell the user."""
    tune_malloc()
    train = recipe.train
    notices = slow_precision(train.precision)
    # Random weights and adapters must not depend on what was drawn before.
    torch.manual_seed(train.seed)
    random_weights = recipe.model.weights == "random"
    quantized = recipe.lora.quantize != "none"
    if quantized:
        require_4bit()
    classifier, has_head = build_classifier(
        folder, dtype=torch.float32, random_weights=random_weights, quantized=quantized
    )
    set_pad_token(classifier, encoder.tokenizer.pad_token_id, len(encoder.tokenizer))
    if has_head and recipe.model.head == "auto":
        notices.append("score head: kept from the checkpoint (model.head=new draws a new one)")
    else:
        init_score_head(classifier, train.seed)
    if train.liger == "auto" and torch.cuda.is_available():
        apply_liger(classifier)
        notices.append("Liger kernels: on")
    if train.freeze == "backbone":
        notices.append("trained: the score head alone")
    make_trainable(classifier, recipe)
    return RewardModel(classifier, encoder.tokenizer.pad_token_id, train.precision), notices


def make_trainable(classifier: PreTrainedModel, recipe: Recipe) -> None:
    """No dropout; and checkpointing, frozen weights and adapters as the recipe says. Changes `classifier` in place."""
    disable_dropout(classifier)
    # transformers lets checkpointed layers ask for gradients, which a frozen backbone would then compute for nobody.
    if recipe.train.gradient_checkpointing and recipe.train.freeze == "none":
        classifier.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.train.freeze == "backbone":
        for parameter in backbone_parameters(classifier):
            parameter.requires_grad_(False)
    if recipe.lora.rank:
        add_adapters(classifier, recipe.lora)


def require_4bit() -> None:
    """What 4-bit weights need.

    Raises:
        RmtoolError: E0505 there is no CUDA device, or bitsandbytes is not installed.
    """
    hint = "set lora.quantize=none: adapters on 16-bit or fp32 weights train anywhere"
    if not torch.cuda.is_available():
        raise RmtoolError("E0505", "lora.quantize=4bit needs a CUDA device, and there is none here", hint)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RmtoolError(
            "E0505", "lora.quantize=4bit needs bitsandbytes, which is not installed", "pip install bitsandbytes"
        )


def add_adapters(classifier: Any, lora: LoraConfig) -> None:
    """Freeze `classifier` and put LoRA adapters into it, in place; the score head stays trainable as it is."""
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = PeftConfig(
        task_type="SEQ_CLS",
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        exclude_modules=[HEAD],
        lora_dropout=0.0,
    )
    try:
        inject_adapter_in_model(config, classifier)
    except ValueError as error:
        raise RmtoolError("E0205", f"lora.targets: {first_line(error)}", "name linear layers of the model") from error
    # Not a `modules_to_save` copy: the head is one parameter, trained and saved under its own name.
    for parameter in getattr(classifier, HEAD).parameters():
        parameter.requires_grad_(True)
