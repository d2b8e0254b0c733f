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
from rmtool.packing.packs import pack
from rmtool.packing.transfer import to_device
from rmtool.packing.written_attention import AttentionParams

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


def one_call_error(sizes: tuple[int, int], window: int | None, device: str) -> float:
    """Return the largest relative difference of one kernel call and the loop, in bf16: output and gradients.

    Args:
        sizes: the head sizes of queries and values.
    """
    batch = to_device(pack(GROUPS), torch.device(device))
    tokens = batch.input_ids.shape[1]
    results = []
    for kernel in (attention.attend_by_node, attention._varlen):
        torch.manual_seed(0)
        q, k, v = (
            torch.randn(1, heads, tokens, size, device=device, dtype=torch.bfloat16, requires_grad=True)
            for heads, size in ((4, sizes[0]), (2, sizes[0]), (2, sizes[1]))
        )
        output = kernel(q, k, v, AttentionParams(None, window), batch.layout)
        (output.float() * torch.linspace(-1, 1, output.numel(), device=device).view_as(output)).sum().backward()
        results.append([output, q.grad, k.grad, v.grad])
    return max(relative(one.float(), other.float()) for one, other in zip(*results, strict=True))


def half_precision_errors(family: str, device: str, calls: list[int], layers: int = 2) -> dict[str, dict[str, float]]:
    """Return the relative errors of rewards and gradients against fp32 in padded batches: in bf16 with prefix sharing,
    where each layer must call the kernel once, in bf16 in padded batches, and in fp32 with prefix sharing.
    """
    config = FAMILIES[family].to_dict() | {"hidden_size": 128, "head_dim": 64, "num_hidden_layers": layers}
    config.pop("layer_types", None)  # of another number of layers
    model = build(type(FAMILIES[family]).from_dict(config)).to(device)

    def run(precision: str, shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model.precision = precision
        model.share_prompts(shared)
        rewards = model(model.collate(GROUPS)).cpu()
        parts = [gradient.flatten().cpu() for gradient in gradients(model, rewards).values()]
        return rewards.detach(), torch.cat(parts)

    exact, others = run("fp32", False), {"padded": run("bf16", False), "shared_fp32": run("fp32", True)}
    assert not calls
    others["shared"] = run("bf16", True)
    assert calls == [64] * layers
    return {
        what: {name: relative(found[at], exact[at]) for name, found in others.items()}
        for at, what in enumerate(("rewards", "gradients"))
    }


def require_no_worse_than_padding(errors: dict[str, dict[str, float]]) -> None:
    """Check what `half_precision_errors` returned."""
    for found in errors.values():
        assert found["shared"] < 1.5 * found["padded"] < 0.1
        assert found["shared_fp32"] < 1e-3


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
