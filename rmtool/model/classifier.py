"""A transformers `*ForSequenceClassification` with one label and a last-token score head: built, and prepared.

In: a folder with a causal LM (to train) or with a checkpoint that has its score head (to use). Out: the classifier.
Cost: the weights, once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel

from rmtool.errors import RmtoolError, first_line

HEAD = "score"  # transformers' name for the last-token head of every decoder-only *ForSequenceClassification


class ScoreHead(nn.Linear):
    """The head, under a type of its own: engines that send linear layers' weights in bf16 leave it in fp32."""


def build_classifier(
    folder: Path, *, dtype: torch.dtype, random_weights: bool = False, quantized: bool = False
) -> tuple[PreTrainedModel, bool]:
    """A one-label classifier from `folder`, and whether its score head came from the checkpoint.

    Args:
        random_weights: draw all weights from the folder's config.json instead of loading them.
        quantized: load the linear layers' weights in 4 bits (NF4, quantized twice: Dettmers et al., arXiv 2305.14314,
            section 3), the head's not; products are then computed in bfloat16.

    Raises:
        RmtoolError: E0402 more than one label, E0404 not loadable, E0406 not a decoder with a last-token head.
    """
    config = read_config(folder)
    if (
        not random_weights
        and getattr(config, "architectures", None)
        and _is_classifier(config)
        and config.num_labels != 1
    ):
        raise RmtoolError(
            "E0402",
            f"{folder} has {config.num_labels} labels; a reward model has one",
            "use a checkpoint with num_labels = 1, or train one from its causal LM",
        )
    config.num_labels = 1
    if random_weights:
        classifier, loaded = _draw(config, dtype), False
    else:
        classifier, loaded = _load(folder, config, dtype, quantized)
    head = getattr(classifier, HEAD, None)
    if not isinstance(head, nn.Linear) or head.bias is not None or classifier.config.is_encoder_decoder:
        raise RmtoolError(
            "E0406",
            f"{type(classifier).__name__} does not read its score at the last token",
            "use a decoder-only model (Llama, Qwen, Mistral, Gemma, OLMo, ...)",
        )
    return classifier, loaded


def _is_classifier(config: Any) -> bool:
    return any("SequenceClassification" in name for name in config.architectures)


def read_config(folder: Path) -> Any:
    """The folder's transformers config.

    Raises:
        RmtoolError: E0404 it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise RmtoolError(
            "E0404", f"the model's config cannot be read: {first_line(error)}", f"look at {folder}/config.json"
        ) from error


def _draw(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with without_zero3_init():  # every rank draws the same weights, as one process does
            return AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    except (ValueError, ImportError) as error:
        raise RmtoolError("E0406", first_line(error), "use a decoder-only model (Llama, Qwen, ...)") from error


def _four_bit() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[HEAD],
    )


def _load(folder: Path, config: Any, dtype: torch.dtype, quantized: bool) -> tuple[PreTrainedModel, bool]:
    if not list(folder.glob("*.safetensors")):
        raise RmtoolError(
            "E0407",
            f"{folder} has no safetensors weights",
            "save the model with save_pretrained (pickled .bin files can run code and are not read)",
        )
    extra: dict[str, Any] = {"quantization_config": _four_bit()} if quantized else {}
    try:
        classifier, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **extra,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise RmtoolError(
            "E0404", f"the model cannot be loaded: {first_line(error)}", f"check the files in {folder}"
        ) from error
    surplus = sorted(key for key in info["unexpected_keys"] if key.startswith(f"{HEAD}."))
    if surplus:
        raise RmtoolError(
            "E0406",
            f"the score head has weights that transformers does not read: {', '.join(surplus)}",
            "train it anew",
        )
    missing = {key for key in info["missing_keys"] if not key.startswith(f"{HEAD}.")}
    if missing:
        raise RmtoolError(
            "E0404",
            f"{len(missing)} weights are missing from {folder}, {min(missing)} the first",
            "download or save the checkpoint again",
        )
    return classifier, f"{HEAD}.weight" not in info["missing_keys"]


def init_score_head(classifier: PreTrainedModel, seed: int) -> None:
    """Draw the score head from N(0, 1/(hidden_size + 1)), std = 1/sqrt(hidden_size + 1) (Stiennon et al.,
    arXiv 2009.01325, p. 11), also where ZeRO-3 has cut the parameter up.
    """
    weight = getattr(classifier, HEAD).weight
    std = 1 / math.sqrt(hidden_size(classifier) + 1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), zero3_gathered([weight], change=True):
        # Drawn on the CPU, so that every device and number of ranks starts from the same head.
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * std)


def hidden_size(classifier: PreTrainedModel) -> int:
    return int(classifier.config.get_text_config().hidden_size)


def zero3_gathered(parameters: Sequence[nn.Parameter], change: bool = False) -> AbstractContextManager[Any]:
    """A block in which ZeRO-3 parameters are whole; with `change`, what rank 0 writes into them stays."""
    cut = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not cut:
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(cut, modifier_rank=0 if change else None)


@contextlib.contextmanager
def without_zero3_init() -> Iterator[None]:
    """A block in which new models are whole: under ZeRO-3, transformers would cut every one up, on all ranks."""
    from accelerate.state import AcceleratorState, is_initialized
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    plugin = AcceleratorState().deepspeed_plugin if is_initialized() else None
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin is not None:
            set_hf_deepspeed_config(plugin.dschf)


def backbone_parameters(classifier: PreTrainedModel) -> list[nn.Parameter]:
    """All but the score head's."""
    return [parameter for name, parameter in classifier.named_parameters() if not name.startswith(f"{HEAD}.")]


def disable_dropout(classifier: PreTrainedModel) -> None:
    """No dropout anywhere (Ziegler et al., arXiv 1909.08593, p. 3), for training too: modules, attention, config."""
    for module in classifier.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if _is_noise(name) and isinstance(value, float):
                setattr(module, name, 0.0)
    config = classifier.config.get_text_config()
    for name, value in vars(config).items():
        if _is_noise(name) and isinstance(value, float):
            setattr(config, name, 0.0)


def _is_noise(name: str) -> bool:
    """Names of rates in transformers' modules and configs: attention_dropout, resid_pdrop, layerdrop, jitter_noise."""
    return "drop" in name or "jitter" in name


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether it has two dimensions or more; ZeRO-3 leaves a flat piece of it in its place, and its shape apart."""
    return len(_shape(parameter)) >= 2


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def set_pad_token(classifier: PreTrainedModel, pad_id: int, vocabulary: int) -> None:
    """Write the pad id into the config, where batched scoring in transformers reads it; make room for new tokens."""
    config = classifier.config.get_text_config()
    embeddings = classifier.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    if vocabulary > embeddings.num_embeddings:
        # The new rows belong to the pad token, which nothing attends to; a costly fit of their mean buys nothing.
        classifier.resize_token_embeddings(vocabulary, mean_resizing=False)
    config.pad_token_id = classifier.config.pad_token_id = pad_id


def apply_liger(classifier: PreTrainedModel) -> None:
    """Liger's kernels for norms, rotary embedding and MLP. Its fused cross entropy would put a causal-LM forward, which
    reads an `lm_head` that a reward model has not, in place of the model's own.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(classifier, fused_linear_cross_entropy=False, cross_entropy=False)
