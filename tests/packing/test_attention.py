"""The packed, prefix-shared forward against its obvious twin: every response alone, with stock attention."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from helpers import FAMILIES, GROUPS, TINY, VOCABULARY, alone, build, gradients, random_groups, relative
from hypothesis import given, settings
from hypothesis import strategies as st

from rmtool.errors import RmtoolError
from rmtool.model.layout_choice import LayoutDecision, choose_layout
from rmtool.model.reward_model import RewardModel
from rmtool.packing import node_attention, prefix_sharing
from rmtool.packing.attention import UnsupportedAttentionError, packed_attention
from rmtool.packing.layers import compile_layers, decoder_layers
from rmtool.packing.packs import pack
from rmtool.packing.written_attention import AttentionParams


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_packed_rewards_and_gradients_equal_one_by_one(family: str, checkpointing: bool) -> None:
    model = build(FAMILIES[family])
    expected = alone(model, GROUPS)
    expected_gradients = gradients(model, expected)
    if checkpointing:
        model.classifier.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    model.share_prompts(True)
    rewards = model(pack(GROUPS))
    assert relative(rewards, expected) < 1e-5
    for name, gradient in gradients(model, rewards).items():
        assert relative(gradient, expected_gradients[name]) < 1e-5, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_is_recomputed_with_its_own_pack(reentrant: bool) -> None:
    """Two packs of one size, the second forward before the first backward."""
    shapes = (((20, (9, 6)),), ((11, (12, 12)),))
    first, second = (random_groups(seed, shape) for seed, shape in enumerate(shapes))
    model = build(FAMILIES["llama"])
    expected = gradients(model, alone(model, first))
    model.classifier.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    model.share_prompts(True)
    rewards = model(pack(first))
    assert len(model(pack(second))) == len(rewards)
    for name, gradient in gradients(model, rewards).items():
        assert relative(gradient, expected[name]) < 1e-5, name


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3"])
def test_a_filled_pack_has_the_same_rewards_and_gradients(family: str) -> None:
    """On a GPU, packs are filled up to a multiple of 64 tokens; nothing reads those, and no gradient reaches them."""
    model = build(FAMILIES[family])
    model.share_prompts(True)
    plain, filled = pack(GROUPS), pack(GROUPS, 64)
    tokens = plain.input_ids.shape[1]
    assert tokens % 64
    assert filled.input_ids.shape[1] == tokens + -tokens % 64
    assert torch.equal(filled.reward_index, plain.reward_index)
    assert filled.layout.paths == (*plain.layout.paths, (len(plain.layout.paths),))
    assert len(filled.layout.kv_index) - len(plain.layout.kv_index) == -tokens % 64
    expected = model(plain)
    expected_gradients = gradients(model, expected)
    rewards = model(filled)
    assert relative(rewards, expected) < 1e-6
    for name, gradient in gradients(model, rewards).items():
        assert relative(gradient, expected_gradients[name]) < 1e-6, name


def test_a_pack_of_a_whole_multiple_is_not_filled() -> None:
    groups = random_groups(0, ((40, (10, 14)),))
    assert len(pack(groups, 64).layout.lengths) == len(pack(groups).layout.lengths)


def test_packs_are_filled_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(FAMILIES["llama"])
    model.share_prompts(True)
    lengths = []
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(RewardModel, "device", torch.device(device))
        lengths.append(model.build_batch(GROUPS).input_ids.numel())
    assert lengths[0] % 64
    assert lengths[1] == lengths[0] + -lengths[0] % 64


def test_a_classifier_may_be_wrapped_twice() -> None:
    first = build(FAMILIES["llama"])
    again = RewardModel(first.classifier, pad_id=0)
    expected = alone(again, GROUPS)
    again.share_prompts(True)
    assert relative(again(pack(GROUPS)), expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checks_let_these_families_share(family: str) -> None:
    model = build(FAMILIES[family])
    assert choose_layout(model, model, 512) == LayoutDecision(True)
    assert model.shares_prompts


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gpt_neox"])
def test_padded_rewards_and_gradients_equal_one_by_one(family: str) -> None:
    model = build(FAMILIES[family])
    expected = alone(model, GROUPS)
    expected_gradients = gradients(model, expected)
    rewards = model(model.collate(GROUPS))
    assert relative(rewards, expected) < 1e-5
    for name, gradient in gradients(model, rewards).items():
        assert relative(gradient, expected_gradients[name]) < 1e-5, name


def test_a_model_that_passes_no_layout_on_runs_padded_and_says_why() -> None:
    model = build(hf.NemotronConfig(**TINY))
    reason = "the model does not pass keyword arguments to its attention layers"
    assert choose_layout(model, model, 512) == LayoutDecision(False, reason)
    assert relative(model(model.collate(GROUPS)), alone(model, GROUPS)) < 1e-5


def test_the_probe_refuses_a_model_whose_positions_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe alone: the config is fine, but every response starts one position late."""
    model = build(FAMILIES["llama"])
    real = RewardModel._last_states

    def shifted(self: RewardModel, batch: Any) -> torch.Tensor:
        if hasattr(batch, "position_ids"):
            late = batch.position_ids.clone()
            late[0, 40:] += 1
            batch = type(batch)(batch.input_ids, late, batch.reward_index, batch.layout)
        return real(self, batch)

    monkeypatch.setattr(RewardModel, "_last_states", shifted)
    assert "prefix sharing changes" in (choose_layout(model, model, 512).reason or "")


