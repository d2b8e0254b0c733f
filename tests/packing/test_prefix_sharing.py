"""The checks at load: a probe in fp32 whatever the weights' dtype, and the attention kernel of half precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers import GROUPS, tiny_config
from helpers import build as build_fp32
from mutants import HALF_ONLY, PACKS, Mutant, Patch, install_attention
from rounding import RoundedProducts, round_forwards, rounded_matmul

from rmtool.dist import SINGLE_PROCESS, DistInfo
from rmtool.errors import RmtoolError
from rmtool.model.layout_choice import _head_inputs, choose_layout
from rmtool.model.precision import PRECISIONS
from rmtool.model.reward_model import RewardModel
from rmtool.packing import attention_check, node_attention, prefix_sharing
from rmtool.packing.attention_check import KernelCheck, key_positions
from rmtool.packing.packs import pack
from rmtool.packing.written_attention import AttentionParams

DEEP = hf.LlamaConfig(**(tiny_config(97) | {"num_hidden_layers": 40, "initializer_range": 0.1}), num_labels=1)


def build(config: Any, precision: str = "fp32", dtype: torch.dtype = torch.float32) -> RewardModel:
    """A tiny model, its backbone's weights in `dtype`."""
    model = build_fp32(config)
    model.backbone.to(dtype)
    model.precision = precision
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_deep_model_shares_prompts_in_half_precision(precision: str, dtype: torch.dtype, monkeypatch: Patch) -> None:
    """Rounding alone moves its states by more than many a mistake would."""
    round_forwards(monkeypatch)
    model = build(DEEP, precision, dtype)
    probe = prefix_sharing.Probe(GROUPS, lambda groups: _head_inputs(model, model, groups))
    model.share_prompts(True)
    assert probe.error(_head_inputs(model, model, GROUPS)) > 20 * prefix_sharing.TOLERANCE
    assert choose_layout(model, model, 512).shared
    assert model.shares_prompts
    assert model.precision == precision


def test_a_model_that_padding_changes_is_refused_with_weights_of_16_bits(monkeypatch: Patch) -> None:
    """And a sound one is not: in bf16 padding moves its states by more than the bound."""
    round_forwards(monkeypatch)
    monkeypatch.setattr(prefix_sharing, "declared_reason", lambda _: "made to run padded")
    model = build(DEEP, "bf16", torch.bfloat16)
    probe = prefix_sharing.Probe(GROUPS, lambda groups: _head_inputs(model, model, groups))
    assert probe.padding_error > prefix_sharing.PADDED_TOLERANCE
    assert choose_layout(model, model, 512).reason == "made to run padded"


@pytest.mark.parametrize(
    ("elsewhere", "expected"),
    [
        ((0.0, 0.0, 0.0), "None"),
        ((0.0, 0.0, 9.0, 0.0), "half-precision packed attention is off by 9.0"),
        ((0.0, 1e-4, 0.0), "prefix sharing changes its rewards (relative error 1.0e-04)"),
        ((0.0, 1e-4, 5e-4, 0.0), "None"),  # no more than padding does on that rank
        ((0.0, 1.0, 1.0), "padding changes the rewards"),
        ((1.0, 1.0, 1.0), "prefix sharing changes its rewards"),  # NaN in the states: not the fault of padding
    ],
)
def test_one_rank_decides_for_all(elsewhere: tuple[float, ...], expected: str) -> None:
    """This rank finds nothing wrong; the other one measures these numbers. Both run the same forwards."""
    model, other = build(hf.LlamaConfig(**tiny_config(97), num_labels=1), "bf16"), iter(elsewhere)
    dist = DistInfo(0, 2, max=lambda value: max(value, next(other)))
    try:
        reason = str(choose_layout(model, model, 512, dist).reason)
    except RmtoolError as error:
        reason = error.what
    assert expected in reason
    assert model.shares_prompts == (expected == "None")
    assert next(other, None) is None


# ------------------------------------------------------------------------------------------------------- its bounds


class FixedProbe(prefix_sharing.Probe):
    """A probe with these states of two sequences alone, and this difference between padded and alone."""

    def __init__(self, alone: torch.Tensor, padding_error: float):
        self.alone_ND = alone
        self.padding_error = padding_error  # type: ignore[misc]
        self.dist = SINGLE_PROCESS
        self.finite = bool(alone.isfinite().all())


