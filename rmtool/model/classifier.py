"""Building and preparing a transformers `*ForSequenceClassification` with one label and a last-token score head.

In: a folder with a causal LM (to train) or a reward model checkpoint (to use). Out: the classifier.
Cost: reads the weights once.
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
    """The score head; a subclass, so that engines that send weights of `nn.Linear` in bf16 leave it in fp32."""


def build_classifier(
    folder: Path, *, dtype: torch.dtype, random_weights: bool = False, quantized: bool = False
) -> tuple[PreTrainedModel, bool]:
    """Build a one-label classifier from `folder`; returns it, and whether its score head came from the checkpoint.

    Args:
        random_weights: initialize all weights from the folder's config.json instead of loading them.
        quantized: load the linear layers' weights, but not the head's, in 4 bits (NF4 with double quantization:
            Dettmers et al., arXiv 2305.14314, section 3), and compute their products in bf16.

    Raises:
        RmtoolError: E0402 more than one label; E0404 the config or the weights cannot be loaded; E0406 not a decoder
            with a last-token head; E0407 no safetensors.
    """
    config = read_config(folder)
    has_head = any("SequenceClassification" in name for name in getattr(config, "architectures", None) or ())
    if not random_weights and has_head and config.num_labels != 1:
        raise RmtoolError(
            "E0402",
            f"a reward model must have one label: {folder} has {config.num_labels}",
            "use a checkpoint with num_labels = 1, or train one from its causal LM",
        )
    config.num_labels = 1
    if random_weights:
        classifier, loaded = _initialize(config, dtype), False
    else:
        classifier, loaded = _load(folder, config, dtype, quantized)
    head = getattr(classifier, HEAD, None)
    if not isinstance(head, nn.Linear) or head.bias is not None or classifier.config.is_encoder_decoder:
        raise RmtoolError(
            "E0406",
            f"{type(classifier).__name__} is not supported: no last-token score head",
            "use a decoder-only model (Llama, Qwen, Mistral, Gemma, OLMo, ...)",
        )
    return classifier, loaded


def read_config(folder: Path) -> Any:
    """Load the folder's transformers config.

    Raises:
        RmtoolError: E0404 it cannot be loaded.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise RmtoolError(
            "E0404", f"cannot load the model config: {first_line(error)}", f"check {folder}/config.json"
        ) from error


def _initialize(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with without_zero3_init():  # every rank initializes the same weights, as one process does
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
            f"no safetensors weights found in {folder}",
            "save the model with save_pretrained (pickled .bin files can run code and are not supported)",
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
            "E0404", f"cannot load the model: {first_line(error)}", f"check the files in {folder}"
        ) from error
    surplus = sorted(key for key in info["unexpected_keys"] if key.startswith(f"{HEAD}."))
    if surplus:
        raise RmtoolError(
            "E0406",
            f"unexpected score head weights: {', '.join(surplus)}",
            "use a checkpoint whose score head is a linear layer without bias, or train one from its causal LM",
        )
    missing = {key for key in info["missing_keys"] if not key.startswith(f"{HEAD}.")}
    if missing:
        raise RmtoolError(
            "E0404",
            f"{len(missing)} weights are missing from {folder} (first: {min(missing)})",
            "download or save the checkpoint again",
        )
    return classifier, f"{HEAD}.weight" not in info["missing_keys"]


def init_score_head(classifier: PreTrainedModel, seed: int) -> None:
    """Initialize the score head from N(0, 1/(hidden_size + 1)), std = 1/sqrt(hidden_size + 1) (Stiennon et al.,
    arXiv 2009.01325, p. 11), also where ZeRO-3 has partitioned the parameter.
    """
    weight = getattr(classifier, HEAD).weight
    std = 1 / math.sqrt(hidden_size(classifier) + 1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), zero3_gathered([weight], change=True):
        # On the CPU, so that every device and number of ranks starts from the same head.
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * std)


def hidden_size(classifier: PreTrainedModel) -> int:
    return int(classifier.config.get_text_config().hidden_size)


def zero3_gathered(parameters: Sequence[nn.Parameter], change: bool = False) -> AbstractContextManager[Any]:
    """Gather ZeRO-3 parameters inside the context; with `change`, what rank 0 writes into them is kept."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(partitioned, modifier_rank=0 if change else None)


@contextlib.contextmanager
def without_zero3_init() -> Iterator[None]:
    """Build complete models inside the context: under ZeRO-3, transformers partitions every new one over the ranks."""
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
    """List all parameters but the score head's."""
    return [parameter for name, parameter in classifier.named_parameters() if not name.startswith(f"{HEAD}.")]


def disable_dropout(classifier: PreTrainedModel) -> None:
    """Set all dropout to 0 (Ziegler et al., arXiv 1909.08593, p. 3), for training too: modules, attention, config."""
    for module in classifier.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for owner in (*classifier.modules(), classifier.config.get_text_config()):
        for name, value in vars(owner).items():
            # Rates in transformers' modules and configs: attention_dropout, resid_pdrop, layerdrop, jitter_noise.
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(owner, name, 0.0)


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether the parameter has two dimensions or more."""
    return len(full_shape(parameter)) >= 2


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's shape before ZeRO-3 partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def set_pad_token(classifier: PreTrainedModel, pad_id: int, vocabulary: int) -> None:
    """Set the pad id in the config, where transformers looks for it in batches, and add embeddings of new tokens."""
    config = classifier.config.get_text_config()
    embeddings = classifier.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    if vocabulary > embeddings.num_embeddings:
        # The new rows belong to the pad token, which nothing attends to: no need to fit them to the others' mean.
        classifier.resize_token_embeddings(vocabulary, mean_resizing=False)
    config.pad_token_id = classifier.config.pad_token_id = pad_id


def apply_liger(classifier: PreTrainedModel) -> None:
    """Install Liger's kernels for norms, rotary embedding and MLP. Not its fused cross entropy, which would replace the
    model's forward by a causal LM's, with an `lm_head` that a reward model lacks.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(classifier, fused_linear_cross_entropy=False, cross_entropy=False)
