"""Building and preparing a transformers `*ForSequenceClassification` with one label and a last-token score head.

In: a folder with a causal LM (to train) or a reward model checkpoint (to use). Out: the classifier.
Cost: reads the weights once.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rmtool.errors import RmtoolError, first_line
from rmtool.model.model_config import read_config
from rmtool.model.stored_weights import HeadOrigin, LoadingInfo, find_score_head, require_values
from rmtool.model.weight_files import HEAD_WEIGHT, StoredWeights, read_headers

HEAD = "score"  # transformers' name for the last-token head of every decoder-only *ForSequenceClassification


class ScoreHead(nn.Linear):
    """The score head; a subclass, so that engines that send weights of `nn.Linear` in bf16 leave it in fp32."""


def build_classifier(
    folder: Path,
    *,
    dtype: torch.dtype,
    random_weights: bool = False,
    quantized: bool = False,
    new_head: bool = False,
    device: torch.device | None = None,
) -> tuple[PreTrainedModel, HeadOrigin]:
    """Build a one-label classifier from `folder`; returns it, and where its score head comes from.

    Args:
        dtype: of the matrices (see `matrices`). All else is fp32: then the residual stream is, too, under autocast, and
            the forward is that of training, which rounds fp32 matrices to the same numbers.
        random_weights: initialize all weights from the folder's config.json instead of loading them.
        quantized: load linear layers, but not the head, in 4 bits (NF4 with double quantization, Dettmers et al.,
            arXiv 2305.14314, section 3), and compute in bf16.
        new_head: the score head will be initialized: the checkpoint may have any, and weights that nothing reads.
        device: a GPU that the weights are read to one at a time, so that the host never holds them all.

    Raises:
        RmtoolError: E0402 more than one label; E0404 the config or the weights cannot be loaded; E0406 not a decoder
            with a last-token head, or weights that it does not read; E0407 no safetensors; E0414 quantized weights.
    """
    config = read_config(folder)
    config.num_labels = 1
    if random_weights:
        return _require_score_head(_initialize(config)), HeadOrigin()
    stored = read_headers(folder)
    with torch.device("meta"):
        empty = _require_score_head(_initialize(config))
    require_values(stored, {name: tuple(value.shape) for name, value in empty.state_dict().items()})
    head = find_score_head(stored, _loading_info(empty, stored), config.get_text_config(), new_head)
    if new_head and len(labels := stored.shapes.get(HEAD_WEIGHT, ())) == 2:
        config.num_labels = labels[0]
    classifier = _load(folder, config, empty, dtype, quantized, device)
    _replace_head_of_several_labels(classifier)
    if head.name not in (None, HEAD_WEIGHT):  # transformers does not know it
        _fill_head(classifier, stored.tensor(head.name))
    return classifier, head


def _fill_head(classifier: PreTrainedModel, values: torch.Tensor) -> None:
    weight = getattr(classifier, HEAD).weight
    with torch.no_grad(), zero3_gathered([weight], change=True):
        weight.data.copy_(values.view(1, -1))


def _loading_info(empty: PreTrainedModel, stored: StoredWeights) -> LoadingInfo:
    """Find what transformers would load, with tensors that have no memory: under ZeRO-3, a real load does not report
    weights that are unread or do not fit.
    """
    classifier_class: Any = type(empty)
    beside = stored.beside()
    state = {name: torch.empty(shape, device="meta") for name, shape in stored.shapes.items() if name not in beside}
    with without_zero3_init(), _loading_errors(stored.folder):
        _, info = classifier_class.from_pretrained(
            None,
            config=empty.config,
            state_dict=state,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return LoadingInfo.of(info, beside)


def _require_score_head(classifier: PreTrainedModel) -> PreTrainedModel:
    head = getattr(classifier, HEAD, None)
    if not isinstance(head, nn.Linear) or head.bias is not None or classifier.config.is_encoder_decoder:
        raise RmtoolError(
            "E0406",
            f"{type(classifier).__name__} is not supported: no last-token score head",
            "use a decoder-only model (Llama, Qwen, Mistral, Gemma, OLMo, ...)",
        )
    return classifier


def _replace_head_of_several_labels(classifier: PreTrainedModel) -> None:
    """Replace a head of several labels, which is going to be initialized, by one of one label."""
    if classifier.config.num_labels == 1:
        return
    weight = getattr(classifier, HEAD).weight
    head = nn.Linear(hidden_size(classifier), 1, bias=False, device=weight.device, dtype=weight.dtype)
    setattr(classifier, HEAD, head)
    classifier.config.num_labels = 1
    setattr(classifier, "num_labels", 1)  # noqa: B010 - not declared


def _initialize(config: Any) -> PreTrainedModel:
    try:
        with without_zero3_init():  # every rank initializes the same weights, as one process does
            return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except KeyError as error:  # of an activation, a RoPE type
        what = f"cannot build the model: config.json has the unknown value {error}"
        raise RmtoolError("E0404", what, "use a value that transformers has, or a later transformers") from error
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


@contextlib.contextmanager
def _loading_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise RmtoolError(
            "E0404", f"cannot load the model: {first_line(error)}", f"check the files in {folder}"
        ) from error


def _load(
    folder: Path,
    config: Any,
    empty: PreTrainedModel,
    dtype: torch.dtype,
    quantized: bool,
    device: torch.device | None,
) -> PreTrainedModel:
    extra: dict[str, Any] = {"quantization_config": _four_bit()} if quantized else {}
    if device is not None and device.type == "cuda":
        extra["device_map"] = {"": device}
    names = set() if dtype == torch.float32 else set(matrices(empty))
    with _loading_errors(folder), _arriving_in(type(empty), names, dtype):
        classifier = AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **extra
        )
    for name in names:
        parameter = classifier.get_parameter(name)
        parameter.data = parameter.data.to(dtype)  # has arrived in it, unless transformers has changed
    return classifier


def matrices(classifier: PreTrainedModel) -> Iterator[str]:
    """Yield the names of what activations are multiplied with under autocast: linear layers, but not the score head's,
    and the experts of mixtures.
    """
    for name, parameter in classifier.named_parameters():
        owner = classifier.get_submodule(name.rpartition(".")[0])
        linear = isinstance(owner, (nn.Linear, Conv1D)) and not name.startswith(f"{HEAD}.")
        if linear or (".experts." in name and parameter.dim() == 3):
            yield name


@contextlib.contextmanager
def _arriving_in(classifier_class: Any, names: set[str], dtype: torch.dtype) -> Iterator[None]:
    """Cast these weights one by one as they are read: the whole model in fp32 might not fit into memory."""
    plan = {f"^{re.escape(name)}$": dtype for name in names}
    classifier_class._get_dtype_plan = lambda _, __: plan
    try:
        yield
    finally:
        del classifier_class._get_dtype_plan  # what it inherits is found again


def init_score_head(classifier: PreTrainedModel, seed: int) -> None:
    """Initialize the score head from N(0, 1/(hidden_size + 1)), std = 1/sqrt(hidden_size + 1) (Stiennon et al.,
    arXiv 2009.01325, p. 11), also where ZeRO-3 has partitioned the parameter.
    """
    weight = getattr(classifier, HEAD).weight
    std = 1 / math.sqrt(hidden_size(classifier) + 1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), zero3_gathered([weight], change=True):
        # On the CPU, so that every device and number of ranks starts from the same head.
        weight.data.copy_(torch.randn(weight.shape, generator=generator, device="cpu") * std)


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


def set_pad_token(classifier: PreTrainedModel, pad_id: int) -> None:
    """Set the pad id in the config, where transformers looks for it in batches, and add its embedding if it is new."""
    config = classifier.config.get_text_config()
    embeddings = classifier.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    if pad_id >= embeddings.num_embeddings:
        # Nothing attends to the pad token: no need to fit its row to the others' mean.
        classifier.resize_token_embeddings(pad_id + 1, mean_resizing=False)
    config.pad_token_id = classifier.config.pad_token_id = pad_id
