"""Compatibility checks for prefix sharing.

In: a model as transformers built it, and a function that runs it both ways. Out: None, or the reason for padded
batches; an error for a model that padding changes. Four checks, because each alone lets wrong rewards through: what the
model declares (llama4 looks right otherwise), what its attention asks for (`attention.py`), a probe with random ids in
fp32 (only that catches phimoe and qwen2_moe with a window, which is in their mask but not passed to attention), and the
attention kernel of half precision on the same ids (`attention_check.py`). The probe is in fp32 because half precision
moves rewards by up to a fifth of their spread, more than many mistakes do.
Cost: forwards of about 200 tokens, one sequence at a time, packed in fp32, and packed in half precision; where there is
a sliding window, four times its length one at a time, and once in each pack.
Shapes: N sequences, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rmtool.dist import SINGLE_PROCESS, DistInfo
from rmtool.errors import RmtoolError
from rmtool.packing.attention import UnsupportedAttentionError
from rmtool.tokenization.response_group import ResponseGroup, build_group

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
BATCH_DEPENDENT_ROPE = {"longrope", "dynamic"}
# Largest differences allowed between fp32 states, relative to their spread. Between shared and one-by-one sequences,
# sound models of 2 to 80 layers were within 2.2e-5 and mistakes above 5e-4 (scripts/bench/measure_probe.py). Where a
# padded batch alone moves them by more than a tenth of that, the model's own rounding is larger, and so is the bound.
TOLERANCE, NOISE_FACTOR = 5e-5, 10.0
# The same between padded and one-by-one sequences. Beyond it the model is an error, so it has room for what recurrent
# layers and experts make of rounding: a token whose two best experts are nearly level may go to either.
PADDED_TOLERANCE = 1e-3
# Largest error of half-precision attention allowed, in units of its rounding (`KernelCheck.worst`): sound kernels were
# within 0.92, and mistakes in nothing but the kernel above 8 (scripts/bench/measure_probe.py).
KERNEL_TOLERANCE = 3.0


def declared_reason(backbone: PreTrainedModel) -> str | None:
    """Return why the model's class and config rule out prefix sharing; None if they do not."""
    if not getattr(backbone, "_supports_attention_backend", False):
        return f"{backbone.config.model_type} does not support attention backends"
    config = backbone.config.get_text_config()
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS)
    if unknown:
        return f"{config.model_type} has unsupported layer types: {', '.join(unknown)}"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        return f"{config.model_type} has bidirectional attention"
    # Of the text model only: the vision tower of gemma3 is bidirectional, and never runs here.
    if any(getattr(module, "is_causal", True) is False for module in backbone.get_decoder().modules()):
        return f"{config.model_type} has attention layers that are not causal"
    return None


def describe_sharing(reason: str | None) -> str:
    """Describe prefix sharing for tables and notes; `reason` is why batches are padded, None where they are not."""
    return f"off, using padded batches ({reason})" if reason else "on"


