"""Liger's kernels: what is patched in each family, what the patched model computes, and when nothing is patched.

Patching needs no GPU. In the place of the kernels, which do, stand the formulas that they document.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers import FAMILIES, GROUPS, TINY, alone, build, relative, without
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.models.llama import modeling_llama

from rmtool.model.liger import apply_liger
from rmtool.model.loading import training_encoder, training_model
from rmtool.recipe import load_recipe

PATCHES = pytest.importorskip("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN

NORM, SWIGLU, GEGLU, EXPERTS = "LigerRMSNorm", "LigerSwiGLUMLP", "LigerGEGLUMLP", "LigerExperts"
JOINED, BESIDE = "LigerPhi3SwiGLUMLP", "LigerQwen3MoeSwiGLUMLP"  # gate and up in one matrix; MLPs of mixtures
PATCHED = {
    "llama qwen2 qwen3 mistral olmo2 olmo3 exaone4 smollm3": (NORM, SWIGLU),
    "gemma gemma2 gemma3 gemma3_text": (GEGLU, NORM),
    "phi3 glm4": (NORM, JOINED),
    "qwen3_5 qwen3_5_text": (NORM, BESIDE),
    "mixtral qwen3_moe": (EXPERTS, NORM),
    "qwen3_next deepseek_v2 deepseek_v3": (EXPERTS, BESIDE, NORM),
    "gpt_oss": (NORM,),
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
COMPUTED = without(FAMILIES, "gpt_neox") | {
    "gemma2": hf.Gemma2Config(**TINY, sliding_window=8, query_pre_attn_scalar=8),
    "mixtral": hf.MixtralConfig(**TINY, **MOE),
    "qwen3_moe": hf.Qwen3MoeConfig(**TINY, **MOE),
    "phi3_partial": hf.Phi3Config(**without(TINY, "head_dim"), partial_rotary_factor=0.5),
    "llama_gelu": hf.LlamaConfig(**TINY, hidden_act="gelu"),
    "gemma3_gelu": hf.Gemma3TextConfig(**TINY, hidden_activation="gelu", query_pre_attn_scalar=8),
}


# Here, so that the fixture below knows them: Liger changes a family's module for the rest of the process.
for _name in {*" ".join(PATCHED).split(), *(config.model_type for config in COMPUTED.values())}:
    AutoModelForSequenceClassification._model_mapping[hf.CONFIG_MAPPING[_name]]


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    """Put transformers' modules back."""
    before = {name: dict(vars(module)) for name, module in sys.modules.items() if ".modeling_" in name}
    yield
    for name, values in before.items():
        vars(sys.modules[name]).update(values)


def empty(model_type: str, **changes: Any) -> Any:
    """A model of a family at its default sizes, with tensors that have no memory."""
    with torch.device("meta"):
        config = hf.CONFIG_MAPPING[model_type](num_hidden_layers=4, **changes)
        return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize(
    ("model_type", "patched"), [(name, sorted(found)) for names, found in PATCHED.items() for name in names.split()]
)
def test_what_is_patched(model_type: str, patched: list[str]) -> None:
    assert apply_liger(empty(model_type)) == f"Liger kernels: on ({', '.join(patched)})"


@pytest.mark.parametrize(("model_type", "norms"), [("llama", 9), ("gemma3_text", 25)])
def test_every_norm_and_mlp_is_patched(model_type: str, norms: int) -> None:
    model = empty(model_type)
    apply_liger(model)
    names = [module._get_name() for module in model.modules()]
    assert names.count(NORM) == norms
    assert sum("MLP" in name for name in names) == 4
    assert not any(name.startswith(("Llama", "Gemma3")) and name.endswith(("MLP", "RMSNorm")) for name in names)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
def test_a_family_without_kernels(model_type: str) -> None:
    assert apply_liger(empty(model_type)) == f"Liger kernels: off (none for {model_type})"


@pytest.mark.parametrize(
    ("model_type", "activation", "left"),
    [
        ("llama", {"hidden_act": "gelu"}, "LlamaMLP"),
        ("phi3", {"hidden_act": "gelu_pytorch_tanh"}, "Phi3MLP"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "Gemma3MLP"),
        ("gemma", {"hidden_act": "silu"}, "GemmaMLP"),
    ],
)
def test_another_activation_keeps_its_mlp(model_type: str, activation: dict[str, str], left: str) -> None:
    model = empty(model_type, **activation)
    assert apply_liger(model) == f"Liger kernels: on ({NORM})"
    assert sum(module._get_name() == left for module in model.modules()) == 4


def test_models_built_later_are_transformers_own() -> None:
    apply_liger(empty("llama"))
    assert {type(module).__name__ for module in empty("llama").modules() if "Liger" in type(module).__name__} == set()


