"""Whether the decoder layers are compiled: as the recipe says, or by the device and what there is to compute.

In: a `RewardModel`, the setting, and the tokens to compute. Out: compiled layers or not, and why, in a few words. All
ranks decide the same: by numbers that they share, and by a trial that has to succeed on each.
Cost: of a trial, the compiling of the layers, some 20 to 40 s, which the first step no longer takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from rmtool.dist import SINGLE_PROCESS, DistInfo
from rmtool.model.precision import fast_bf16_device
from rmtool.model.reward_model import RewardModel
from rmtool.packing.layers import compile_layers, uncompile_layers
from rmtool.packing.prefix_sharing import probe_groups
from rmtool.tokenization.response_group import ResponseGroup

# From so many operations of matrix products on, compiling pays several times over: it takes half a minute, and saves an
# eighth of a training step and a quarter of scoring (scripts/bench/SPEED.md).
LEAST_TRAINING, LEAST_INFERENCE = 1e15, 1e14
AUTO, SHORT = "(auto)", "off (auto: too little to compute)"
SAMPLE = 256  # groups whose tokens are counted to estimate those of all


def choose_compiled(
    model: RewardModel,
    setting: bool | Literal["auto"],
    tokens: float,
    max_length: int,
    dist: DistInfo = SINGLE_PROCESS,
    training: bool = True,
) -> str:
    """Compile the layers or leave them; describe that, also in `model.compiled`. All ranks must call it.

    auto compiles what is computed in bf16 on a CPU that is fast in it: there matrix products take less than half of the
    time.

    Args:
        tokens: unique tokens of all steps, or of all responses.
        max_length: tokens of the longest sequence that the model will be given.
    """
    if model.compiled.endswith(AUTO):
        return model.compiled  # of an earlier call
    if setting == "auto":
        model.compiled = _choose_auto(model, tokens, max_length, dist, training)
    elif setting:
        model.compiled = str(compile_layers(model.backbone) or "none (unsupported model structure)")
    else:
        model.compiled = "off"
    return model.compiled


def _choose_auto(model: RewardModel, tokens: float, max_length: int, dist: DistInfo, training: bool) -> str:
    fast = model.device.type == "cpu" and fast_bf16_device() and model.precision == "bf16"
    if not fast or model.classifier.is_gradient_checkpointing:
        return "off"
    passes, least = (6, LEAST_TRAINING) if training else (2, LEAST_INFERENCE)
    if passes * model.active_matmul_params * tokens < least:
        return SHORT
    layers = compile_layers(model.backbone)
    error = _trial(model, max_length, training) if layers else "unsupported model structure"
    if not dist.max(float(error is not None)):
        return f"{layers} {AUTO}"
    uncompile_layers(model.backbone)
    return f"off (auto: {error or 'failed on another rank'})"


def _trial(model: RewardModel, max_length: int, training: bool) -> str | None:
    """Run a small batch, with its backward in training; return the compiler's error, or None. No gradient is kept."""
    config = model.backbone.config.get_text_config()
    batch = model.collate(probe_groups(config.vocab_size, None, max_length))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with torch.set_grad_enabled(training):
            total = model(batch).sum()
        if training:
            torch.autograd.grad(total, trained, allow_unused=True)
    except torch._dynamo.exc.TorchDynamoException as error:
        return describe_failure(error)
    return None


def describe_failure(error: Exception) -> str:
    """What torch.compile failed with, on one line: torch writes the cause after the name of the backend."""
    return "torch.compile failed: " + " ".join(str(error).partition("\n\n")[0].split())


def estimate_tokens(groups: Sequence[ResponseGroup]) -> float:
    """Estimate the unique tokens of all groups from equally spaced ones; the same number on every rank."""
    if not groups:
        return 0.0
    sample = range(0, len(groups), -(-len(groups) // SAMPLE))
    return sum(groups[index].unique_tokens for index in sample) * len(groups) / len(sample)
