"""Which models may compute a prompt once for all its responses.

In: a model as transformers built it, and a function that runs it both ways. Out: None, or the reason for using padded
batches instead; an error for a model that padding changes. Four gates, because each alone lets wrong rewards through:
what the model declares (llama4 looks right otherwise), what its attention asks for (see `attention.py`), a probe of
made-up ids in fp32 (only that catches phimoe and qwen2_moe with a window, which is in their mask but not told to
attention), and the attention kernel of half precision on the same ids (see `attention_check.py`). The probe is in
fp32 because half precision moves rewards by up to a fifth of their spread, more than many mistakes do.
Cost: forwards of about 200 tokens, one sequence at a time, packed in fp32, and packed in half precision; where there is
a sliding window, four times its length one at a time, and once in each pack.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from rmtool.errors import RmtoolError
from rmtool.packing.attention import UnsupportedAttentionError
from rmtool.tokenization.response_group import ResponseGroup, build_group

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
BATCH_DEPENDENT_ROPE = {"longrope", "dynamic"}
# Largest differences allowed between fp32 states, relative to how far they lie apart. Between shared and one-by-one
# sequences, sound models of 2 to 80 layers were within 2.2e-5 and mistakes above 5e-4 (scripts/bench/measure_probe.py).
# Where a padded batch alone moves them by more than a tenth of that, the model's own rounding is larger, and so is
# the bound.
TOLERANCE, NOISE_FACTOR = 5e-5, 10.0
# The same between padded and one-by-one sequences. Beyond it the model is refused, so it has room for what recurrent
# layers and experts make of rounding: a token whose two best experts are nearly level may go to either.
PADDED_TOLERANCE = 1e-3
# Largest error of half-precision attention allowed, in units of its rounding (`KernelCheck.worst`): sound kernels were
# within 0.92, and mistakes in nothing but the kernel above 8 (scripts/bench/measure_probe.py).
KERNEL_TOLERANCE = 3.0


def declared_reason(backbone: PreTrainedModel) -> str | None:
    """Why the model, by what it declares, cannot share prompts; None if it might."""
    if not getattr(backbone, "_supports_attention_backend", False):
        return f"{backbone.config.model_type} does not support attention backends"
    config = backbone.config.get_text_config()
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS)
    if strange:
        return f"{config.model_type} has layers of the kind {', '.join(strange)}"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        return f"{config.model_type} attends in both directions"
    # Only where text goes: the vision tower of gemma3 looks both ways, and never runs here.
    if any(getattr(module, "is_causal", True) is False for module in backbone.get_decoder().modules()):
        return f"{config.model_type} has attention that is not causal"
    return None


def describe_sharing(reason: str | None) -> str:
    """For the user: whether prompts are shared, with what `choose_layout` returned."""
    return f"off, using padded batches ({reason})" if reason else "on"


def require_positions(backbone: PreTrainedModel, max_length: int) -> None:
    """Refuse sequences longer than a model's table of learned positions.

    Raises:
        RmtoolError: E0411 `max_length` is beyond the table.
    """
    limit = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    tables = [
        m for m in backbone.modules() if isinstance(m, torch.nn.Embedding) and m != backbone.get_input_embeddings()
    ]
    learned = any(table.num_embeddings in (limit, (limit or 0) + 2) for table in tables)  # OPT keeps two rows more
    if learned and limit is not None and max_length > limit:
        raise RmtoolError(
            "E0411",
            f"this model has {limit} positions, and the longest sequence allowed is {max_length}",
            f"set the maximum length to {limit} or less (data.max_length, or --max-length)",
        )


def require_fixed_positions(backbone: PreTrainedModel, max_length: int) -> None:
    """Refuse a model whose rotary positions change for the whole batch when its longest sequence passes a limit.

    Raises:
        RmtoolError: E0410 sequences of up to `max_length` tokens can pass that limit.
    """
    config = backbone.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in parameters.values() if all(isinstance(item, dict) for item in parameters.values()) else [parameters]:
        limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if rope.get("rope_type") in BATCH_DEPENDENT_ROPE and max_length > limit:
            raise RmtoolError(
                "E0410",
                f"with {rope['rope_type']} positions this model reads a short text otherwise beside one over {limit} "
                "tokens, so its rewards would depend on the batch",
                f"set the maximum length to {limit} or less (data.max_length, or --max-length)",
            )


def probe_groups(vocab_size: int, window: int | None, max_length: int) -> list[ResponseGroup]:
    """Made-up groups with a prompt longer than the sliding window (where sequences can reach it) and odd lengths, and
    with what a pack can share: a prompt, its beginning, the beginning of a response, a whole response, nothing.

    What a model does otherwise beyond some length, and declares nowhere, is not seen.
    """
    rng = np.random.default_rng(0)
    length = 37 if window is None or window >= max_length else window + 5
    prompt, first, brief = (rng.integers(0, vocab_size, n) for n in (length, 9, 3))
    responses = (
        (prompt, (first, rng.integers(0, vocab_size, 4), [*first[:6], *rng.integers(0, vocab_size, 11)])),
        (prompt[:11], (rng.integers(0, vocab_size, 6), prompt[11:12])),
        (brief, (rng.integers(0, vocab_size, 2), brief[:1])),
        # The last one of a pack, whose order is that of ids: short, so that it shows what it sees of the text before.
        ([vocab_size - 1], (rng.integers(0, vocab_size, 2),)),
    )
    limit = max(2, max_length)  # no longer than what the model will be given
    return [build_group([[*start, *rest][:limit] for rest in rests]) for start, rests in responses]


class Probe:
    """What the score head reads of `groups` in fp32: of each sequence alone, and what a padded batch of all changes.

    States are compared, not rewards: a reward is one direction of a state, and may miss what changed by luck.

    Args:
        padded: runs one padded batch and returns the states of its last tokens, float32[N, hidden].
    """

    def __init__(self, groups: Sequence[ResponseGroup], padded: Callable[[Sequence[ResponseGroup]], torch.Tensor]):
        self.groups, self.padded = groups, padded
        singles = [build_group([sequence.tolist()]) for group in groups for sequence in group.sequences()]
        self.alone = torch.cat([padded([group]) for group in singles])

    @functools.cached_property
    def padding_error(self) -> float:
        """By how much padding alone changes the states."""
        return self.error(self.padded(self.groups))

    def error(self, states: torch.Tensor) -> float:
        """The largest difference to a state read alone, relative to how far states lie apart, or a tenth of their
        length where that is more: there they carry the rounding of their length.
        """
        spread = (self.alone - self.alone.mean(0)).norm(dim=1).mean()
        scale = max(float(spread), 0.1 * float(self.alone.norm(dim=1).mean()), 1e-30)
        return float((states - self.alone).norm(dim=1).max()) / scale


def sharing_failure(probe: Probe, shared: Callable[[], torch.Tensor]) -> str | None:
    """Why sharing changes the rewards, or None if it does not. `shared` returns a packed batch's states, in fp32."""
    try:
        together = shared()
    except UnsupportedAttentionError as reason:
        return str(reason)
    error = probe.error(together)
    if error <= TOLERANCE or error <= min(NOISE_FACTOR * probe.padding_error, PADDED_TOLERANCE):
        return None
    return f"prefix sharing changes its rewards (relative error {error:.1e})"


def kernel_failure(worst: float) -> str | None:
    """Why the attention kernel of this precision is wrong, or None if it is not, from `KernelCheck.worst`."""
    if not worst <= KERNEL_TOLERANCE:
        return f"its packed attention in half precision is off by {worst:.1f} times the rounding error"
    return None


def require_padding(probe: Probe) -> None:
    """Refuse a model that reads a text otherwise when it is padded: doge looks ahead in a batch without padding.

    Raises:
        RmtoolError: E0412 rewards of a padded batch are others than one-by-one rewards.
    """
    if not probe.alone.isfinite().all():
        return  # broken weights, not padding: whoever asks for rewards is told so
    error = probe.padding_error
    if not error <= PADDED_TOLERANCE:
        raise RmtoolError(
            "E0412",
            f"padding changes the rewards of this model (relative error {error:.1e}): they would depend on the batch",
            "use a model of another family (Llama, Qwen, Mistral, Gemma, OLMo, ...)",
        )