@pytest.mark.parametrize(
    ("padding_error", "error", "shares"),
    [
        (0.0, prefix_sharing.TOLERANCE * 0.9, True),
        (0.0, prefix_sharing.TOLERANCE * 1.1, False),
        (4e-5, 3e-4, True),  # the model's own rounding is as large
        (4e-5, 5e-4, False),
        (0.5, 5e-3, False),  # padding changes the model: that is no rounding
        (0.0, float("nan"), False),
    ],
)
def test_the_bound_follows_the_rounding_of_the_model(padding_error: float, error: float, shares: bool) -> None:
    alone = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    off = torch.tensor([[0.0, error], [0.0, 0.0]])
    reason = prefix_sharing.probe_failure(FixedProbe(alone, padding_error), lambda: alone + off)
    assert (reason is None) == shares


def test_states_far_from_zero_are_compared_with_a_tenth_of_their_length() -> None:
    probe = FixedProbe(torch.tensor([[100.0, 0.0], [100.0, 1e-3]]), 0.0)
    assert probe.error(probe.alone_ND + 1e-3) == pytest.approx(2**0.5 * 1e-3 / 10, rel=1e-3)


def test_weights_that_give_no_numbers_are_not_a_matter_of_padding() -> None:
    prefix_sharing.require_padding(FixedProbe(torch.full((2, 2), torch.nan), float("nan")))
    with pytest.raises(RmtoolError) as caught:
        prefix_sharing.require_padding(FixedProbe(torch.ones(2, 2), float("nan")))
    assert caught.value.id == "E0412"


@pytest.mark.parametrize("fails_at", [None, 3, 9])
def test_the_probe_leaves_the_model_as_it_was(fails_at: int | None) -> None:
    model = build(DEEP, "bf16", torch.bfloat16).train()
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == fails_at:
            raise ZeroDivisionError

    handle = model.backbone.register_forward_pre_hook(fail)
    if fails_at is None:
        assert choose_layout(model, model, 512).shared
    else:
        with pytest.raises(ZeroDivisionError):
            choose_layout(model, model, 512)
    handle.remove()
    assert model.training
    assert model.shares_prompts == (fails_at is None)
    assert model.classifier.config._attn_implementation == ("rmtool_packed" if fails_at is None else "sdpa")
    assert model.precision == "bf16"
    hooks = [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules()]
    assert hooks == [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in build(DEEP).modules()]


# ------------------------------------------------------------------------------------------------ the kernel's check


