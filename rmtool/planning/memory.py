"""Memory that training takes on one device, by part.

In: a recipe, a folder with a config.json, and the tokens of a pack. Out: a `Memory`.
Weights, gradients and optimizer states are counted. Activations are measured: a few layers run forward and backward
on fake tensors (shapes without storage), and the bytes that are alive at the same time are added up.
Cost: some seconds for 32 layers; no weights are read.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rmtool.config import Recipe
from rmtool.model.classifier import build_classifier, is_matrix
from rmtool.model.loading import make_trainable
from rmtool.model.precision import PRECISIONS
from rmtool.model.reward_model import RewardModel
from rmtool.packing import prefix_sharing
from rmtool.packing.attention import KERNEL_CAPABILITY, UnsupportedAttentionError, takes_kernel
from rmtool.packing.layers import decoder_layers, keep_first_layers
from rmtool.recipe import engine_of, world_size
from rmtool.tokenization.response_group import ResponseGroup, build_group
from rmtool.training.engine import LIVE_PARAMETERS, PERSISTENT_PARAMETERS, REDUCE_BUCKET

SHARDED = ("fsdp2", "zero2", "zero3")  # engines that split gradients and optimizer states
MOST_PAIRS = 8  # in the fake pack: each takes time, and more need hardly more memory
TRIED_LAYERS = (3, 5)  # numbers of layers that are run; those between are assumed to take the difference each
FP32, BF16 = 4, 2  # bytes
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes per weight: 4 bits, a byte per 64, 4 per 64 x 256 (arXiv 2305.14314, 3)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device; `host`: bytes in CPU memory per process, for offloaded states.

    optimizer:   both moments, and the copy of the weights that ZeRO updates
    activations: most that a forward and backward of a pack holds, without the other parts
    buffers:     weights gathered from other ranks, and gradients sent to them
    """

    parameters: int
    trainable: int
    tokens: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    host: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def plan_memory(recipe: Recipe, folder: Path, tokens: int, per_pair: int = 512) -> Memory:
    """Estimate the memory of training the model whose config.json is in `folder`, with packs of `tokens` tokens, about
    `per_pair` of them per pair.

    Measured with torch's own kernels; Liger's hold less.
    """
    engine, processes = engine_of(recipe.launch), world_size(recipe.launch)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(recipe, folder)
        sizes = [p.numel() for p in model.parameters()]
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        frozen = _frozen_bytes(recipe, model)
        matrices = sum(p.numel() for p in model.parameters() if is_matrix(p))
        embedding, layer = _embedding(model).numel(), _fsdp_buffers(recipe, model)
        activations = _activations(recipe, folder, model, tokens, per_pair)
        activations += kernel_buffers(model, tokens, per_pair)
    whole, some = sum(sizes), sum(trained)
    part = processes if engine in SHARDED else 1
    weights, buffers = frozen + FP32 * some, _buckets(recipe, some, activations)
    if engine == "zero3":
        kept = FP32 * sum(size for size in sizes if size <= PERSISTENT_PARAMETERS)
        weights = kept + weights // processes
        buffers += FP32 * max(min(whole, LIVE_PARAMETERS), *sizes)  # gathered in bf16, but held in fp32
    if engine == "fsdp2":
        weights = FP32 * (whole - matrices) + FP32 * matrices // processes
        buffers = max(layer, 2 * FP32 * embedding - activations)  # these are small when the embedding is gathered
    gradients, optimizer = FP32 * some // part, 2 * FP32 * some // part
    if engine.startswith("zero"):
        optimizer += FP32 * some // part
    away = gradients + optimizer if recipe.launch.offload_optimizer else 0
    if away:
        gradients = optimizer = 0
    return Memory(whole, some, tokens, weights, gradients, optimizer, activations, buffers, away)


def _buckets(recipe: Recipe, trainable: int, activations: int) -> int:
    """Bytes of gradient buckets, beyond the gradients. DDP's gradients are views of its buckets, which it makes anew
    before a forward of the second step, where there are no activations; DeepSpeed has a bucket per dtype, and ZeRO-2
    two, one filled while the other is sent.
    """
    engine = engine_of(recipe.launch)
    if engine == "ddp":
        return max(0, FP32 * trainable - activations)
    if not engine.startswith("zero"):
        return 0
    sizes = FP32 + BF16 if recipe.train.precision == "bf16" else FP32
    return (2 if engine == "zero2" else 1) * sizes * min(REDUCE_BUCKET, trainable)


def _fsdp_buffers(recipe: Recipe, model: RewardModel) -> int:
    """Most bytes that FSDP2 takes for one of the modules that it gathers at a time, but for the embedding: its weights,
    those of the next one as they are received and as they are used, its gradients, and these in fp32 to be sent.
    """
    half = BF16 if recipe.train.precision == "bf16" else FP32
    linear = [
        sum(m.weight.numel() for m in layer.modules() if type(m) is nn.Linear)
        for layer in decoder_layers(model.backbone)
    ]
    others = [
        sum(p.numel() for p in module.parameters(recurse=False) if is_matrix(p))
        for module in model.modules()
        if not isinstance(module, nn.Linear | nn.Embedding)
    ]
    return max((4 * half + FP32) * max(linear, default=0), (4 * FP32 + FP32) * max(others))


