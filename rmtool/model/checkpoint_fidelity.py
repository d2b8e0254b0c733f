"""How far a checkpoint's rewards are from those in fp32: as rmtool computes them, and as tools that load it in bf16 do.

In: a checkpoint folder and response groups. Out: a `Fidelity` of each. Loaded in bf16 means that weights, norms,
residual stream and score head are bf16, as with `from_pretrained(..., dtype=torch.bfloat16)`.
Cost: reads the weights once; a sample of the responses three times, in bf16 one by one and for at most BF16_SECONDS.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from rmtool.checkpoint import LOADED_IN_BF16
from rmtool.model.fidelity import SMALLEST, Fidelity, compare, sample_in_fp32, sample_size
from rmtool.model.loading import load_for_inference
from rmtool.model.reward_model import RewardModel
from rmtool.model.rewards import compute_rewards
from rmtool.tokenization.response_group import ResponseGroup, build_group
from rmtool.ui import SilentUi

BF16_SECONDS = 60.0  # CPUs without bf16 instructions are slow


def checkpoint_fidelity(folder: Path, groups: Sequence[ResponseGroup], max_tokens: int) -> dict[str, Fidelity]:
    """Return the fidelity of precision auto, if that is not fp32, and of the checkpoint loaded in bf16, by name; empty
    where there are too few responses.

    Args:
        max_tokens: unique tokens of a pack.
    """
    size = sample_size(None, sum(len(group.responses) for group in groups))
    if not size:
        return {}
    model = load_for_inference(folder, fidelity=True).model
    sample = sample_in_fp32(model, groups, max_tokens, size)
    if sample is None:
        return {}
    sampled = [build_group([groups[index].sequence(number)]) for index, number in sample.places]
    model.round_weights()
    rewards = [reward for (reward,) in compute_rewards(model, sampled, max_tokens, SilentUi())]
    found = {model.precision: compare(sample.exact, rewards)} if model.precision != "fp32" else {}
    rewards = _rewards_in_bf16(model, sampled)
    if len(rewards) >= SMALLEST:
        found[LOADED_IN_BF16] = compare(sample.exact[: len(rewards)], rewards)
    return found


@torch.no_grad()
def _rewards_in_bf16(model: RewardModel, groups: Sequence[ResponseGroup]) -> list[float]:
    """Compute the rewards of single responses as transformers does; the model stays bf16."""
    for parameter in model.parameters():  # not buffers: transformers leaves rotary frequencies in fp32
        parameter.data = parameter.data.bfloat16()
    model.share_prompts(False)
    rewards, end = list[float](), time.monotonic() + BF16_SECONDS
    for group in groups:
        ids = torch.from_numpy(group.sequence(0).astype("int64"))[None].to(model.device)
        rewards.append(float(model.classifier(input_ids=ids, use_cache=False).logits[0, 0]))
        if time.monotonic() > end:
            break
    return rewards
