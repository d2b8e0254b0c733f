"""Loading a reward model: tokenizer, weights, score head and layout, for inference or for training.

In: a checkpoint folder and, for training, a recipe. Out: a `LoadedModel`, or a `RewardModel` and its encoder; and
notices for the user.
Cost: reads the weights once, and runs a few short forwards for inference (`layout_choice.py`).
"""

from __future__ import annotations

import importlib.util
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rmtool.checkpoint import Manifest, read_manifest
from rmtool.config import LoraConfig, Recipe
from rmtool.errors import Place, RmtoolError, first_line
from rmtool.model.classifier import (
    HEAD,
    backbone_parameters,
    build_classifier,
    disable_dropout,
    init_score_head,
    set_pad_token,
)
from rmtool.model.layout_choice import choose_layout
from rmtool.model.liger import apply_liger
from rmtool.model.limits import embedding_rows, positions_notice, require_embedded
from rmtool.model.model_config import read_config
from rmtool.model.overflow import beyond_fp16
from rmtool.model.precision import (
    FP16_MAX,
    compute_precision,
    default_device,
    loading_dtype,
    precision_notices,
)
from rmtool.model.process_settings import apply_settings
from rmtool.model.reward_model import RewardModel
from rmtool.model.stored_weights import HeadOrigin, unread_notice
from rmtool.model.weight_files import HEAD_WEIGHT, read_headers
from rmtool.packing.attention import HALF
from rmtool.tokenization.encoder import FINGERPRINT_CONVERSATIONS, Encoder
from rmtool.tokenization.tokenizer import ensure_pad_token, load_tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A reward model for inference.

    manifest:      None for a checkpoint that rmtool did not write
    notices:       sentences for the user
    padded_reason: why batches are padded, None with prefix sharing
    """

    model: RewardModel
    encoder: Encoder
    manifest: Manifest | None
    notices: tuple[str, ...]
    padded_reason: str | None = None


def load_for_inference(
    folder: Path,
    *,
    precision: str = "auto",
    max_length: int | None = None,
    on_long: str | None = None,
    on_empty: str | None = None,
    chat_template: str | None = None,
    fidelity: bool = False,
) -> LoadedModel:
    """Load a trained reward model, ready to compute rewards. Arguments that are None follow the checkpoint's manifest.

    Args:
        precision: auto, fp16, bf16, tf32 or fp32; see `compute_precision`.
        fidelity: leave the weights in the dtype of their file, where they fit into the GPU's memory, until
            `RewardModel.round_weights` is called: `rewards_with_fidelity` compares with their fp32 rewards.

    Raises:
        RmtoolError: E0401 no score head; E0403 tokenizer mismatch; E0402 and E0404 to E0408 as from `build_classifier`,
            `load_tokenizer` and `read_manifest`; E0410 to E0412 as from `choose_layout`; E0416 as from `_load_model`.
    """
    apply_settings()
    manifest, config = read_manifest(folder), read_config(folder)
    tokenizer, config = load_tokenizer(folder, chat_template, config), config.get_text_config()
    length = max_length or (manifest.max_length if manifest else getattr(config, "max_position_embeddings", 0) or 2048)
    on_long, on_empty = (
        given or (getattr(manifest, name) if manifest else "error")
        for given, name in ((on_long, "on_long"), (on_empty, "on_empty"))
    )
    encoder = Encoder(tokenizer, int(length), on_long, on_empty, config.pad_token_id, embedding_rows(config))
    require_embedded(encoder)
    notices = _check_fingerprint(encoder, manifest, folder) if manifest and not chat_template else []
    model, head, more = _load_model(folder, precision, config.pad_token_id or 0)
    if not fidelity:
        model.round_weights()
    layout = choose_layout(model, model, encoder.max_length)
    notices += [*_pad_notices(tokenizer, config.pad_token_id), *more, *precision_notices(precision, layout.shared)]
    notices += positions_notice(config, encoder.max_length, manifest.max_length if manifest else 0)
    notices += unread_notice(head)
    return LoadedModel(model, encoder, manifest, tuple(notices), layout.reason)


def _load_model(
    folder: Path, precision: str, pad_id: int, dtype: torch.dtype | None = None
) -> tuple[RewardModel, HeadOrigin, list[str]]:
    """Raises:
    RmtoolError: E0416 where fp16 was asked for by name, but cannot hold the weights; auto computes in fp32 then.
    """
    model, head = _read_model(folder, compute_precision(precision), pad_id, dtype)
    notices = [f"score head: loaded from {head.name}"] if head.name != HEAD_WEIGHT else []
    if model.precision == "fp16" and (names := beyond_fp16(model.backbone)):
        what = f"{names[0]} has weights beyond the range of fp16 ({FP16_MAX:,.0f})"
        if precision != "auto":
            raise RmtoolError("E0416", what, "set train.precision=bf16, or fp32")
        del model
        model, _ = _read_model(folder, "fp32", pad_id)  # again: those above may have been cast to inf
        notices += [f"{what}: computing in fp32"]
    if any(weight.dtype in HALF for weight in model.parameters()) and "F32" in read_headers(folder).sizes():
        notices.append("fidelity does not include the rounding of fp32 weights, which do not fit into the GPU's memory")
    return model, head, notices


def _read_model(
    folder: Path, precision: str, pad_id: int, dtype: torch.dtype | None = None
) -> tuple[RewardModel, HeadOrigin]:
    device = default_device()
    if dtype is None:
        free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else None
        dtype = loading_dtype(precision, read_headers(folder).sizes(), free)
    classifier, head = build_classifier(folder, dtype=dtype, device=device)
    if head.name is None:
        raise RmtoolError(
            "E0401",
            f"{folder} has no score head: it is a language model, not a reward model",
            f"train one from it: rmtool train --recipe smollm2-135m --model {shlex.quote(str(folder))}",
        )
    disable_dropout(classifier)
    return RewardModel(classifier, pad_id, precision).to(device).eval(), head


def _pad_notices(tokenizer: Any, pad_id: int | None) -> list[str]:
    if pad_id is None or last_id(tokenizer) != pad_id:
        return []
    return [
        f"the pad token (id {pad_id}) also ends responses; the reward is taken at the token before it, as in "
        "transformers, so complete and unfinished responses look the same to the model"
    ]


def last_id(tokenizer: Any) -> int:
    """Return the id that a rendered conversation ends with."""
    return Encoder(tokenizer, 2).ids(FINGERPRINT_CONVERSATIONS[0])[-1]


def _check_fingerprint(encoder: Encoder, manifest: Manifest, folder: Path) -> list[str]:
    same = encoder.matches(manifest.fingerprint)
    if same is None:
        return ["the tokenizer is not compared with that in training: this requires transformers 5.23 or later"]
    if not same:
        raise RmtoolError(
            "E0403",
            "tokenizer or chat template mismatch: token ids differ from those in training",
            "restore the checkpoint's tokenizer files, or set model.chat_template=FILE.jinja on purpose",
            Place(str(folder)),
        )
    return []


# ------------------------------------------------------------------------------------------------- for training


def training_encoder(recipe: Recipe, folder: Path) -> tuple[Encoder, list[str]]:
    """Build the encoder of a training run, with a pad token that ends no response; returns notices for the user, too.

    Raises:
        RmtoolError: E0404, E0405 as from `load_tokenizer`.
    """
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, recipe.model.chat_template, config)
    change = ensure_pad_token(tokenizer, last_id(tokenizer))
    data = recipe.data
    encoder = Encoder(tokenizer, data.max_length, data.on_long, data.on_empty, vocabulary=embedding_rows(config))
    require_embedded(encoder)
    return encoder, [*([change] if change else []), *positions_notice(config, data.max_length)]


def training_model(
    recipe: Recipe, folder: Path, encoder: Encoder, device: torch.device | None = None
) -> tuple[RewardModel, list[str]]:
    """Build the model of a training run, on `device` if this process will hold all weights: fp32 weights, new or loaded
    head, no dropout; and notices for the user.

    Raises:
        RmtoolError: E0205 unknown lora.targets; E0402, E0404, E0406, E0407 as from `build_classifier`; E0505 4-bit
            weights are not supported here.
    """
    apply_settings()
    train = recipe.train
    # Random weights and adapters must not depend on what was sampled before.
    torch.manual_seed(train.seed)
    quantized = recipe.lora.quantize != "none"
    if quantized:
        require_4bit()
    classifier, head = build_classifier(
        folder,
        dtype=torch.float32,
        random_weights=recipe.model.weights == "random",
        quantized=quantized,
        new_head=recipe.model.head == "new",
        device=device,
    )
    set_pad_token(classifier, encoder.tokenizer.pad_token_id)
    if head.name:
        origin = "the checkpoint" if head.name == HEAD_WEIGHT else head.name
        notices = [f"score head: loaded from {origin} (set model.head=new to reinitialize it)"]
    else:
        init_score_head(classifier, train.seed)
        notices = [f"score head: new (initialized with train.seed {train.seed})"]
    notices += unread_notice(head)
    if train.liger == "auto" and torch.cuda.is_available():
        notices.append(apply_liger(classifier))
    if train.freeze == "backbone":
        notices.append("trainable: score head only")
    make_trainable(classifier, recipe)
    return RewardModel(classifier, encoder.tokenizer.pad_token_id, compute_precision(train.precision)), notices


def make_trainable(classifier: PreTrainedModel, recipe: Recipe) -> None:
    """Disable dropout, and set up checkpointing, frozen weights and adapters as configured, in place."""
    disable_dropout(classifier)
    # With checkpointing, transformers makes layer inputs require gradients, which a frozen backbone does not need.
    if recipe.train.gradient_checkpointing and recipe.train.freeze == "none":
        classifier.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.train.freeze == "backbone":
        for parameter in backbone_parameters(classifier):
            parameter.requires_grad_(False)
    if recipe.lora.rank:
        add_adapters(classifier, recipe.lora)


def require_4bit() -> None:
    """Check that 4-bit weights can be used.

    Raises:
        RmtoolError: E0505 no CUDA device available, or bitsandbytes not installed.
    """
    if not torch.cuda.is_available():
        raise RmtoolError(
            "E0505", "lora.quantize=4bit requires a CUDA device, but none is available", "set lora.quantize=none"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RmtoolError(
            "E0505", "lora.quantize=4bit requires bitsandbytes, but it is not installed", "run pip install bitsandbytes"
        )


def add_adapters(classifier: Any, lora: LoraConfig) -> None:
    """Freeze `classifier` and add LoRA adapters, in place; the score head stays trainable, without an adapter.

    Raises:
        RmtoolError: E0205 `lora.targets` names no linear layers of the model.
    """
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
        raise RmtoolError(
            "E0205", f"lora.targets: {first_line(error)}", "use names of linear layers, or all-linear"
        ) from error
    # Not peft's `modules_to_save`, which trains a copy: the head is saved under its own name.
    for parameter in getattr(classifier, HEAD).parameters():
        parameter.requires_grad_(True)