def fake_model(recipe: Recipe, folder: Path, depth: int | None = None) -> RewardModel:
    """Build the model of a training run, or its first `depth` layers, for use in a FakeTensorMode."""
    with unset_fake_temporarily(), torch.device("meta"):  # peft moves what it adds, which fake tensors forbid
        classifier, _ = build_classifier(folder, dtype=torch.float32, random_weights=True)
        if depth:
            keep_first_layers(getattr(classifier, classifier.base_model_prefix), depth)
        make_trainable(classifier, recipe)
        model = RewardModel(classifier, 0, recipe.train.precision)
    # With bf16 weights, autocast makes no copies.
    arrive = engine_of(recipe.launch) == "fsdp2" or recipe.lora.quantize != "none"
    half = torch.bfloat16 if recipe.train.precision == "bf16" and arrive else torch.float32
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            dtype = half if type(module) is nn.Linear else value.dtype
            module._parameters[name] = nn.Parameter(torch.empty(value.shape, dtype=dtype), value.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    model.share_prompts(padded_reason(model) is None)
    return model.train()


def padded_reason(model: RewardModel) -> str | None:
    """Why a fake model will not share prefixes; None if it might. Some attention only shows it when called."""
    if reason := prefix_sharing.declared_reason(model.backbone):
        return reason
    shares = model.shares_prompts
    model.share_prompts(True)
    try:
        with torch.no_grad():
            model(model.collate([_pair(8, 0, padded=False)]))
    except UnsupportedAttentionError as error:
        return str(error)
    finally:
        model.share_prompts(shares)
    return None


def _frozen_bytes(recipe: Recipe, model: RewardModel) -> int:
    """Bytes of the frozen weights."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if recipe.lora.quantize == "none":
        return FP32 * sum(p.numel() for p in frozen)
    small = [p for p in frozen if p.ndim < 2 or p is _embedding(model)]
    whole = sum(p.numel() for p in small)
    return FP32 * whole + math.ceil(NF4 * (sum(p.numel() for p in frozen) - whole))


def _activations(recipe: Recipe, folder: Path, model: RewardModel, tokens: int, per_pair: int) -> int:
    """Peak bytes besides weights and gradients, in a forward and backward over `tokens` tokens.

    They are linear in the number of layers, except for the gradient of the embedding, made when they are freed.
    """
    pairs = min(max(1, tokens // per_pair), MOST_PAIRS)
    groups = [_pair(tokens // pairs, first, not model.shares_prompts) for first in range(pairs)]
    depth, (few, more) = len(decoder_layers(model.backbone)), TRIED_LAYERS
    embedding = _embedding(model)
    gradient = FP32 * embedding.numel() if embedding.requires_grad else 0
    if depth <= more:
        return max(_most_alive(recipe, model, groups), gradient)
    less, most = (_most_alive(recipe, fake_model(recipe, folder, layers), groups) for layers in TRIED_LAYERS)
    return max(less + (most - less) * (depth - few) // (more - few), gradient)


def _most_alive(recipe: Recipe, model: RewardModel, groups: Sequence[ResponseGroup]) -> int:
    _embedding(model).requires_grad_(False)
    frees = engine_of(recipe.launch) in SHARDED  # gradients, once they are in the bucket
    for parameter in model.parameters():
        if parameter.requires_grad and not frees:
            parameter.grad = torch.zeros_like(parameter)  # of the step's earlier packs
        if parameter.requires_grad and frees:
            parameter.register_post_accumulate_grad_hook(_forget_gradient)
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    with LiveTensorTracker(known) as alive:
        model(model.collate(groups)).sum().backward()
    return alive.most


def kernel_buffers(model: RewardModel, tokens: int, per_pair: int) -> int:
    """Bytes that attention's kernel for GPUs needs in the backward of a layer, and the loop does not: fp32 sums for the
    gradients of queries, padded to 128 per node, gradients of keys and values for every query head, and those of the
    keys and values that were gathered, in fp32.
    """
    config = model.backbone.config.get_text_config()
    heads, hidden = config.num_attention_heads, config.hidden_size
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or hidden // heads
    if not model.shares_prompts or not takes_kernel(PRECISIONS[model.precision], size, KERNEL_CAPABILITY):
        return 0
    pairs = max(1, tokens // per_pair)
    one = _pair(tokens // pairs, 0, padded=False)
    keys = pairs * (one.tokens + len(one.prompt))
    queries = tokens + 128 * 3 * pairs
    gathered = 2 * FP32 * (keys + tokens) * key_heads * size
    return FP32 * heads * size * queries + 2 * BF16 * heads * size * keys + gathered


def _embedding(model: RewardModel) -> torch.Tensor:
    embedding = model.classifier.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding.weight


def _pair(tokens: int, first: int, padded: bool) -> ResponseGroup:
    """A pair of `tokens` tokens, half of them in its prompt (padded: a quarter, which counts twice)."""
    response = max(1, tokens // 4)
    prompt = [first] * (response if padded else 2 * response)
    return build_group([prompt + [1] * response, prompt + [2] * response])


def _forget_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None  # it was copied to the bucket


class LiveTensorTracker(TorchDispatchMode):
    """Tracks bytes of tensors made in the block: alive `now`, and at `most`."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for value in tree_leaves(results):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._drop, size)
        self.now += size
        self.most = max(self.most, self.now)

    def _drop(self, size: int) -> None:
        self.now -= size
