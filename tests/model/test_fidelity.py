"""Fidelity: which responses are sampled, and what is said about their rewards; weights on their way to fp16."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import GROUPS, Lines
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rmtool.errors import RmtoolError
from rmtool.model import fidelity
from rmtool.model.checkpoint_fidelity import checkpoint_fidelity
from rmtool.model.classifier import matrices
from rmtool.model.fidelity import choose_sample, compare, rewards_with_fidelity, sample_size
from rmtool.model.loading import load_for_inference
from rmtool.model.out_of_memory import PackOutOfMemoryError
from rmtool.model.precision import PRECISIONS, loading_dtype
from rmtool.model.reward_model import RewardModel
from rmtool.model.rewards import compute_rewards
from rmtool.tokenization.response_group import build_group
from rmtool.training.checkpoint_writer import CheckpointWriter
from rmtool.ui import SilentUi

MANY = [
    build_group([[3, 4, index % 90 + 5, number + 7 + 3 * (index // 90)] for number in range(1 + index % 3)])
    for index in range(150)
]


@given(st.lists(st.tuples(*[st.floats(-4, 4) | st.sampled_from([0.0, math.nan, math.inf])] * 2), max_size=12))
def test_the_numbers_are_those_of_their_definition(both: list[tuple[float, float]]) -> None:
    found = compare(*zip(*both, strict=True)) if both else compare([], [])
    kept = [pair for pair in both if all(map(math.isfinite, pair))]
    std = np.std([exact for exact, _ in kept]) if kept else 0.0
    off = [abs(reward - exact) for exact, reward in kept]
    ordered = [(a, b) if a[0] > b[0] else (b, a) for a, b in itertools.combinations(kept, 2) if a[0] != b[0]]
    assert (found.responses, found.pairs) == (len(kept), len(ordered))
    assert found.std == pytest.approx(std)
    assert found.reordered == sum(higher[1] <= lower[1] for higher, lower in ordered)
    if std > 1e-6:
        assert found.rms == pytest.approx(np.sqrt(np.mean(np.square(off))) / std)
        assert found.max == pytest.approx(max(off) / std)
    if not std:
        assert found.as_dict()["rms"] is None
        assert str(found).startswith("not measurable")


def test_the_default_sample_is_small_beside_the_data() -> None:
    sizes = {responses: sample_size(None, responses) for responses in (0, 1, 255, 256, 600, 2048, 10**6)}
    assert sizes == {0: 0, 1: 0, 255: 0, 256: 8, 600: 18, 2048: 64, 10**6: 64}
    assert [sample_size(requested, 10) for requested in (0, 3, 10, 500)] == [0, 3, 10, 10]


def test_the_sample_is_the_same_in_any_order() -> None:
    """By text alone: not by row, nor by how often it occurs."""

    def texts(groups: list[Any], size: int) -> set[bytes]:
        places = choose_sample(groups, size)
        assert len(set(places)) == min(size, len({ids.tobytes() for group in groups for ids in group.sequences()}))
        return {groups[index].sequence(number).tobytes() for index, number in places}

    shuffled = [MANY[at] for at in np.random.default_rng(0).permutation(len(MANY))]
    assert texts(MANY, 20) == texts(shuffled, 20) == texts(shuffled + MANY[:50], 20)
    assert texts(MANY, 10) < texts(MANY, 20)
    assert len(texts(MANY, 500)) == 300
    assert texts(MANY, 20) != texts(MANY[:10], 20)


def test_pruning_keeps_the_lowest_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [build_group([[index, index % 7 + 1]]) for index in range(5000)]
    found = choose_sample(many, 20)
    monkeypatch.setattr("heapq.nsmallest", lambda size, values: sorted(values)[:size])
    assert found == choose_sample(many, 20) != list(range(20))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_sample_is_compared_with_fp32(precision: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lacks_bf16", "lacks_fp16"):
        monkeypatch.setattr(f"rmtool.model.precision.{name}", lambda: False)
    loaded = load_for_inference(checkpoint, precision=precision, fidelity=True)
    rewards, found = rewards_with_fidelity(loaded.model, GROUPS, 64, SilentUi(), 6)
    assert found is not None
    exact = compute_rewards(load_for_inference(checkpoint).model, GROUPS, 64, SilentUi())
    off = [rewards[group][number] - exact[group][number] for group, number in choose_sample(GROUPS, 6)]
    assert found.responses == 6
    assert 0 < found.rms * found.std == pytest.approx(float(np.sqrt(np.mean(np.square(off)))), rel=0.01)
    assert rewards == compute_rewards(loaded.model, GROUPS, 64, SilentUi())
    assert rewards_with_fidelity(loaded.model, GROUPS, 64, SilentUi(), 0) == (rewards, None)
    assert rewards_with_fidelity(loaded.model, GROUPS, 64, SilentUi()) == (rewards, None)  # tiny


def test_the_sample_comes_before_weights_are_rounded(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else fp16 weights are compared with themselves."""
    monkeypatch.setattr("rmtool.model.precision.lacks_bf16", lambda: False)
    model, done = load_for_inference(checkpoint, precision="bf16", fidelity=True).model, list[str]()
    real = fidelity.compute_rewards
    monkeypatch.setattr(fidelity, "compute_rewards", lambda *given: done.append(model.precision) or real(*given))
    monkeypatch.setattr(RewardModel, "round_weights", lambda _: done.append("round"))
    rewards_with_fidelity(model, GROUPS, 64, SilentUi(), 6)
    assert done == ["fp32", "round", "bf16"]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32", "fp32"])
