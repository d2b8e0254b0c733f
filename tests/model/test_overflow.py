"""fp16 overflows: found in every kind of layer, computed again in fp32, and avoided from then on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from helpers import GROUPS, build, tiny_config
from torch import nn

from rmtool.errors import RmtoolError
from rmtool.model.overflow import OverflowGuard, all_finite, beyond_fp16
from rmtool.model.reward_model import RewardModel
from rmtool.model.rewards import compute_rewards
from rmtool.ui import SilentUi

MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS = {
    "llama": hf.LlamaConfig(**tiny_config(97), attention_bias=True, num_labels=1),
    "qwen3": hf.Qwen3Config(**tiny_config(97), num_labels=1),
    "qwen3_moe": hf.Qwen3MoeConfig(**tiny_config(97), **MIXTURE, num_labels=1),
    "gpt2": hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=512, num_labels=1, pad_token_id=0),
    "gpt_neox": hf.GPTNeoXConfig(**tiny_config(97), num_labels=1),
    "opt": hf.OPTConfig(vocab_size=97, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                        max_position_embeddings=512, word_embed_proj_dim=32, num_labels=1, pad_token_id=0),
}  # fmt: skip
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYERS = [
    *(("llama", f"layers.0.{name}") for name in (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
    *(("qwen3", f"layers.1.{name}") for name in ATTENTION),
    *(("qwen3_moe", f"layers.0.mlp.{name}") for name in ("gate", "experts")),
    *(("gpt2", f"h.0.{name}") for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    *(("gpt_neox", f"layers.0.attention.{name}") for name in ("query_key_value", "dense")),
    *(("opt", f"decoder.layers.0.{name}") for name in ("fc1", "fc2")),  # relu hides -inf
]
# Their outputs are products of attention, which takes fp16, without a norm in between.
ATTENDED = {"q_proj", "k_proj", "v_proj", "c_attn", "query_key_value"}


def rewards_of(model: RewardModel, precision: str, shares: bool = False) -> torch.Tensor:
    model.precision = precision
    model.share_prompts(shares)
    return torch.tensor([value for values in compute_rewards(model, GROUPS, 4096, SilentUi()) for value in values])


def with_large_outputs(family: str, name: str, largest: float = 3e5) -> RewardModel:
    """A model one of whose layers has outputs beyond fp16's range, from weights within it."""
    model = build(CONFIGS[family])
    for feeding in ("v_proj", "up_proj", "experts", "c_attn", "c_fc", "query_key_value", "fc1"):
        for part, layer in model.backbone.named_modules():
            if part.endswith(feeding) and part != name:
                scale(layer, 300.0 if feeding == "up_proj" else 30.0)
    layer = model.backbone.get_submodule(name)
    factor = largest / largest_output(model, layer)
    scale(layer, factor ** (1 / 3) if name.endswith("experts") else factor)  # of three matrices
    if name.endswith("experts"):
        layer.half()  # as on a GPU: autocast does not cast experts
    assert not beyond_fp16(model.backbone)
    return model


def scale(layer: nn.Module, factor: float) -> None:
    for parameter in layer.parameters(recurse=False):
        parameter.data *= factor


def largest_output(model: RewardModel, layer: nn.Module) -> float:
    found = list[float]()

    def note(_: nn.Module, __: Any, output: Any) -> None:
        found.append(float((output[0] if isinstance(output, tuple) else output).abs().max()))

    hook = layer.register_forward_hook(note)
    rewards_of(model, "fp32")
    hook.remove()
    return max(found)


