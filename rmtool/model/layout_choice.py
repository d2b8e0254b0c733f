"""The choice between prefix sharing and padded batches: all checks of `packing.prefix_sharing`, run on a model.

In: a `RewardModel`. Out: a `LayoutDecision`, and the model switched to packed or padded batches.
Cost: a few short forwards in fp32, one in the model's precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from rmtool.dist import SINGLE_PROCESS, DistInfo
from rmtool.model.classifier import HEAD
from rmtool.model.reward_model import RewardModel
from rmtool.packing import attention_check, prefix_sharing
from rmtool.tokenization.response_group import ResponseGroup


@dataclass(frozen=True)
class LayoutDecision:
    """Whether a model shares prefixes; `reason` is why its batches are padded, None where they are not."""

    shared: bool
    reason: str | None = None


def choose_layout(
    model: RewardModel, forward_module: nn.Module, max_length: int, dist: DistInfo = SINGLE_PROCESS
) -> LayoutDecision:
    """Switch prefix sharing on if all checks pass on all ranks, else off; all ranks must call it.

    Args:
        forward_module: what to call for a forward: the model, or the engine that wraps it.
        max_length: tokens of the longest sequence that the model will be given.
        dist: the ranks; each measures, and all decide by the worst number.

    Raises:
        RmtoolError: on all ranks or none: E0411 the model has too few positions; E0410, E0412 its rewards would depend
            on the batch.
    """
    prefix_sharing.require_positions(model.backbone, max_length)
    prefix_sharing.require_fixed_positions(model.backbone, max_length)
    config = model.backbone.config.get_text_config()
    groups = prefix_sharing.probe_groups(config.vocab_size, getattr(config, "sliding_window", None), max_length)

    def states(shares: bool, groups: Sequence[ResponseGroup]) -> torch.Tensor:
        model.share_prompts(shares)
        return _head_inputs(model, forward_module, groups)

    training, shared = model.training, False
    forward_module.eval()
    try:
        with model.in_fp32():
            probe = prefix_sharing.Probe(groups, partial(states, False), dist)
            reason = prefix_sharing.declared_reason(model.backbone)
            reason = reason or prefix_sharing.probe_failure(probe, partial(states, True, groups))
        reason = reason or prefix_sharing.kernel_failure(dist.max(_kernel_error(model, forward_module, groups)))
        if reason is not None:
            with model.in_fp32():
                prefix_sharing.require_padding(probe)
        shared = reason is None
    finally:
        forward_module.train(training)
        model.share_prompts(shared)
    return LayoutDecision(shared, reason)


def _kernel_error(model: RewardModel, forward_module: nn.Module, groups: Sequence[ResponseGroup]) -> float:
    check = attention_check.KernelCheck()
    model.share_prompts(True)
    model.classifier.set_attn_implementation(attention_check.NAME)
    _head_inputs(model, forward_module, groups)
    return check.worst


@torch.no_grad()
def _head_inputs(model: RewardModel, forward_module: nn.Module, groups: Sequence[ResponseGroup]) -> torch.Tensor:
    """The inputs of the score head for one batch, float32[N, D], in the order of the rewards."""
    inputs = list[torch.Tensor]()
    head = getattr(model.classifier, HEAD)
    hook = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0].float()))
    try:
        forward_module(model.collate(groups))
    finally:
        hook.remove()
    return inputs[0]
