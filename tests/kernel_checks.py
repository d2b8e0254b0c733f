"""Models that run through the one-kernel path, on a GPU, or on a CPU with a plain function in the kernel's place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import FAMILIES, GROUPS, alone, build, gradients, relative

from rmtool.model.layout_choice import choose_layout
from rmtool.model.liger import apply_liger
from rmtool.packing import attention
from rmtool.packing.layers import compile_layers

HALF_FAMILIES = ("llama", "qwen3", "mistral_window")


def count_calls(kernel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Put `kernel` in the kernel's place; returns the head size of each call, in a list that grows."""
    calls: list[int] = []

    @functools.wraps(kernel)  # with its signature
    def counted(q: torch.Tensor, *args: Any, **given: Any) -> Any:
        calls.append(q.shape[-1])
        return kernel(q, *args, **given)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", counted)
    return calls


def take_kernel_on_cpu(monkeypatch: pytest.MonkeyPatch, *half: torch.dtype) -> None:
    """The CPU counts as a device with the kernel, for these dtypes, or those that the kernel takes."""
    monkeypatch.setattr(attention, "_capability", lambda device: attention.KERNEL_CAPABILITY)
    if half:
        monkeypatch.setattr(attention, "HALF", half)


def half_precision_errors(family: str, device: str, calls: list[int]) -> None:
    """Check that rewards and gradients in bf16 through the kernel are no worse than those of padded batches in bf16,
    both against fp32, and that each layer calls the kernel once.
    """
    config = FAMILIES[family].to_dict() | {"hidden_size": 128, "head_dim": 64}
    model = build(type(FAMILIES[family]).from_dict(config)).to(device)

    def run(precision: str, shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model.precision = precision
        model.share_prompts(shared)
        rewards = model(model.collate(GROUPS)).cpu()
        parts = [gradient.flatten().cpu() for gradient in gradients(model, rewards).values()]
        return rewards.detach(), torch.cat(parts)

    exact, padded = run("fp32", False), run("bf16", False)
    assert not calls
    shared = run("bf16", True)
    assert calls == [64] * 2
    for got, other, true in zip(shared, padded, exact, strict=True):
        assert relative(got, true) < 1.5 * relative(other, true) < 0.1


def rewards_and_gradients(family: str, device: str, liger: bool = False, compiled: bool = False) -> None:
    """Check both in fp32 against each response alone through the unchanged model, on the CPU."""
    model = build(FAMILIES[family])
    expected = alone(model, GROUPS)
    expected_gradients = gradients(model, expected)
    if liger:
        assert apply_liger(model.classifier).startswith("Liger kernels: on")
    model = model.to(device)
    assert choose_layout(model, model, 512).shared
    if compiled:
        assert compile_layers(model.backbone) == 2
    rewards = model(model.collate(GROUPS)).cpu()
    assert relative(rewards, expected) < 1e-3
    for name, gradient in gradients(model, rewards).items():
        assert relative(gradient.cpu(), expected_gradients[name]) < 1e-2, name


def in_a_process(function: Callable[..., None], *args: Any) -> None:
    """Run a check in a process of its own, because Liger changes transformers' modules for good; it fails as here."""
    torch.multiprocessing.spawn(functools.partial(_call, function), args)


def _call(function: Callable[..., None], _: int, *args: Any) -> None:
    function(*args)
