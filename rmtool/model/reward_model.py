"""The reward model: a transformers `*ForSequenceClassification` with one label, read at each response's last token.

In: a folder with a causal LM (to train) or with a checkpoint that has its score head (to use). Out: a `RewardModel`,
whose forward takes a `Batch` and returns rewards, float32[N]; backbone and head run inside that one forward, so that
engines which gather parameters by hooks see both. What is inside stays an ordinary transformers model.
Cost: the weights, once; choosing the layout takes a few short forwards.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel

from rmtool.dist import ALONE, Ranks
from rmtool.errors import RmtoolError
from rmtool.model.bf16_emulation import wide_products
from rmtool.model.fp32 import fp32_compute
from rmtool.packing import attention, attention_check
from rmtool.packing import prefix_sharing as compat
from rmtool.packing.attention_check import KernelCheck
from rmtool.packing.last_layer import read_last_layer_sparsely
from rmtool.packing.pack_layout import Batch, PackedBatch, pack, pad, plan_packs, plan_reads
from rmtool.tokenization.response_group import Ids, TokenTree, build_tree
from rmtool.ui import Bar

HEAD = "score"  # transformers' name for the last-token head of every decoder-only *ForSequenceClassification
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ScoreHead(nn.Linear):
    """The head, under a type of its own: engines that send linear layers' weights in bf16 leave it in fp32."""


class RewardModel(nn.Module):
    """Rewards of packed or padded batches.

    Args:
        classifier: a `*ForSequenceClassification` with a bias-free one-row `score` head.
        pad_id: what fills the right side of padded batches.
        precision: "fp32", or "bf16" or "fp16" for autocast around the backbone. The head always runs in the dtype of
            its weights without autocast: in bfloat16 rewards near 4 would be 0.03 apart.
    """

    def __init__(self, classifier: PreTrainedModel, pad_id: int, precision: str = "fp32"):
        super().__init__()
        self.classifier = classifier
        self.pad_id = pad_id
        self.precision = precision
        self.stock_attention = classifier.config._attn_implementation
        self.shares_prompts = False
        read_last_layer_sparsely(self.backbone)
        getattr(classifier, HEAD).__class__ = ScoreHead

    @property
    def backbone(self) -> PreTrainedModel:
        return getattr(self.classifier, self.classifier.base_model_prefix)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, batch: Batch) -> torch.Tensor:
        """Rewards float32[N], in the order in which `pack` or `pad` laid the responses."""
        # Its cache would keep a copy of every weight until the forward's end; none is used twice.
        half = torch.autocast(
            self.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32", cache_enabled=False
        )
        with half, self.products():
            states = self._last_states(batch)
        with torch.autocast(self.device.type, enabled=False):
            head = getattr(self.classifier, HEAD)
            return head(states.to(next(head.parameters()).dtype))[:, 0].float()

    def products(self) -> AbstractContextManager[Any]:
        """A block that backwards run in, as forwards do: see `products.py`."""
        return wide_products(self.device, self.precision)

    def _last_states(self, batch: Batch) -> torch.Tensor:
        """Hidden states of each response's last token, [N, hidden]."""
        if isinstance(batch, PackedBatch):
            output = self.backbone(
                input_ids=batch.input_ids, position_ids=batch.position_ids, packed=batch.layout, use_cache=False
            )
            return output.last_hidden_state[0, batch.reward_index]
        output = self.backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        rows = torch.arange(len(batch.reward_index), device=batch.reward_index.device)
        return output.last_hidden_state[rows, batch.reward_index]

    def share_prompts(self, shares: bool) -> None:
        """Switch between packed batches (True) and padded ones (False)."""
        self.shares_prompts = shares
        self.classifier.set_attn_implementation(attention.NAME if shares else self.stock_attention)

    def collate(self, trees: Sequence[TokenTree]) -> Batch:
        """The batch that this model's layout wants, on its device."""
        batch = pack(trees) if self.shares_prompts else pad(trees, self.pad_id)
        return batch.to(self.device)

    def plan(self, trees: Sequence[TokenTree], budget: int, multiple: int = 1) -> list[list[int]]:
        """`plan_packs` for this model's layout."""
        return plan_packs(trees, budget, multiple, not self.shares_prompts, self.key_cost)

    @functools.cached_property
    def key_cost(self) -> float:
        """What a token asks of attention for each key, in parts of what it asks of the linear layers: 4 hidden flops
        a layer, of 2 flops a weight (Kaplan et al., arXiv 2001.08361, table 1).
        """
        config = self.backbone.config.get_text_config()
        return 2 * config.hidden_size * config.num_hidden_layers / max(self.multiplied_weights, 1)

    @property
    def multiplied_weights(self) -> int:
        """Numbers of the backbone's matrices that a token meets: not the embedding's, which is looked up; of the
        experts, those that it is sent to.
        """
        config = self.backbone.config.get_text_config()
        weights = -config.vocab_size * config.hidden_size
        for name, parameter in self.backbone.named_parameters():
            shape = _shape(parameter)
            if ".experts." in name and len(shape) == 3:  # experts x rows x columns
                weights += getattr(config, "num_experts_per_tok", shape[0]) * math.prod(shape[1:])
            elif is_matrix(parameter):
                weights += math.prod(shape)
        return weights