def require_positions(backbone: PreTrainedModel, max_length: int) -> None:
    """Check that learned position embeddings suffice for `max_length` tokens.

    Raises:
        RmtoolError: E0411 they do not.
    """
    limit = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    tables = [
        m for m in backbone.modules() if isinstance(m, torch.nn.Embedding) and m != backbone.get_input_embeddings()
    ]
    learned = any(table.num_embeddings in (limit, (limit or 0) + 2) for table in tables)  # OPT has two rows more
    if learned and limit is not None and max_length > limit:
        raise RmtoolError(
            "E0411",
            f"max length {max_length} exceeds the {limit} position embeddings of this model",
            f"set data.max_length={limit} or less",
        )


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """List the config's RoPE parameters, one for each kind of layer that has its own."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return list(parameters.values()) if all(isinstance(item, dict) for item in parameters.values()) else [parameters]


def require_fixed_positions(backbone: PreTrainedModel, max_length: int) -> None:
    """Check that no sequence of up to `max_length` tokens changes the rotary positions of its whole batch.

    Raises:
        RmtoolError: E0410 one can, because it exceeds the limit of a RoPE scaling that depends on the longest sequence.
    """
    config = backbone.config.get_text_config()
    for rope in rope_parameters(config):
        limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if rope.get("rope_type") in BATCH_DEPENDENT_ROPE and max_length > limit:
            raise RmtoolError(
                "E0410",
                f"with {rope['rope_type']} RoPE scaling, a sequence over {limit} tokens changes the rewards of others "
                "in its batch",
                f"set data.max_length={limit} or less",
            )


def probe_groups(vocab_size: int, window: int | None, max_length: int) -> list[ResponseGroup]:
    """Build groups of random ids with a prompt longer than the sliding window (where sequences can reach it), odd
    lengths, and all that a pack can share: a prompt, its beginning, the beginning of a response, a response, nothing.

    What a model does differently beyond some length, and declares nowhere, is not detected.
    """
    rng = np.random.default_rng(0)
    length = 37 if window is None or window >= max_length else window + 5
    prompt, first, brief = (rng.integers(0, vocab_size, n) for n in (length, 9, 3))
    responses = (
        (prompt, (first, rng.integers(0, vocab_size, 4), [*first[:6], *rng.integers(0, vocab_size, 11)])),
        (prompt[:11], (rng.integers(0, vocab_size, 6), prompt[11:12])),
        (brief, (rng.integers(0, vocab_size, 2), brief[:1])),
        # The last one of a pack, whose order is that of ids: short, so that it shows what leaks from the one before.
        ([vocab_size - 1], (rng.integers(0, vocab_size, 2),)),
    )
    limit = max(2, max_length)  # no longer than what the model will be given
    return [build_group([[*start, *rest][:limit] for rest in rests]) for start, rests in responses]


class Probe:
    """Inputs of the score head for `groups` in fp32: of each sequence alone, and how far a padded batch is off.

    States are compared, not rewards: a reward is one direction of a state, and may miss by luck what changed.

    Args:
        padded: runs one padded batch and returns the states of its last tokens, float32[N, D].
        dist: the ranks, whose worst error counts: near a tolerance they would choose differently, and hang.
    """

    def __init__(
        self,
        groups: Sequence[ResponseGroup],
        padded: Callable[[Sequence[ResponseGroup]], torch.Tensor],
        dist: DistInfo = SINGLE_PROCESS,
    ):
        self.groups, self.padded, self.dist = groups, padded, dist
        singles = [build_group([sequence.tolist()]) for group in groups for sequence in group.sequences()]
        self.alone_ND = torch.cat([padded([group]) for group in singles])
        self.finite = not dist.max(float(not self.alone_ND.isfinite().all()))

    @functools.cached_property
    def padding_error(self) -> float:
        """The error of one padded batch of all groups."""
        return self.error(self.padded(self.groups))

    def error(self, states_ND: torch.Tensor) -> float:
        """The largest distance to the state of a sequence alone, relative to the spread of those states, or to a tenth
        of their length where that is more: there they have the rounding error of their length.
        """
        spread = (self.alone_ND - self.alone_ND.mean(0)).norm(dim=1).mean()
        scale = max(float(spread), 0.1 * float(self.alone_ND.norm(dim=1).mean()), 1e-30)
        return self.dist.max(float((states_ND - self.alone_ND).norm(dim=1).max()) / scale)


def probe_failure(probe: Probe, shared: Callable[[], torch.Tensor]) -> str | None:
    """Return why the probe rules out prefix sharing, or None. `shared` returns a packed batch's states, in fp32."""
    try:
        states_ND = shared()
    except UnsupportedAttentionError as reason:
        return str(reason)
    error = probe.error(states_ND)
    if error <= TOLERANCE or error <= min(NOISE_FACTOR * probe.padding_error, PADDED_TOLERANCE):
        return None
    return f"prefix sharing changes its rewards (relative error {error:.1e})"


def kernel_failure(worst: float) -> str | None:
    """Return why the attention kernel of this precision rules out prefix sharing, or None, from `KernelCheck.worst`."""
    if not worst <= KERNEL_TOLERANCE:
        return f"half-precision packed attention is off by {worst:.1f} times the rounding error"
    return None


def require_padding(probe: Probe) -> None:
    """Check that padding does not change the model's rewards: doge looks ahead in a batch without padding.

    Raises:
        RmtoolError: E0412 it does.
    """
    if not probe.finite:
        return  # broken weights, not padding: E0409 and E0802 report them
    error = probe.padding_error
    if not error <= PADDED_TOLERANCE:
        raise RmtoolError(
            "E0412",
            f"padding changes the rewards of this model (relative error {error:.1e})",
            "use a model of a different family (Llama, Qwen, Mistral, Gemma, OLMo, ...)",
        )