def test_only_matrices_are_rounded_on_a_gpu(precision: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_for_inference(checkpoint).model
    model.precision = precision
    model.round_weights()
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}  # on a CPU
    monkeypatch.setattr(RewardModel, "device", torch.device("cuda"))
    model.round_weights()
    rounded = {name for name, weight in model.classifier.named_parameters() if weight.dtype == PRECISIONS[precision]}
    expected = {name for name, _ in model.classifier.named_parameters()}
    assert rounded == (set(matrices(model.classifier)) if "16" in precision else expected)


def test_fp32_has_nothing_to_be_compared_with(checkpoint: Path) -> None:
    loaded = load_for_inference(checkpoint)
    assert rewards_with_fidelity(loaded.model, GROUPS, 64, SilentUi(), 6)[1] is None


def test_a_sample_that_does_not_fit_in_fp32_is_taken_one_by_one(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, limits, fits = fidelity.compute_rewards, list[int](), [1, 0]

    def full(model: RewardModel, groups: Any, max_tokens: int, bar: Any) -> Any:
        limits.append(max_tokens)
        if model.precision == "fp32" and max_tokens > fits[0]:
            raise PackOutOfMemoryError([0], 9)
        return real(model, groups, max_tokens, bar)

    monkeypatch.setattr(fidelity, "compute_rewards", full)
    monkeypatch.setattr("rmtool.model.precision.lacks_bf16", lambda: False)
    loaded = load_for_inference(checkpoint, precision="bf16", fidelity=True)
    for measured in (True, False):
        limits.clear()
        _, found = rewards_with_fidelity(loaded.model, GROUPS, 64, SilentUi(), 6)
        assert (found is not None) == measured
        assert limits == [64, 1, 64]
        fits.pop(0)


# ------------------------------------------------------------------------------------------------ of a checkpoint


def test_a_checkpoint_loaded_in_bf16_gives_what_transformers_gives(checkpoint: Path) -> None:
    groups = MANY
    found = checkpoint_fidelity(checkpoint, groups, 256)
    assert found.keys() == {"loaded in bf16"}  # on a CPU, auto is fp32
    assert found["loaded in bf16"].responses == sample_size(None, 300) == 9
    exact, half = (
        AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    places = choose_sample(groups, found["loaded in bf16"].responses)
    ids = [torch.from_numpy(groups[index].sequence(number))[None].long() for index, number in places]
    with torch.no_grad():
        both = [[float(model(input_ids=each).logits) for each in ids] for model in (exact, half)]
    expected = compare(*both)
    assert found["loaded in bf16"].rms == pytest.approx(expected.rms, rel=1e-3)
    assert found["loaded in bf16"].reordered == expected.reordered


def test_a_slow_bf16_measurement_ends(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmtool.model.checkpoint_fidelity.BF16_SECONDS", 0.0)
    assert checkpoint_fidelity(checkpoint, MANY[:80], 256) == {}


def test_a_complete_run_does_not_fail_for_want_of_memory_or_a_checkpoint_to_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here packs that do not fit, while the optimizer's states still hold the memory; then any error of loading."""
    engine = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=True))
    recipe = SimpleNamespace(train=SimpleNamespace(tokens_per_pack=64))
    writer, said = CheckpointWriter(tmp_path, recipe, engine, None, None), Lines()  # type: ignore[arg-type]
    for error in (PackOutOfMemoryError([0, 1], 9), RmtoolError("E0404", "no weights", "")):
        monkeypatch.setattr("rmtool.training.checkpoint_writer.checkpoint_fidelity", Mock(side_effect=error))
        writer.measure_fidelity(GROUPS, said)
        assert said.lines.pop() == f"fidelity of the checkpoint not measured: {error.what}"
    monkeypatch.setattr("rmtool.training.checkpoint_writer.checkpoint_fidelity", Mock(side_effect=ValueError))
    with pytest.raises(ValueError):
        writer.measure_fidelity(GROUPS, said)


def test_few_responses_are_not_measured(checkpoint: Path) -> None:
    assert checkpoint_fidelity(checkpoint, GROUPS, 256) == {}


# --------------------------------------------------------------------------------------------- weights on their way


@pytest.mark.parametrize(
    ("precision", "stored", "free", "dtype"),
    [
        ("fp16", {"F32": 100}, None, torch.float32),
        ("fp16", {"BF16": 100}, None, torch.float32),
        ("fp32", {"BF16": 100}, 1000, torch.float32),
        ("tf32", {"BF16": 100}, 1000, torch.float32),
        ("fp16", {"BF16": 100}, 1000, torch.bfloat16),
        ("bf16", {"F16": 100}, 1000, torch.float16),
        ("fp16", {"BF16": 90, "F16": 10}, 1000, torch.float32),
        ("fp16", {"BF16": 90, "F16": 10}, 100, torch.float16),
        ("fp16", {"F32": 100}, 1000, torch.float32),
        ("fp16", {"F32": 100}, 800, torch.float16),
        ("bf16", {"F32": 100}, 100, torch.bfloat16),
        ("fp16", {"BF16": 90, "F32": 10}, 1000, torch.float32),
    ],
)
def test_weights_are_read_in_the_dtype_of_their_file_where_they_fit(
    precision: str, stored: dict[str, int], free: int | None, dtype: torch.dtype
) -> None:
    assert loading_dtype(precision, stored, free) == dtype


def test_weights_beyond_fp16_are_an_error_or_computed_in_fp32(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in sorted(weights) if "down_proj" in name)
    weights[name][0, 0] = 1e5
    save_file(weights, file, metadata={"format": "pt"})
    monkeypatch.setattr("rmtool.model.precision.lacks_fp16", lambda: False)
    with pytest.raises(RmtoolError) as caught:
        load_for_inference(checkpoint, precision="fp16")
    assert caught.value.id == "E0416"
    assert name.removeprefix("model.") in str(caught.value)
    exact = compute_rewards(load_for_inference(checkpoint, precision="fp32").model, GROUPS, 64, SilentUi())
    monkeypatch.setattr("rmtool.model.loading.compute_precision", lambda _: "fp16")  # as on a GPU
    loaded = load_for_inference(checkpoint)
    assert loaded.model.precision == "fp32"
    assert [notice for notice in loaded.notices if "beyond the range of fp16" in notice]
    assert compute_rewards(loaded.model, GROUPS, 64, SilentUi()) == exact
    # As on a GPU without memory for fp32, where the weight arrives as inf.
    dtypes = {"fp16": torch.float16, "fp32": torch.float32}
    monkeypatch.setattr("rmtool.model.loading.loading_dtype", lambda precision, *_: dtypes[precision])
    assert compute_rewards(load_for_inference(checkpoint).model, GROUPS, 64, SilentUi()) == exact


def test_products_are_summed_in_fp32(checkpoint: Path) -> None:
    settings = torch.backends.cuda.matmul
    settings.allow_fp16_reduced_precision_reduction = settings.allow_bf16_reduced_precision_reduction = True
    load_for_inference(checkpoint)
    assert not settings.allow_fp16_reduced_precision_reduction
    assert not settings.allow_bf16_reduced_precision_reduction