def choose_layout(model: RewardModel, run: nn.Module, max_length: int) -> str | None:
    """Let `model` share prompts if all gates of `compat` agree; else return why it runs padded.

    Args:
        run: what to call for a forward: the model, or the engine wrapped around it (the same on every rank).

    Raises:
        RmtoolError: E0411 the model has too few positions; E0410, E0412 its rewards would depend on the batch in any
            layout.
    """
    compat.require_positions(model.backbone, max_length)
    compat.require_fixed_positions(model.backbone, max_length)
    config = model.backbone.config.get_text_config()
    trees = compat.probe_trees(config.vocab_size, getattr(config, "sliding_window", None), max_length)

    def states(shares: bool, trees: Sequence[TokenTree]) -> torch.Tensor:
        model.share_prompts(shares)
        return _read_states(model, run, trees)

    training, shares = model.training, False
    run.eval()
    try:
        with _in_fp32(model):
            probe = compat.Probe(trees, partial(states, False))
            reason = compat.declared_reason(model.backbone)
            reason = reason or compat.sharing_failure(probe, partial(states, True, trees))
        if reason is None:
            check = KernelCheck()
            model.share_prompts(True)
            model.classifier.set_attn_implementation(attention_check.NAME)
            _read_states(model, run, trees)
            reason = compat.kernel_failure(check.worst)
        if reason is not None:
            with _in_fp32(model):
                compat.require_padding(probe)
        shares = reason is None
    finally:
        run.train(training)
        model.share_prompts(shares)
    return reason


@torch.no_grad()
def _read_states(model: RewardModel, run: nn.Module, trees: Sequence[TokenTree]) -> torch.Tensor:
    """What the score head reads of one batch, float32[N, hidden], in the order of the rewards."""
    read = list[torch.Tensor]()
    head = getattr(model.classifier, HEAD)
    hook = head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].float()))
    try:
        run(model.collate(trees))
    finally:
        hook.remove()
    return read[0]


@contextlib.contextmanager
def _in_fp32(model: RewardModel) -> Iterator[None]:
    """A block in which forwards compute in fp32, whatever the precision and the weights' dtype."""
    precision, model.precision = model.precision, "fp32"
    try:
        with fp32_compute(model.backbone):
            yield
    finally:
        model.precision = precision


