"""Which runs compile their layers: by the setting, the device and the planned operations; and what a failure leaves."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import FAMILIES, GROUPS, build

from rmtool.dist import SINGLE_PROCESS, DistInfo
from rmtool.model import compiling
from rmtool.model.compiling import LEAST_TRAINING, choose_compiled, estimate_tokens
from rmtool.model.fidelity import rewards_with_fidelity
from rmtool.model.reward_model import RewardModel
from rmtool.packing.layers import compile_layers, decoder_layers, uncompile_layers
from rmtool.ui import SilentUi


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> RewardModel:
    """A model in bf16 that shares prompts, on a CPU that is fast in bf16."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "fast_bf16_device", lambda: "this CPU")
    monkeypatch.setattr(compiling, "compile_layers", functools.partial(compile_layers, backend="aot_eager"))
    model = build(FAMILIES["llama"])
    model.share_prompts(True)
    model.precision = "bf16"
    return model


def enough(model: RewardModel) -> float:
    """The tokens from which `auto` compiles."""
    return LEAST_TRAINING / 6 / model.active_matmul_params


def choose(model: RewardModel, setting: Any = "auto", factor: float = 1.01, dist: DistInfo = SINGLE_PROCESS) -> str:
    return choose_compiled(model, setting, factor * enough(model), 512, dist)


def compiled(model: RewardModel) -> set[bool]:
    return {layer._compiled_call_impl is not None for layer in decoder_layers(model.backbone)}


def test_auto_compiles_long_runs(model: RewardModel) -> None:
    assert choose(model, factor=0.99) == compiling.SHORT
    assert compiled(model) == {False}
    assert choose(model) == "2 (auto)"
    assert compiled(model) == {True}
    assert all(parameter.grad is None for parameter in model.parameters())  # the trial leaves none
    model(model.collate(GROUPS)).sum().backward()


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_long_files_are_scored_with_compiled_layers(
    factor: float, model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rewards stay those of bf16: 2 in 1,000 of the largest, here in fused operations that round less."""
    tokens = sum(group.unique_tokens for group in GROUPS)
    monkeypatch.setattr(compiling, "LEAST_INFERENCE", 2 * model.active_matmul_params * tokens / factor)
    expected = rewards_with_fidelity(model, GROUPS, 64, SilentUi(), 0)[0]
    long = factor > 1
    assert model.compiled == ("2 (auto)" if long else compiling.SHORT)
    assert compiled(model) == {long}
    uncompile_layers(model.backbone)
    monkeypatch.setattr(compiling, "LEAST_INFERENCE", 1e99)
    plain = rewards_with_fidelity(model, GROUPS, 64, SilentUi(), 0)[0]
    for one, other in zip(expected, plain, strict=True):
        assert one == pytest.approx(other, abs=2e-3)


def test_a_setting_is_followed(model: RewardModel) -> None:
    assert choose(model, False) == "off"
    assert choose(model, True, 0.0) == "2"
    assert compiled(model) == {True}


@pytest.mark.parametrize("what", ["fp32", "slow bf16", "checkpointing"])
def test_auto_leaves_other_runs(model: RewardModel, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "fp32":
        model.precision = "fp32"
    elif what == "checkpointing":
        model.classifier.gradient_checkpointing_enable()
    else:
        monkeypatch.setattr(compiling, "fast_bf16_device", lambda: None)
    assert choose(model) == "off"
    assert compiled(model) == {False}


def test_without_a_compiler_auto_runs_as_before(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(compiling, "compile_layers", functools.partial(compile_layers, backend=broken))
    expected = model(model.collate(GROUPS))
    said = choose(model)
    assert said.startswith("off (auto: torch.compile failed: ")
    assert "no compiler found" in said
    assert compiled(model) == {False}
    assert torch.equal(model(model.collate(GROUPS)), expected)


def test_a_failure_on_another_rank_counts(model: RewardModel) -> None:
    assert choose(model, dist=DistInfo(0, 2, max=lambda value: 1.0)) == "off (auto: failed on another rank)"
    assert compiled(model) == {False}


def test_an_unknown_structure_is_said(model: RewardModel) -> None:
    del model.backbone.layers[1]
    tokens = 2 * enough(model)
    assert choose_compiled(model, "auto", tokens, 512, SINGLE_PROCESS) == "off (auto: unsupported model structure)"
    assert choose_compiled(model, True, tokens, 512, SINGLE_PROCESS).startswith("none")


def test_tokens_are_estimated_from_equally_spaced_groups() -> None:
    groups: Any = [SimpleNamespace(unique_tokens=10 + index % 2) for index in range(1001)]
    assert estimate_tokens(groups[:256]) == sum(group.unique_tokens for group in groups[:256])
    assert estimate_tokens(groups) == pytest.approx(10.5 * 1001, rel=0.06)
