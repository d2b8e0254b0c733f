"""Whether a loaded model shares prefixes: all checks of `packing.prefix_sharing`, run on the model itself.

In: a `RewardModel`. Out: the model switched to packed or padded batches, and the reason for padded ones.
Cost: a few short forwards in fp32, one in the model's precision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import nn

from rmtool.model.classifier import HEAD
from rmtool.model.fp32 import fp32_compute
from rmtool.model.reward_model import RewardModel
from rmtool.packing import attention_check
from rmtool.packing import prefix_sharing as compat
from rmtool.packing.attention_check import KernelCheck
from rmtool.tokenization.response_group import ResponseGroup


def choose_layout(model: RewardModel, forward_module: nn.Module, max_length: int) -> str | None:
    """Let `model` share prompts if all gates of `compat` agree; else return why it runs padded.

    Args:
        forward_module: what to call for a forward: the model, or the engine wrapped around it (the same on every rank).

    Raises:
        RmtoolError: E0411 the model has too few positions; E0410, E0412 its rewards would depend on the batch in any
            layout.
    """
    compat.require_positions(model.backbone, max_length)
    compat.require_fixed_positions(model.backbone, max_length)
    config = model.backbone.config.get_text_config()
    groups = compat.probe_groups(config.vocab_size, getattr(config, "sliding_window", None), max_length)

    def states(shares: bool, groups: Sequence[ResponseGroup]) -> torch.Tensor:
        model.share_prompts(shares)
        return _read_states(model, forward_module, groups)

    training, shares = model.training, False
    forward_module.eval()
    try:
        with _in_fp32(model):
            probe = compat.Probe(groups, partial(states, False))
            reason = compat.declared_reason(model.backbone)
            reason = reason or compat.sharing_failure(probe, partial(states, True, groups))
        if reason is None:
            check = KernelCheck()
            model.share_prompts(True)
            model.classifier.set_attn_implementation(attention_check.NAME)
            _read_states(model, forward_module, groups)
            reason = compat.kernel_failure(check.worst)
        if reason is not None:
            with _in_fp32(model):
                compat.require_padding(probe)
        shares = reason is None
    finally:
        forward_module.train(training)
        model.share_prompts(shares)
    return reason


@torch.no_grad()
def _read_states(model: RewardModel, forward_module: nn.Module, groups: Sequence[ResponseGroup]) -> torch.Tensor:
    """What the score head reads of one batch, float32[N, hidden], in the order of the rewards."""
    read = list[torch.Tensor]()
    head = getattr(model.classifier, HEAD)
    hook = head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].float()))
    try:
        forward_module(model.collate(groups))
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