def test_bidirectional_attention_is_declared() -> None:
    model = build(FAMILIES["llama"])
    model.backbone.layers[0].self_attn.is_causal = False
    assert "not causal" in (prefix_sharing.declared_reason(model.backbone) or "")


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_depend_on_the_batch_are_refused_beyond_their_limit(kind: str) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {"factor": 2.0}
    rope = {"rope_type": kind, "rope_theta": 1e4, **factors}
    if kind == "longrope":
        rope |= {"original_max_position_embeddings": 64, "factor": 2.0}
    model = build(hf.LlamaConfig(**(TINY | {"max_position_embeddings": 64}), rope_parameters=rope))
    with pytest.raises(RmtoolError) as caught:
        choose_layout(model, model, 65)
    assert caught.value.id == "E0410"
    assert choose_layout(model, model, 64).shared


def subtree_ends(layout: Any) -> torch.Tensor:
    """For each token, where the last node that has the token's node on its path ends, by definition."""
    ends = [
        max(int(layout.cu_seqlens_q[other + 1]) for other, path in enumerate(layout.paths) if node in path)
        for node in range(len(layout.paths))
    ]
    return torch.repeat_interleave(torch.tensor(ends), torch.tensor(layout.lengths))


def dense_oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Any, params: AttentionParams
) -> torch.Tensor:
    """One dense mask over the pack: a token attends to the tokens before it that are on its path."""
    window = params.window
    at = torch.arange(batch.input_ids.shape[1])
    allowed = (at[None, :] <= at[:, None]) & (at[:, None] < subtree_ends(batch.layout)[None, :])
    if window is not None:
        position = batch.position_ids[0]
        allowed &= position[None, :] > position[:, None] - window
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)) * params.scaling
    if params.softcap:
        scores = params.softcap * (scores / params.softcap).tanh()
    scores = scores.masked_fill(~allowed, -torch.inf)
    if params.sinks is not None:
        scores = torch.cat((scores, params.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    return (scores.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2)


SHAPES = st.lists(
    st.tuples(st.integers(0, 9), st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from([None, 1, 2, 5]), st.integers(0, 2**31), st.sampled_from([4, 5, VOCABULARY]))
@pytest.mark.parametrize(
    ("attend", "softcap", "sinks"),
    [
        (node_attention.attend_by_node, None, False),
        (node_attention._through_autograd, None, False),
        (node_attention.attend_by_node, 0.5, False),
        (node_attention.attend_by_node, None, True),
    ],
    ids=["CPU", "autograd", "soft cap", "sinks"],
)
def test_packed_attention_equals_a_dense_mask(
    attend: Any, softcap: float | None, sinks: bool, shapes: Any, window: int | None, seed: int, last: int
) -> None:
    """Outputs and gradients, in as many calls as nodes have tokens and one each."""
    batch = pack(
        random_groups(seed, tuple(shapes), last)
    )  # few different ids: groups share beginnings, forests are deep
    torch.manual_seed(seed)
    tokens = batch.input_ids.shape[1]
    heads = [torch.randn(1, count, tokens, 8, dtype=torch.float64, requires_grad=True) for count in (4, 2, 2)]
    params = AttentionParams(0.3, window, softcap, torch.randn(4).double().requires_grad_() if sinks else None)
    inputs = [*heads, *([params.sinks] if sinks else [])]
    expected = dense_oracle(*heads, batch, params)
    readout = torch.randn(expected.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((expected * readout).sum(), inputs)
    for longest in (1, 3, 256):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(node_attention, "QUERIES_PER_CALL", longest)
            batch.layout.masks.clear()
            got = attend(*heads, params, batch.layout)
            torch.testing.assert_close(got, expected)
            torch.testing.assert_close(torch.autograd.grad((got * readout).sum(), inputs), gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_its_backward_in_fp32_on_a_cpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are those of the same numbers in fp32, but for the rounding of the output and their own."""
    backward, seen = node_attention._flash_backward, set[torch.dtype]()

    def recorded(*given: Any, **named: Any) -> Any:
        seen.update(each.dtype for each in given if isinstance(each, torch.Tensor))
        return backward(*given, **named)

    monkeypatch.setattr(node_attention, "_flash_backward", recorded)
    batch = pack(GROUPS)
    rng, tokens = torch.Generator().manual_seed(0), batch.input_ids.shape[1]
    shapes = [(1, heads, tokens, 8) for heads in (4, 2, 2)]
    heads = [torch.randn(shape, generator=rng).to(dtype).requires_grad_() for shape in shapes]
    exact = [part.detach().float().requires_grad_() for part in heads]
    with torch.autocast("cpu", dtype):
        got, _ = packed_attention(torch.nn.Identity(), *heads, None, scaling=0.3, packed=batch.layout)
    expected = dense_oracle(*exact, batch, AttentionParams(0.3))
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.float(), expected, atol=eps, rtol=eps)
    readout = torch.randn(got.shape, generator=rng)
    mine = torch.autograd.grad((got.float() * readout.to(dtype).float()).sum(), heads)
    theirs = torch.autograd.grad((expected * readout.to(dtype).float()).sum(), exact)
    for one, other in zip(mine, theirs, strict=True):
        assert relative(one.float(), other) < eps
    assert seen == {torch.float32}


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_soft_caps_and_sinks_pass_all_checks(family: str, precision: str) -> None:
    model = build(FAMILIES[family])
    model.precision = precision
    assert choose_layout(model, model, 512) == LayoutDecision(True)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"packed": None}, "does not pass keyword arguments"),
        ({"attention_mask": torch.ones(1)}, "custom attention masks"),
        ({"dropout": 0.1}, "attention dropout"),
        ({"is_causal": False}, "attention is not causal"),
        ({"bias": 30.0, "alibi": torch.ones(1)}, "unsupported attention argument: alibi, bias"),
    ],
)
def test_attention_that_is_not_computed_here_is_refused(given: dict[str, Any], reason: str) -> None:
    batch = pack(GROUPS)
    q = torch.randn(1, 4, batch.input_ids.shape[1], 8)
    arguments = {"attention_mask": None, "packed": batch.layout, "bias": None} | given
    with pytest.raises(UnsupportedAttentionError, match=reason):
        packed_attention(torch.nn.Identity(), q, q, q, **arguments)


def test_fewer_queries_than_keys_see_the_last_keys() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
    whole = node_attention.attend_node(q, k, v, AttentionParams())
    torch.testing.assert_close(node_attention.attend_node(q[:, :, 3:], k, v, AttentionParams()), whole[:, :, 3:])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.permutations(range(6)), st.integers(8, 400), st.booleans())
def test_a_reward_does_not_depend_on_its_batch(seed: int, order: list[int], max_tokens: int, shared: bool) -> None:
    from rmtool.model.rewards import compute_rewards
    from rmtool.ui import SilentUi

    rng = np.random.default_rng(seed)
    shapes = tuple((int(rng.integers(0, 30)), tuple(rng.integers(1, 20, rng.integers(1, 4)))) for _ in range(6))
    groups = random_groups(seed, shapes)
    model = MODEL
    model.share_prompts(shared)
    together = compute_rewards(model, [groups[index] for index in order], max_tokens, SilentUi())
    model.share_prompts(False)
    for position, index in enumerate(order):
        single = alone(model, [groups[index]])
        torch.testing.assert_close(torch.tensor(together[position]), single.detach(), atol=1e-6, rtol=1e-6)


MODEL = build(FAMILIES["llama"])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compiled_layers_are_exact_and_compiled_once_for_all_lengths(family: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = copy.deepcopy(FAMILIES[family])
    config.update({"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2})
    model = build(config)
    model.share_prompts(True)
    expected = model(model.collate(GROUPS))
    expected_gradients = gradients(model, expected)
    assert compile_layers(model.backbone, "aot_eager") == 4
    rewards = model(model.collate(GROUPS))
    assert relative(rewards, expected) < 1e-6
    for name, gradient in gradients(model, rewards).items():
        assert relative(gradient, expected_gradients[name]) < 1e-6, name
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    for seed in range(4):
        model(model.collate(random_groups(seed, ((9 + seed, (3 + 2 * seed, 4)),) * (seed + 1))))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_layers_of_one_kind_are_compiled_once_for_all() -> None:
    """Also where modules have a forward bound to each of them, as Liger leaves norms and MLPs."""
    graphs = []
    for layers in (1, 12):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config = copy.deepcopy(FAMILIES["llama"])
        config.update({"num_hidden_layers": layers})
        model = build(config)
        model.share_prompts(True)
        for module in (each for layer in decoder_layers(model.backbone) for each in (layer.mlp, layer.input_layernorm)):
            module.forward = MethodType(type(module).forward, module)
        compile_layers(model.backbone, "eager")
        for groups in (GROUPS[:2], GROUPS[2:]):
            model(model.collate(groups))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
