"""Whether the decoder layers are compiled: as the recipe says, or by the device and what the run has to compute.

In: a `RewardModel`, the setting, and the tokens of the run. Out: compiled layers or not, and why, in a few words. All
ranks decide the same: by numbers that they share, and by a trial that has to succeed on each.
Cost: of a trial, the compiling of the layers, some 20 to 40 s, which the first step no longer takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from rmtool.dist import DistInfo
from rmtool.model.precision import fast_bf16_device
from rmtool.model.reward_model import RewardModel
from rmtool.packing.layers import compile_layers, uncompile_layers
from rmtool.packing.prefix_sharing import probe_groups
from rmtool.tokenization.response_group import ResponseGroup

# Of matrix products, forward and backward. Compiling saves about an eighth of a step, so it pays after some 5 minutes;
# this many operations are about 30 on two cores with AMX (scripts/bench/SPEED.md).
LEAST_OPERATIONS = 1e15
SAMPLE = 256  # groups whose tokens are counted to estimate those of all


def choose_compiled(
    model: RewardModel, setting: bool | Literal["auto"], tokens: float, max_length: int, dist: DistInfo
) -> str:
    """Compile the layers or leave them, and describe that. All ranks must call it.

    auto compiles training in bf16 on a CPU that is fast in it: there matrix products take less than half of a step.

    Args:
        tokens: unique tokens of all steps.
        max_length: tokens of the longest sequence that the model will be given.
    """
    if setting is True:
        return str(compile_layers(model.backbone) or "none (unsupported model structure)")
    on_cpu = model.device.type == "cpu" and fast_bf16_device() and model.precision == "bf16"
    if setting is False or not on_cpu or model.classifier.is_gradient_checkpointing:
        return "off"
    operations = 6 * model.active_matmul_params * tokens
    if operations < LEAST_OPERATIONS:
        return f"off (auto: {operations:.1e} operations; from {LEAST_OPERATIONS:.0e} on, compiling saves time)"
    layers = compile_layers(model.backbone)
    error = _trial(model, max_length) if layers else "unsupported model structure"
    if not dist.max(float(error is not None)):
        return f"{layers} (auto)"
    uncompile_layers(model.backbone)
    return f"off (auto: {error or 'failed on another rank'})"


def _trial(model: RewardModel, max_length: int) -> str | None:
    """Run a small batch forward and backward; return the error of the compiler, or None. Gradients are not kept."""
    config = model.backbone.config.get_text_config()
    batch = model.collate(probe_groups(config.vocab_size, None, max_length))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        torch.autograd.grad(model(batch).sum(), trained, allow_unused=True)
    except torch._dynamo.exc.TorchDynamoException as error:
        return describe_failure(error)
    return None


def describe_failure(error: Exception) -> str:
    """What torch.compile failed with, on one line: torch writes the cause after the name of the backend."""
    return "torch.compile failed: " + " ".join(str(error).partition("\n\n")[0].split())


def estimate_tokens(groups: Sequence[ResponseGroup]) -> float:
    """Estimate the unique tokens of all groups from equally spaced ones; the same number on every rank."""
    sample = range(0, len(groups), -(-len(groups) // SAMPLE))
    return sum(groups[index].unique_tokens for index in sample) * len(groups) / len(sample)