# ------------------------------------------------------------------------------------------------- without Liger


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    notice = apply_liger(empty("llama"))
    assert notice.startswith("Liger kernels: off (import of liger_kernel")


def test_training_without_the_package_goes_on_with_a_notice(causal_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    recipe = load_recipe("debug", [("model.path", str(causal_lm)), ("model.weights", "pretrained")])
    _, notices = training_model(recipe, causal_lm, training_encoder(recipe, causal_lm)[0])
    assert [notice for notice in notices if notice.startswith("Liger kernels: off (")]


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError, TypeError, ValueError])
def test_a_patch_that_fails_leaves_the_model_as_it_was(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """After all of its work, so that everything has to be undone."""

    real = PATCHES["llama"]

    def fails(model: Any, fused_linear_cross_entropy: bool, cross_entropy: bool) -> None:
        real(model=model, fused_linear_cross_entropy=fused_linear_cross_entropy, cross_entropy=cross_entropy)
        raise error("The model must be another.\nIndeed.")

    model = build(FAMILIES["llama"])
    expected = alone(model, GROUPS)
    before = [dict(vars(module)) for module in model.modules()]
    functions = dict(vars(modeling_llama))
    monkeypatch.setitem(PATCHES, "llama", fails)
    assert apply_liger(model.classifier) == "Liger kernels: off (llama: The model must be another.)"
    assert [dict(vars(module)) for module in model.modules()] == before
    assert dict(vars(modeling_llama)) == functions
    assert torch.equal(alone(model, GROUPS), expected)


# --------------------------------------------------------------------------------------- what the kernels compute


def norm(x: Any, weight: Any, eps: float, offset: float, casting: str, in_place: bool, row_mode: Any) -> torch.Tensor:
    del casting, in_place, row_mode
    return F.rms_norm(x, x.shape[-1:], offset + weight, eps)


def silu_mul(gate: torch.Tensor, up: torch.Tensor, gate_factor: float = 1.0, down_factor: float = 1.0) -> torch.Tensor:
    return F.silu(gate * gate_factor) * up * down_factor


def experts(x: Any, gate_up: Any, down: Any, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    for token, choices in enumerate(index.tolist()):
        for expert, weight in zip(choices, weights[token], strict=True):
            out[token] += weight * (down[expert] @ silu_mul(*(gate_up[expert] @ x[token]).chunk(2)))
    return out


def rotary(
    name: str, q: Any, k: Any, cos: Any, sin: Any, position_ids: Any, unsqueeze_dim: int, rotary_dim: int | None = None
) -> tuple[Any, Any]:
    """Rotate as many leading entries of each head as there are angles, or `rotary_dim` by half as many."""
    assert name == "rope"
    if rotary_dim is not None:
        assert rotary_dim == 2 * cos.shape[-1]
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    turned = []
    for part in (q, k):
        left, right = part[..., : cos.shape[-1]].chunk(2, dim=-1)
        turned.append(torch.cat((left, right), -1) * cos + torch.cat((-right, left), -1) * sin)
        turned[-1] = torch.cat((turned[-1], part[..., cos.shape[-1] :]), -1)
    return turned[0], turned[1]


@pytest.fixture
def formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(function: Any) -> Any:
        return SimpleNamespace(apply=function)

    monkeypatch.setattr("liger_kernel.transformers.rms_norm.LigerRMSNormFunction", kernel(norm))
    monkeypatch.setattr("liger_kernel.transformers.swiglu.LigerSiLUMulFunction", kernel(silu_mul))
    monkeypatch.setattr("liger_kernel.transformers.swiglu.LigerFusedMoEFunction", kernel(experts))
    gelu = kernel(lambda gate, up: F.gelu(gate, approximate="tanh") * up)
    monkeypatch.setattr("liger_kernel.transformers.geglu.LigerGELUMulFunction", gelu)
    monkeypatch.setattr("liger_kernel.transformers.rope.dispatch", rotary)


@pytest.mark.usefixtures("formulas")
@pytest.mark.parametrize("family", COMPUTED)
def test_a_patched_model_computes_the_same_function(family: str) -> None:
    """Norms' epsilons and offsets, activations, positions of a part of each head, the weights of experts."""
    model = build(COMPUTED[family])
    with torch.no_grad():
        for module in model.modules():  # norms that do nothing would hide their weights
            if "RMSNorm" in type(module).__name__:
                nn.init.normal_(module.weight, 1.0, 0.3)
        expected = alone(model, GROUPS)
        assert "kernels: on" in apply_liger(model.classifier)
        assert relative(alone(model, GROUPS), expected) < 1e-5