@torch.no_grad()
def compute_rewards(
    model: RewardModel,
    trees: Sequence[TokenTree],
    budget: int,
    bar: Bar,
    run: nn.Module | None = None,
    ranks: Ranks = ALONE,
) -> list[list[float]]:
    """Rewards of every response of every tree, in the order given; the same on every rank.

    Each distinct response is computed once, and each prompt once per pack that its responses fill, wherever in `trees`
    they stand. `trees` is read several times, one tree at a time; it may live on disk. `bar` advances to len(trees).

    Args:
        run: what to call for a forward: the model, or the engine wrapped around it.
        ranks: who shares the packs. All call this with the same trees, and run equally many forwards.

    Raises:
        RmtoolError: E0503 a pack does not fit into the device's memory.
    """
    run = model if run is None else run
    run.eval()
    lengths, starts, row_of = array("q"), array("q", [0]), array("q")
    for row, tree in enumerate(trees):
        lengths.extend(len(tree.prompt) + len(response) for response in tree.responses)
        starts.append(len(lengths))
        row_of.extend([row] * len(tree.responses))

    @functools.lru_cache(maxsize=1)
    def tree_of(row: int) -> TokenTree:
        return trees[row]  # from a disk, it costs all its responses

    def window(item: int, start: int, stop: int) -> Ids:
        row = row_of[item]
        return tree_of(row).window(item - starts[row], start, stop)

    plan = plan_reads(window, lengths, budget, not model.shares_prompts)
    values, done = np.zeros(len(lengths)), 0
    for first in range(0, len(plan.packs), ranks.world):
        # A rank without a pack in the last round runs the round's first one again: all must take part.
        mine = first + ranks.rank if first + ranks.rank < len(plan.packs) else first
        items = plan.packs[mine]
        try:
            alone = [build_tree([window(item, 0, lengths[item])]) for item in items]
            rewards = run(model.collate(alone)).cpu()
        except torch.OutOfMemoryError as error:
            raise out_of_memory("--tokens-per-pack") from error
        if mine == first + ranks.rank:
            values[items] = rewards
        before, done = done, min(first + ranks.world, len(plan.packs))
        bar.advance(len(trees) * done // len(plan.packs) - len(trees) * before // len(plan.packs))
    values = ranks.sum(torch.from_numpy(values)).numpy()[plan.same]
    return [values[start:end].tolist() for start, end in itertools.pairwise(starts)]


def out_of_memory(setting: str) -> RmtoolError:
    """What to say when the device is full; `setting` is what bounds the memory."""
    return RmtoolError("E0503", "the device has not enough memory for one forward", f"lower {setting}")


# ---------------------------------------------------------------------------------------------------- building


def build_classifier(
    folder: Path, *, dtype: torch.dtype, random_weights: bool = False, quantized: bool = False
) -> tuple[PreTrainedModel, bool]:
    """A one-label classifier from `folder`, and whether its score head came from the checkpoint.

    Args:
        random_weights: draw all weights from the folder's config.json instead of loading them.
        quantized: load the linear layers' weights in 4 bits (NF4, quantised twice: Dettmers et al., arXiv 2305.14314,
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
        with uncut():  # every rank draws the same weights, as one process does
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


def first_line(error: BaseException) -> str:
    """The first line of another library's message, for ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def draw_head(classifier: PreTrainedModel, seed: int) -> None:
    """Draw the score head from N(0, 1/(hidden_size + 1)), std = 1/sqrt(hidden_size + 1) (Stiennon et al.,
    arXiv 2009.01325, p. 11), also where ZeRO-3 has cut the parameter up.
    """
    weight = getattr(classifier, HEAD).weight
    std = 1 / math.sqrt(hidden_size(classifier) + 1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), gathered([weight], change=True):
        # Drawn on the CPU, so that every device and number of ranks starts from the same head.
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * std)


def hidden_size(classifier: PreTrainedModel) -> int:
    return int(classifier.config.get_text_config().hidden_size)


def gathered(parameters: Sequence[nn.Parameter], change: bool = False) -> AbstractContextManager[Any]:
    """A block in which ZeRO-3 parameters are whole; with `change`, what rank 0 writes into them stays."""
    cut = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not cut:
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(cut, modifier_rank=0 if change else None)


@contextlib.contextmanager
def uncut() -> Iterator[None]:
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


def turn_dropout_off(classifier: PreTrainedModel) -> None:
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
