"""The one-kernel path without a GPU: when it is taken, and what the kernel is given.

In the kernel's place stands a plain function with its signature, of torch 2.11 and of later versions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from helpers import FAMILIES, GROUPS, TINY, alone, build, gradients, relative
from kernel_checks import (
    HALF_FAMILIES,
    count_calls,
    half_precision_errors,
    in_a_process,
    require_no_worse_than_padding,
    rewards_and_gradients,
    take_kernel_on_cpu,
)
from mutants import plain_kernel, plain_kernel_of_2_11
from torch.multiprocessing import ProcessRaisedException

from rmtool.packing.attention import _varlen, takes_kernel
from rmtool.packing.node_attention import GatherRows, attend_by_node
from rmtool.packing.packs import pack
from rmtool.packing.written_attention import AttentionParams

AMPERE, TURING, NO_CUDA = (8, 0), (7, 5), None
# Multi-head latent attention: values have other head sizes than queries.
LATENT = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8}
LATENT |= {"n_group": 1, "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = {
    "mistral_window": FAMILIES["mistral_window"],
    "deepseek_v2": hf.DeepseekV2Config(**(TINY | LATENT | {"num_key_value_heads": 4, "head_dim": 4})),
    "deepseek_v3": hf.DeepseekV3Config(**(TINY | LATENT | {"num_key_value_heads": 4, "head_dim": 4})),
}


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "takes"),
    [
        (torch.bfloat16, 64, AMPERE, True),
        (torch.float16, 256, (12, 0), True),
        (torch.float32, 64, AMPERE, False),
        (torch.bfloat16, 264, AMPERE, False),
        (torch.bfloat16, 64, TURING, False),
        (torch.bfloat16, 64, NO_CUDA, False),
    ],
)
def test_when_one_kernel_is_called(
    dtype: torch.dtype, width: int, capability: tuple[int, int] | None, takes: bool
) -> None:
    assert takes_kernel(dtype, width, capability) == takes


@pytest.mark.parametrize("kernel", [plain_kernel, plain_kernel_of_2_11])
@pytest.mark.parametrize(("sizes", "key_heads"), [((8, 8), 2), ((24, 16), 4), ((12, 20), 2)], ids=str)
@pytest.mark.parametrize(("window", "scaling"), [(None, None), (5, 0.4)], ids=str)
def test_the_kernel_call_computes_what_the_loop_computes(
    kernel: Callable[..., Any],
    sizes: tuple[int, int],
    key_heads: int,
    window: int | None,
    scaling: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values and gradients: fewer key heads, values of another size than queries, a scale, a window."""
    count_calls(kernel, monkeypatch)
    batch = pack(GROUPS)
    results = []
    for attend in (_varlen, attend_by_node):
        torch.manual_seed(0)
        shapes = (4, sizes[0]), (key_heads, sizes[0]), (key_heads, sizes[1])
        tokens = batch.input_ids.shape[1]
        q, k, v = (
            torch.randn(1, heads, tokens, size, dtype=torch.float64, requires_grad=True) for heads, size in shapes
        )
        output = attend(q, k, v, AttentionParams(scaling, window), batch.layout)
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
        results.append((output, q.grad, k.grad, v.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_gradients_of_a_prompt_add_up_in_fp32() -> None:
    """Of a key that 64 responses see: within the rounding of one number, not of 64 sums."""
    index = torch.arange(5).repeat(64)
    rows = torch.randn(2, 5, 1, 8).bfloat16().requires_grad_()
    gradient = torch.randn(2, 320, 1, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    GatherRows.apply(rows, index).backward(gradient)
    assert rows.grad is not None
    assert rows.grad.dtype == torch.bfloat16
    expected = gradient.double().view(2, 64, 5, 1, 8).sum(1)
    assert relative(rows.grad.double(), expected) < 3e-3


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_soft_caps_and_sinks_do_not_go_to_the_kernel(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(FAMILIES[family])
    expected = alone(model, GROUPS)
    calls = count_calls(plain_kernel, monkeypatch)
    take_kernel_on_cpu(monkeypatch, torch.float32)
    model.share_prompts(True)
    assert relative(model(pack(GROUPS)), expected) < 1e-5
    assert not calls


@pytest.mark.parametrize("family", MODELS)
def test_models_call_the_kernel_once_per_layer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(MODELS[family])
    expected = alone(model, GROUPS)
    expected_gradients = gradients(model, expected)
    calls = count_calls(plain_kernel, monkeypatch)
    take_kernel_on_cpu(monkeypatch, torch.float32)
    model.share_prompts(True)
    rewards = model(pack(GROUPS))
    assert calls == [16 if family.startswith("deepseek") else 8] * 2
    assert relative(rewards, expected) < 1e-5
    for name, gradient in gradients(model, rewards).items():
        assert relative(gradient, expected_gradients[name]) < 1e-5, name


# ------------------------------------------------------------------------- the checks of `test_attention_gpu.py`


@pytest.mark.parametrize("family", HALF_FAMILIES)
def test_bf16_through_the_kernel_is_no_worse_than_padding(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(plain_kernel, monkeypatch)
    take_kernel_on_cpu(monkeypatch)
    require_no_worse_than_padding(half_precision_errors(family, "cpu", calls))


@pytest.mark.slow
def test_a_check_in_a_process_of_its_own_fails_here() -> None:
    in_a_process(rewards_and_gradients, "llama", "cpu")
    with pytest.raises(ProcessRaisedException, match="KeyError: 'unknown'"):
        in_a_process(rewards_and_gradients, "unknown", "cpu")
