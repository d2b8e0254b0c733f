"""What only a GPU can show: the one-kernel path against the loop, values and gradients, causality and windows.

The functions that do the checks also run on a CPU, in `test_kernel_call.py`.
"""

from __future__ import annotations

import pytest
import torch
from helpers import GROUPS, relative
from kernel_checks import HALF_FAMILIES, count_calls, half_precision_errors, in_a_process, rewards_and_gradients

from rmtool.packing.attention import _node_by_node, _varlen
from rmtool.packing.packs import pack
from rmtool.packing.transfer import to_device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("sizes", [(64, 64), (192, 128)], ids=str)
@pytest.mark.parametrize("window", [None, 5])
def test_one_kernel_call_equals_the_loop(window: int | None, sizes: tuple[int, int]) -> None:
    batch = to_device(pack(GROUPS), torch.device("cuda"))
    tokens = batch.input_ids.shape[1]
    results = []
    for kernel in (_node_by_node, _varlen):
        torch.manual_seed(0)
        q, k, v = (
            torch.randn(1, heads, tokens, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for heads, size in ((4, sizes[0]), (2, sizes[0]), (2, sizes[1]))
        )
        output = kernel(q, k, v, None, window, batch.layout)
        (output.float() * torch.linspace(-1, 1, output.numel(), device="cuda").view_as(output)).sum().backward()
        results.append([output, q.grad, k.grad, v.grad])
    for one, other in zip(*results, strict=True):
        assert relative(one.float(), other.float()) < 1e-2


@pytest.mark.parametrize("family", HALF_FAMILIES)
def test_the_kernel_inside_a_model_is_no_worse_than_padding(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.varlen import varlen_attn

    half_precision_errors(family, "cuda", count_calls(varlen_attn, monkeypatch))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("liger", [False, True])
@pytest.mark.parametrize("family", HALF_FAMILIES)
def test_rewards_and_gradients_on_the_gpu(family: str, liger: bool, compiled: bool) -> None:
    in_a_process(rewards_and_gradients, family, "cuda", liger, compiled)
