"""What only a GPU can show: the one-kernel path against the loop, values and gradients, causality and windows.

The functions that do the checks also run on a CPU, in `test_kernel_call.py`.
"""

from __future__ import annotations

import pytest
import torch
from kernel_checks import (
    HALF_FAMILIES,
    count_calls,
    half_precision_errors,
    in_a_process,
    one_call_error,
    require_no_worse_than_padding,
    rewards_and_gradients,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("sizes", [(64, 64), (192, 128)], ids=str)
@pytest.mark.parametrize("window", [None, 5])
def test_one_kernel_call_equals_the_loop(window: int | None, sizes: tuple[int, int]) -> None:
    assert one_call_error(sizes, window, "cuda") < 1e-2


@pytest.mark.parametrize("family", HALF_FAMILIES)
def test_the_kernel_inside_a_model_is_no_worse_than_padding(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.varlen import varlen_attn

    require_no_worse_than_padding(half_precision_errors(family, "cuda", count_calls(varlen_attn, monkeypatch)))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("liger", [False, True])
@pytest.mark.parametrize("family", HALF_FAMILIES)
def test_rewards_and_gradients_on_the_gpu(family: str, liger: bool, compiled: bool) -> None:
    in_a_process(rewards_and_gradients, family, "cuda", liger, compiled)
