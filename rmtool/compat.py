"""Which models may compute a prompt once for all its responses.

In: a model as transformers built it, and a function that runs it both ways. Out: None, or the reason for running
padded instead; an error for a model that padding changes. Three gates, because each alone lets wrong rewards through:
what the model declares (llama4 looks right otherwise), what its attention asks for (see `attention.py`), and a trial on
made-up ids (only that catches phimoe and qwen2_moe with a window, which is in their mask but not told to attention).
Cost: one short forward, of a few hundred tokens, or as many as the sliding window holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from rmtool.attention import UnsupportedAttentionError
from rmtool.errors import RmtoolError
from rmtool.tree import TokenTree, build_tree

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
BATCH_DEPENDENT_ROPE = {"longrope", "dynamic"}
# Largest difference allowed between shared and one-by-one rewards, relative to their spread or size. fp32 models that
# may share differ by about 1e-6; half precision rounds each activation to 8 or 11 bits.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
# The same between padded and one-by-one rewards. Beyond it the model is refused, so it has room for what recurrent
# layers and experts make of rounding: a token whose two best experts are nearly level may go to either.
PADDED_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.3}


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


def trial_trees(vocab_size: int, window: int | None, max_length: int) -> list[TokenTree]:
    """Made-up trees with a prompt longer than the sliding window (where sequences can reach it) and odd lengths, and
    with what a pack can share: a prompt, its beginning, the beginning of a response, a whole response, nothing.
    """
    rng = np.random.default_rng(0)
    length = 37 if window is None or window >= max_length else window + 5
    prompt, first, brief = (rng.integers(0, vocab_size, n) for n in (length, 9, 3))
    responses = (
        (prompt, (first, rng.integers(0, vocab_size, 4), [*first[:6], *rng.integers(0, vocab_size, 11)])),
        (prompt[:11], (rng.integers(0, vocab_size, 6), prompt[11:12])),
        (brief, (rng.integers(0, vocab_size, 2), brief[:1])),
    )
    limit = max(2, max_length)  # no longer than what the model will be given
    return [build_tree([[*start, *rest][:limit] for rest in rests]) for start, rests in responses]


def trial_reason(
    trees: Sequence[TokenTree],
    shared: Callable[[Sequence[TokenTree]], torch.Tensor],
    single: Callable[[Sequence[TokenTree]], torch.Tensor],
    dtype: torch.dtype,
) -> str | None:
    """Run `shared` on all trees at once and `single` on each sequence alone; both return rewards, float32[N].

    Returns why the difference rules sharing out, or None if the rewards agree.
    """
    alone = _one_by_one(trees, single)
    try:
        together = shared(trees)
    except UnsupportedAttentionError as reason:
        return str(reason)
    error = _difference(together, alone)
    if not error <= TOLERANCE[dtype]:
        return f"shared and one-by-one rewards differ by {error:.1e} of their size"
    return None


def require_padding(
    trees: Sequence[TokenTree], padded: Callable[[Sequence[TokenTree]], torch.Tensor], dtype: torch.dtype
) -> None:
    """Refuse a model that reads a text otherwise when it is padded: doge looks ahead in a batch without padding.

    Raises:
        RmtoolError: E0412 rewards of a padded batch are others than one-by-one rewards.
    """
    alone = _one_by_one(trees, padded)
    if not alone.isfinite().all():
        return  # broken weights, not padding: whoever asks for rewards is told so
    error = _difference(padded(trees), alone)
    if not error <= PADDED_TOLERANCE[dtype]:
        raise RmtoolError(
            "E0412",
            f"padding changes this model's rewards by {error:.1e} of their size, so they would depend on the batch",
            "use a model of another family (Llama, Qwen, Mistral, Gemma, OLMo, ...)",
        )


def _one_by_one(trees: Sequence[TokenTree], rewards: Callable[[Sequence[TokenTree]], torch.Tensor]) -> torch.Tensor:
    return torch.cat([rewards([build_tree([sequence.tolist()])]) for tree in trees for sequence in tree.sequences()])


def _difference(together: torch.Tensor, alone: torch.Tensor) -> float:
    # Rewards that lie close together far from zero carry the rounding of their size, not of their spread.
    scale = max(float(alone.std()), 0.1 * float(alone.abs().max()), 1e-6)
    return float((together - alone).abs().max()) / scale