def test_the_paths_of_leaves_are_the_whole_sequences() -> None:
    batch = pack(GROUPS)
    ids, inner = batch.input_ids[0], {node for path in batch.layout.paths for node in path[:-1]}
    paths = list(key_positions(batch.layout))
    assert torch.cat([own for own, _ in paths]).tolist() == list(range(len(ids)))
    assert all(path[-len(own) :].tolist() == own.tolist() for own, path in paths)
    got = sorted(ids[path].tolist() for node, (_, path) in enumerate(paths) if node not in inner)
    assert got == sorted(sequence.tolist() for group in GROUPS for sequence in group.sequences())


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_the_reference_is_attention_in_fp32(scaling: float | None) -> None:
    """Grouped heads, fewer queries than keys, a window, values of another size; and the scale of its values."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 6)
    visible = node_attention.causal_mask(3, 7, 4, q.device)
    assert visible.int().tolist() == [[0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]
    output, scale = attention_check._in_fp32(q, k, v, AttentionParams(scaling, 4))
    exact = partial(F.scaled_dot_product_attention, attn_mask=visible, scale=scaling, enable_gqa=True)
    torch.testing.assert_close(output, exact(q.double(), k.double(), v.double())[0].float())
    lengths = v.norm(dim=-1, keepdim=True).double()
    torch.testing.assert_close(scale, exact(q.double(), k.double(), lengths)[0, ..., 0].float())


def test_the_reference_has_soft_caps_and_sinks() -> None:
    torch.manual_seed(0)
    q, k, v, sinks = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8), torch.randn(2)
    output, _ = attention_check._in_fp32(q, k, v, AttentionParams(softcap=0.7, sinks=sinks))
    for head in range(2):
        for query in range(3):
            seen = k[0, head, : 5 + query]
            scores = [0.7 * math.tanh(float(q[0, head, query] @ key) / 8**0.5 / 0.7) for key in seen]
            total = sum(map(math.exp, scores)) + math.exp(float(sinks[head]))
            expected = sum(math.exp(score) / total * value for score, value in zip(scores, v[0, head], strict=False))
            torch.testing.assert_close(output[head, query], expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_model_that_scales_its_scores_is_judged_by_its_scale(precision: str, monkeypatch: Patch) -> None:
    """Attention that is divided by something else than the root of the head size, and far from even."""
    config = hf.Gemma3TextConfig(
        **(tiny_config(97) | {"initializer_range": 0.2}), num_labels=1, sliding_window=8, query_pre_attn_scalar=1
    )
    model = build(config, precision)
    assert choose_layout(model, model, 512).shared
    # And its mistakes still count: with a wrong scale in the reference everything would be rounding.
    for mutant in HALF_ONLY:
        with monkeypatch.context() as patch:
            mutant.install(patch)
            assert "half-precision packed attention is off" in (choose_layout(model, model, 512).reason or ""), (
                mutant.name
            )


@pytest.mark.parametrize("mutant", [m for m in (*PACKS, *HALF_ONLY) if "neighbor" in m.name], ids=lambda m: m.name)
def test_a_leak_shows_in_a_shallow_model_with_a_narrow_window(mutant: Mutant, monkeypatch: Patch) -> None:
    """What a long text sees of the one before does not reach its end there."""
    config = hf.MistralConfig(**tiny_config(97), num_labels=1, sliding_window=4)
    model = build(config, "bf16")
    mutant.install(monkeypatch)
    assert not choose_layout(model, model, 512).shared


def test_what_overflows_before_attention_is_not_its_mistake(monkeypatch: Patch) -> None:
    model = build(DEEP, "fp16")
    model.backbone.layers[2].self_attn.v_proj.weight.data *= 1e6
    check = KernelCheck()
    model.share_prompts(True)
    model.classifier.set_attn_implementation(attention_check.NAME)
    _head_inputs(model, model, GROUPS)
    assert 0 < check.worst < 1


WIDE = hf.MistralConfig(**(tiny_config(97) | {"max_position_embeddings": 4096}), num_labels=1, sliding_window=512)


@pytest.mark.parametrize("mutant", [None, *HALF_ONLY], ids=lambda mutant: mutant.name if mutant else "sound")
def test_one_key_of_a_wide_window_counts(mutant: Mutant | None, monkeypatch: Patch) -> None:
    """Of 512 keys that count alike, one is less than the rounding of bf16."""
    round_forwards(monkeypatch)
    model = build(WIDE, "bf16")
    seen: list[float] = []
    monkeypatch.setattr(prefix_sharing, "kernel_failure", lambda worst: seen.append(worst))
    if mutant:
        mutant.install(monkeypatch)
    choose_layout(model, model, 4096)
    if mutant:
        assert seen[0] > 1.5 * prefix_sharing.KERNEL_TOLERANCE
    else:
        assert seen[0] < prefix_sharing.KERNEL_TOLERANCE / 1.5


def checked(precision: str, change: Callable[[torch.Tensor], torch.Tensor], monkeypatch: Patch) -> float:
    """`KernelCheck.worst` where the packed attention's result is changed."""

    from rmtool.packing.attention import packed_attention

    def changed(*args: Any, **kwargs: Any) -> Any:
        output, _ = packed_attention(*args, **kwargs)
        return change(output), None

    install_attention(changed, monkeypatch)
    model = build(DEEP, precision)
    check = KernelCheck()
    model.share_prompts(True)
    model.classifier.set_attn_implementation(attention_check.NAME)
    _head_inputs(model, model, GROUPS)
    return check.worst


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_unit_is_the_rounding_of_the_precision(precision: str, monkeypatch: Patch) -> None:
    """An output off by a share of itself counts as many times the rounding as that share is."""
    unit = torch.finfo(PRECISIONS[precision]).eps / 2
    assert 0.05 < checked(precision, lambda output: output, monkeypatch) < 1
    assert 2 < checked(precision, lambda output: output * (1 + 32 * unit), monkeypatch) < 40
    assert checked(precision, lambda output: output * torch.nan, monkeypatch) == torch.inf


def test_fp32_has_no_kernel_to_check(monkeypatch: Patch) -> None:
    assert checked("fp32", lambda output: output * 2, monkeypatch) == 0


# ---------------------------------------------------------------------------------------- the rounding used in tests


def test_rounded_products_are_coarse_and_depend_on_the_shape() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(9, 64).bfloat16(), torch.randn(64, 48).bfloat16()
    exact = left.float() @ right.float()
    rounded = rounded_matmul(left, right)
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded.float() - exact).norm() / exact.norm() < 2**-7
    assert not torch.equal(rounded_matmul(left[:6], right), rounded[:6])
    with RoundedProducts():
        assert torch.equal(left @ right, rounded)
        assert torch.equal(torch.addmm(torch.zeros(48).bfloat16(), left, right), rounded)