@pytest.mark.parametrize("shares", [False, True], ids=["padded", "shared"])
@pytest.mark.parametrize(("family", "name"), LAYERS)
def test_an_overflow_in_any_layer_is_found(family: str, name: str, shares: bool) -> None:
    model = with_large_outputs(family, name)
    with model.in_fp32():
        exact = rewards_of(model, "fp32", shares)
    assert torch.equal(rewards_of(model, "fp16", shares), exact)
    guard = model.overflow_guard
    assert (guard.forwards, guard.repeated) == (1, 1)
    assert name in guard.adapted
    again = rewards_of(model, "fp16", shares)
    normed = family == "qwen3" and not name.endswith("v_proj")
    if name.rpartition(".")[2] in ATTENDED and not normed:
        assert (guard.repeated, torch.equal(again, exact)) == (2, True)
        return
    assert guard.repeated == 1
    assert 0 < (again - exact).abs().max() < 0.02 * exact.std()
    with model.in_fp32():
        assert torch.equal(rewards_of(model, "fp32", shares), exact)


def test_scaled_layers_give_the_rewards_of_fp32_at_any_size() -> None:
    """A scaled layer's outputs cannot overflow, and its rounding is that of fp16, whatever the size of its input."""
    layer = nn.Linear(64, 48)
    guard = OverflowGuard(nn.Sequential(layer))
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-3, 12, 200)[:, None]
    exact = layer(x)
    with guard.watch() as ranges, torch.autocast("cpu", torch.float16):
        layer(x)
    assert not all_finite(ranges)
    guard.adapt(ranges)
    with guard.watch() as ranges, torch.autocast("cpu", torch.float16):
        scaled = layer(x)
    assert all_finite(ranges)
    assert scaled.dtype == torch.float32
    error = (scaled - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.max() < 2**-10
    assert torch.equal(layer(x), exact)


def test_released_layers_compute_as_before_and_are_adapted_again() -> None:
    """To their weights then: those of a model in training grow."""
    model = with_large_outputs("llama", "layers.0.mlp.up_proj")
    layer, guard = model.backbone.get_submodule("layers.0.mlp.up_proj"), model.overflow_guard
    own = layer.forward
    layer.forward = lambda x: own(x)  # a forward that someone else has set
    given = layer.forward
    rewards_of(model, "fp16")
    assert len(guard.adapted) == 3
    assert layer.forward is not given
    guard.release()
    assert (guard.adapted, layer.forward) == ([], given)
    assert not any("forward" in vars(module) for module in model.backbone.modules() if module is not layer)
    scale(layer, 1.1)
    exact, counted = rewards_of(model, "fp32"), guard.repeated
    assert torch.equal(rewards_of(model, "fp16"), exact)
    assert 0 < (rewards_of(model, "fp16") - exact).abs().max() < 0.02 * exact.std()
    assert guard.repeated == counted + 1


def test_weights_beyond_fp16_are_found() -> None:
    model = build(CONFIGS["llama"])
    name = "layers.1.mlp.gate_proj.weight"
    assert beyond_fp16(model.backbone) == []
    model.backbone.get_parameter(name).data[3, 4] = -70000.0
    assert beyond_fp16(model.backbone) == [name]
    model.backbone.half()
    assert beyond_fp16(model.backbone) == [name]
    model.backbone.get_parameter(name).data[3, 4] = 65504.0
    assert beyond_fp16(model.backbone) == []
    model.backbone.get_parameter(name).data[3, 4] = float("nan")
    assert beyond_fp16(model.backbone) == []


def test_a_repeat_that_does_not_fit_is_done_response_by_response(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_large_outputs("llama", "layers.0.mlp.up_proj")
    exact, real = rewards_of(model, "fp32"), RewardModel.forward

    def full(self: RewardModel, batch: Any) -> torch.Tensor:
        if self.precision == "fp32" and len(batch.reward_index) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    monkeypatch.setattr(RewardModel, "forward", full)
    most = 1
    torch.testing.assert_close(rewards_of(model, "fp16"), exact, atol=1e-5, rtol=1e-5)
    assert (model.overflow_guard.forwards, model.overflow_guard.repeated) == (1, 1)
    model.overflow_guard.release()
    most = 0
    with pytest.raises(RmtoolError, match="out of memory"):
        rewards_of(model, "fp16")
