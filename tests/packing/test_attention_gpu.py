"""What only a GPU can show: the one-kernel path against the loop, values and gradients, causality and windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FAMILIES, GROUPS, alone, build, gradients, relative

from rmtool.model.classifier import apply_liger
from rmtool.model.layout_choice import choose_layout
from rmtool.packing.layers import compile_layers
from rmtool.packing.packs import _node_by_node, _varlen, pack
from rmtool.packing.transfer import to_device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("window", [None, 5])
def test_one_kernel_call_equals_the_loop(window: int | None) -> None:
    batch = to_device(pack(GROUPS), torch.device("cuda"))
    tokens = batch.input_ids.shape[1]
    results = []
    for kernel in (_node_by_node, _varlen):
        torch.manual_seed(0)
        q = torch.randn(1, 4, tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.randn(1, 2, tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "kv")
        output = kernel(q, k, v, None, window, batch.layout)
        (output.float() * torch.linspace(-1, 1, output.numel(), device="cuda").view_as(output)).sum().backward()
        results.append([output, q.grad, k.grad, v.grad])
    for one, other in zip(*results, strict=True):
        assert relative(one.float(), other.float()) < 1e-2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("liger", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral_window"])
def test_rewards_and_gradients_on_the_gpu(family: str, liger: bool, compiled: bool) -> None:
    model = build(FAMILIES[family])
    expected = alone(model, GROUPS)
    expected_gradients = gradients(model, expected)
    if liger:
        apply_liger(model.classifier)
    model = model.cuda()
    assert choose_layout(model, model, 512).shared
    if compiled:
        assert compile_layers(model.backbone) == 2
    rewards: Any = model(model.collate(GROUPS)).cpu()
    assert relative(rewards, expected) < 1e-3
    for name, gradient in gradients(model, rewards).items():
        assert relative(gradient.cpu(), expected_gradients[name]) < 1e-2, name
