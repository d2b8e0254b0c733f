"""bf16 products in fp32: the numbers that rounded factors give, forward and backward, everywhere in a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rmtool.model import bf16_emulation as products

CPU = torch.device("cpu")


@pytest.fixture
def slow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "lacks_bf16", lambda: True)


class Seen(TorchDispatchMode):
    """Which products and attentions reach torch, and in which dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.dtypes = list[str](), list[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name in ("mm", "addmm", "bmm", "baddbmm") or "attention" in name:
            self.names.append(name)
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16().requires_grad_()


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


MASK = torch.ones(5, 7, dtype=torch.bool).tril(2)
CASES: list[tuple[Callable[..., torch.Tensor], list[tuple[int, ...]]]] = [
    (torch.mm, [(33, 65), (65, 17)]),
    (F.linear, [(2, 33, 65), (17, 65)]),
    (F.linear, [(33, 65), (17, 65), (17,)]),
    (torch.bmm, [(3, 33, 65), (3, 65, 17)]),
    (torch.matmul, [(2, 3, 33, 65), (65, 17)]),
    (attention, [(1, 3, 9, 16)] * 3),
    (lambda q, k, v: attention(q, k, v, MASK), [(1, 3, 5, 16), (1, 3, 7, 16), (1, 3, 7, 16)]),
]


@pytest.mark.parametrize(("function", "shapes"), CASES)
@pytest.mark.parametrize("gradients", [False, True])
def test_products_are_those_of_fp32_rounded_once(
    function: Callable[..., torch.Tensor], shapes: list[tuple[int, ...]], gradients: bool, slow_cpu: None
) -> None:
    torch.manual_seed(0)
    tensors = [half(*shape) for shape in shapes]
    twins = [tensor.detach().float().requires_grad_() for tensor in tensors]
    with torch.set_grad_enabled(gradients):
        expected = function(*twins).bfloat16()
        with Seen() as seen, products.wide_products(CPU, "bf16"):
            output = function(*tensors)
            if gradients:
                output.backward(torch.ones_like(output))
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    # What reaches torch is fp32: three products or two attentions with gradients, one without.
    assert set(seen.dtypes) == {torch.float32}
    assert len(seen.dtypes) == (1 if not gradients else 2 if "attention" in seen.names[0] else 3)
    if not gradients:
        return
    expected.backward(torch.ones_like(output))
    for tensor, twin in zip(tensors, twins, strict=True):
        # The backward of attention reads its output, which was rounded.
        assert tensor.grad is not None
        assert twin.grad is not None
        torch.testing.assert_close(
            tensor.grad.float(), twin.grad, rtol=2**-7, atol=2**-7 * float(twin.grad.abs().max())
        )


@pytest.mark.parametrize(("flag", "lacks"), [("avx2", True), ("amx_bf16", False), ("avx512_bf16", False)])
def test_what_lacks_bf16(monkeypatch: pytest.MonkeyPatch, flag: str, lacks: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", flag: True})
    assert products.lacks_bf16() == lacks


def test_only_slow_bf16_on_a_cpu_is_changed(monkeypatch: pytest.MonkeyPatch, slow_cpu: None) -> None:
    assert isinstance(products.wide_products(CPU, "bf16"), TorchDispatchMode)
    assert not isinstance(products.wide_products(CPU, "fp32"), TorchDispatchMode)
    assert not isinstance(products.wide_products(torch.device("cuda"), "bf16"), TorchDispatchMode)
    monkeypatch.setattr(products, "lacks_bf16", lambda: False)
    assert not isinstance(products.wide_products(CPU, "bf16"), TorchDispatchMode)


def test_fp32_is_left_alone(slow_cpu: None) -> None:
    a, b = torch.randn(33, 65), torch.randn(65, 17)
    expected = a @ b
    with products.wide_products(CPU, "bf16"):
        assert torch.equal(a @ b, expected)
