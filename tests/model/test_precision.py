"""Compute precision: what this CPU supports, and half-precision models that compute in fp32."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers import GROUPS, build, tiny_config
from torch import nn
from transformers import AutoModelForSequenceClassification

from rmtool.model.classifier import build_classifier, matrices
from rmtool.model.layout_choice import _head_inputs, choose_layout
from rmtool.model.loading import _load_model, load_for_inference
from rmtool.model.precision import (
    compute_precision,
    computing_in,
    fast_bf16_device,
    fp32_compute,
    lacks_bf16,
    lacks_fp16,
    precision_notices,
)
from rmtool.model.reward_model import RewardModel
from rmtool.packing import prefix_sharing

Patch = pytest.MonkeyPatch


@pytest.fixture(params=[True, False], ids=["without", "with"])
def lacks(request: pytest.FixtureRequest, monkeypatch: Patch) -> bool:
    """A CPU without half-precision instructions, and one with them."""
    for name in ("lacks_bf16", "lacks_fp16"):
        monkeypatch.setattr(f"rmtool.model.precision.{name}", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return bool(request.param)


@pytest.mark.parametrize(("flag", "missing"), [("avx2", True), ("amx_bf16", False), ("avx512_bf16", False)])
def test_bf16_needs_its_instructions(monkeypatch: Patch, flag: str, missing: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", flag: True})
    assert lacks_bf16() == missing
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64", flag: True})
    assert not lacks_bf16()


@pytest.mark.parametrize(
    ("flag", "missing"), [("avx512_bf16", True), ("amx_bf16", True), ("amx_fp16", False), ("avx512_fp16", False)]
)
def test_fp16_needs_its_instructions(monkeypatch: Patch, flag: str, missing: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", flag: True})
    assert lacks_fp16() == missing


@pytest.mark.parametrize(("precision", "products"), [("fp32", "highest"), ("tf32", "high"), ("fp16", "medium")])
def test_products_of_fp32_are_set_for_a_forward_and_restored(precision: str, products: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with contextlib.suppress(KeyError), computing_in(precision, torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == products
            assert torch.backends.cudnn.allow_tf32 == (precision != "fp32")
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("gpus", "flags", "device"),
    [
        (0, {"amx_bf16": True, "avx512_bf16": True}, "this CPU"),
        (0, {"avx512_bf16": True}, None),
        (0, {}, None),
        (1, {"amx_bf16": True}, "GPUs since NVIDIA's Ampere"),
    ],
)
def test_what_multiplies_bf16_fast(gpus: int, flags: dict[str, bool], device: str | None, monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", **flags})
    assert fast_bf16_device() == device


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_without_instructions_is_fp32_with_a_notice(lacks: bool, precision: str) -> None:
    assert compute_precision(precision) == ("fp32" if lacks else precision)
    notice = f"{precision} is not supported by this CPU; computing in fp32"
    assert precision_notices(precision) == [notice] * lacks
    assert (compute_precision("fp32"), precision_notices("fp32")) == ("fp32", [])


def test_a_gpu_computes_in_bf16_whatever_the_cpu(lacks: bool, monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (compute_precision("bf16"), precision_notices("bf16")) == ("bf16", [])


@pytest.mark.parametrize(
    ("device", "precision", "shared", "slow"),
    [("cuda", "fp32", True, True), ("cuda", "bf16", True, False), ("cuda", "fp32", False, False),
     ("cpu", "fp32", True, False)],
)  # fmt: skip
def test_fp32_on_a_gpu_has_a_notice_where_prompts_are_shared(
    device: str, precision: str, shared: bool, slow: bool, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("rmtool.model.precision.default_device", lambda: torch.device(device))
    notices = precision_notices(precision, shared)
    assert len(notices) == slow
    assert all("many times slower than bf16" in notice for notice in notices)


def test_a_checkpoint_that_computes_in_fp32_on_a_gpu_says_so(checkpoint: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr("rmtool.model.precision.default_device", lambda: torch.device("cuda"))
    notices = {precision: " ".join(load_for_inference(checkpoint, precision=precision).notices) for precision in
               ("fp32", "bf16")}  # fmt: skip
    assert "many times slower" in notices["fp32"]
    assert "many times slower" not in notices["bf16"]


def test_inference_without_bf16_gives_the_rewards_of_fp32(lacks: bool, checkpoint: Path) -> None:
    loaded = load_for_inference(checkpoint, precision="bf16")
    assert ("computing in fp32" in " ".join(loaded.notices)) == lacks
    expected = load_for_inference(checkpoint, precision="fp32").model
    with torch.no_grad():
        rewards, exact = (model(model.collate(GROUPS)) for model in (loaded.model, expected))
    assert torch.equal(rewards, exact) == lacks


# -------------------------------------------------------------------- rewards of bf16 weights, as on a GPU, in training

DEEPER = tiny_config(97) | {"num_hidden_layers": 16, "initializer_range": 0.1}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SCORED = {
    "deep_gemma3": hf.Gemma3TextConfig(**DEEPER, num_labels=1, sliding_window=8, query_pre_attn_scalar=8),
    "qwen3_moe": hf.Qwen3MoeConfig(**tiny_config(97), **MIXTURE, num_labels=1),
    "llama": hf.LlamaConfig(**tiny_config(97), attention_bias=True, num_labels=1),
    "gpt2": hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=512, num_labels=1, pad_token_id=0),
}


@pytest.mark.parametrize("family", SCORED)
def test_bf16_weights_give_the_rewards_of_training(family: str, tmp_path: Path) -> None:
    """Where only matrices are bf16 the residual stream is fp32, as with fp32 weights under autocast. With everything
    in bf16, deep models have other rewards.
    """
    build(SCORED[family]).classifier.save_pretrained(tmp_path)

    def rewards(classifier: Any) -> torch.Tensor:
        model = RewardModel(classifier, 0, "bf16").eval()
        with torch.no_grad():
            return model(model.collate(GROUPS))

    trained = rewards(build_classifier(tmp_path, dtype=torch.float32)[0])
    model, _, _ = _load_model(tmp_path, "bf16", 0, torch.bfloat16)
    names = {torch.float32: set[str](), torch.bfloat16: set[str]()}
    for name, parameter in model.classifier.named_parameters():
        names[parameter.dtype].add(name)
    assert not any("norm" in name or "emb" in name for name in names[torch.bfloat16])
    assert names[torch.bfloat16] == set(matrices(model.classifier))
    assert "score.weight" in names[torch.float32]
    off = (rewards(model.classifier) - trained).abs().max() / trained.std()
    assert off <= (0.02 if "moe" in family else 1e-3)
    if family == "deep_gemma3":
        model.backbone.bfloat16()
        assert (rewards(model.classifier) - trained).abs().max() / trained.std() > 0.04


def test_matrices_are_cast_as_they_are_read(checkpoint: Path, monkeypatch: Patch) -> None:
    """Not after the whole model was there in fp32."""
    real = AutoModelForSequenceClassification.from_pretrained
    arrived = dict[torch.dtype, int]()

    def counted(*args: Any, **given: Any) -> Any:
        classifier = real(*args, **given)
        for parameter in classifier.parameters():
            arrived[parameter.dtype] = arrived.get(parameter.dtype, 0) + 1
        return classifier

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", counted)
    classifier, _ = build_classifier(checkpoint, dtype=torch.bfloat16)
    assert arrived[torch.bfloat16] == len(list(matrices(classifier))) > 0
    assert set(arrived) == {torch.bfloat16, torch.float32}
    assert "_get_dtype_plan" not in vars(type(classifier))


@pytest.mark.parametrize(
    ("device", "expected"), [(None, None), ("cpu", None), ("cuda:1", {"": torch.device("cuda:1")})], ids=str
)
def test_weights_are_read_to_the_gpu_at_once(
    device: str | None, expected: object, checkpoint: Path, monkeypatch: Patch
) -> None:
    """Else each process of a node would first hold them all on the host."""
    real = AutoModelForSequenceClassification.from_pretrained
    given = dict[str, Any]()

    def noted(*args: Any, device_map: Any = None, **others: Any) -> Any:
        given["device_map"] = device_map
        return real(*args, **others)

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", noted)
    build_classifier(checkpoint, dtype=torch.bfloat16, device=torch.device(device) if device else None)
    assert given == {"device_map": expected}


# ------------------------------------------------------------------------------------- half-precision weights in fp32

DEEP = hf.LlamaConfig(**(tiny_config(97) | {"num_hidden_layers": 40, "initializer_range": 0.1}), num_labels=1)


def in_dtype(config: Any, dtype: torch.dtype) -> RewardModel:
    model = build(config)
    model.backbone.to(dtype)
    return model


def states(model: RewardModel) -> torch.Tensor:
    model.share_prompts(False)
    return _head_inputs(model, model, GROUPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        hf.LlamaConfig(**tiny_config(97), num_labels=1),
        hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=512, num_labels=1),
        hf.Gemma3TextConfig(**tiny_config(97), num_labels=1, sliding_window=8),
        hf.Gemma3Config(
            text_config=tiny_config(97) | {"sliding_window": 8},
            vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
            num_labels=1,
        ),
        hf.Qwen3MoeConfig(
            **tiny_config(97), num_labels=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_weights_of_16_bits_compute_in_fp32(config: Any, dtype: torch.dtype) -> None:
    """As the same numbers in fp32 do; afterwards every weight is unchanged."""
    half, whole = in_dtype(config, dtype), in_dtype(config, dtype)
    whole.classifier.float()
    before = {name: (weight.dtype, weight.data_ptr()) for name, weight in half.named_parameters()}
    with fp32_compute(half.backbone):
        inside = states(half)
    assert {name: (weight.dtype, weight.data_ptr()) for name, weight in half.named_parameters()} == before
    # Rotary embeddings and scaled embeddings may be computed in the weights' dtype before the first layer.
    torch.testing.assert_close(inside, states(whole), atol=2e-2 if "gemma" in config.model_type else 1e-5, rtol=1e-5)
    assert not torch.equal(states(half), inside)


def test_one_layer_at_a_time_is_wide() -> None:
    model = in_dtype(DEEP, torch.bfloat16)
    wide: list[int] = []

    def count(*_: Any) -> None:
        wide.append(sum(weight.dtype == torch.float32 for weight in model.backbone.parameters()))

    for layer in model.backbone.layers:
        layer.self_attn.register_forward_pre_hook(count)
    with fp32_compute(model.backbone):
        states(model)
    assert wide == [len(list(model.backbone.layers[0].parameters()))] * len(model.backbone.layers)


def test_weights_are_restored_when_a_forward_fails() -> None:
    model = in_dtype(DEEP, torch.bfloat16)
    model.backbone.layers[3].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), fp32_compute(model.backbone):
        states(model)
    assert {weight.dtype for weight in model.backbone.parameters()} == {torch.bfloat16}


class FourBit(nn.Linear):
    """What bitsandbytes' Linear4bit has: it takes the dtype of its first input, unless one was set."""

    compute_type_is_set = False
    computed: list[torch.dtype | None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.compute_type_is_set:
            self.compute_dtype, self.compute_type_is_set = x.dtype, True
        self.computed.append(self.compute_dtype)
        return super().forward(x)


def test_4_bit_layers_compute_in_fp32_and_choose_afterwards() -> None:
    model = build(DEEP)
    layer = model.backbone.layers[0].mlp
    layer.up_proj.__class__ = FourBit
    layer.up_proj.compute_dtype, layer.up_proj.computed = torch.bfloat16, []
    with fp32_compute(model.backbone):
        states(model)
    assert set(layer.up_proj.computed) == {torch.float32}
    assert (layer.up_proj.compute_dtype, layer.up_proj.compute_type_is_set) == (torch.bfloat16, False)


@pytest.mark.slow
def test_a_4_bit_model_is_judged_by_what_its_attention_gets(tmp_path: Path, monkeypatch: Patch) -> None:
    """Its embedding is fp32 and its linear layers compute in bf16, whose rounding must not look like a mistake; the
    kernel is checked in the dtype of its queries.
    """
    pytest.importorskip("bitsandbytes")
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}  # blocks of 64 weights
    build(hf.LlamaConfig(**(DEEPER | sizes), num_labels=1)).classifier.save_pretrained(tmp_path)
    classifier, _ = build_classifier(tmp_path, dtype=torch.float32, quantized=True)
    assert {weight.dtype for weight in classifier.parameters()} == {torch.uint8, torch.float32}
    assert classifier.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    model = RewardModel(classifier, 0, "bf16")
    checked: list[float] = []
    real = prefix_sharing.kernel_failure
    monkeypatch.setattr(prefix_sharing, "kernel_failure", lambda worst: checked.append(worst) or real(worst))
    assert choose_layout(model, model, 512).shared
    assert 0 < checked[0] < prefix_sharing.KERNEL_TOLERANCE
