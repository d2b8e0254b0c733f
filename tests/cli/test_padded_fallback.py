"""A model that cannot share prompts: said in the plan, in the result and in the last line, not only in passing."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, pair_rows, save_reward_model, write_jsonl
from transformers import NemotronConfig

from rmtool.checkpoint import Manifest
from rmtool.cli.train import print_result
from rmtool.packing.prefix_sharing import describe_sharing
from rmtool.planning.estimate import estimate_resources
from rmtool.planning.plan import make_plan
from rmtool.recipe import load_recipe
from rmtool.ui import TerminalUi

sys.path.insert(0, str(ROOT / "scripts"))
import bench_score
import benchlib

REASON = "the model does not pass keyword arguments to its attention layers"
OFF = f"prefix sharing: off, using padded batches ({REASON})"


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A reward model whose attention layers get no layout."""
    return save_reward_model(tmp_path_factory.mktemp("nemotron"), NemotronConfig, tokenizer, seed=0)


def test_eval_ends_with_it(rmtool: Any, nemotron: Path, checkpoint: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(3))
    shown = rmtool("eval", nemotron, "--data", data, "--samples", 0)
    assert shown.err.splitlines()[-1] == f"note: {OFF}"
    found = json.loads(rmtool("eval", nemotron, "--data", data, "--json").out)
    assert (found["prefix_sharing"], found["padded_reason"]) == (False, REASON)
    shared = rmtool("eval", checkpoint, "--data", data, "--json")
    assert "prefix sharing" not in shared.err
    found = json.loads(shared.out)
    assert (found["prefix_sharing"], found["padded_reason"]) == (True, None)


def test_score_ends_with_it(rmtool: Any, nemotron: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "a", "response": "b"}])
    shown = rmtool("score", data, "--model", nemotron)
    assert shown.err.splitlines()[-1] == f"note: {OFF}"
    found = json.loads(rmtool("score", data, "--model", nemotron, "--json", "--overwrite").out)
    assert (found["prefix_sharing"], found["padded_reason"]) == (False, REASON)


@pytest.mark.parametrize(("reason", "line"), [(REASON, OFF), (None, "prefix sharing: on")])
def test_the_result_of_training_ends_with_it(
    reason: str | None, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Manifest("", 1, "fp32", "error", "error", "r", "m", [], reason)
    print_result(tmp_path, {"eval/rm/accuracy": 0.5}, manifest.padded_reason, TerminalUi())
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_a_dry_run_foresees_it(nemotron: Path, checkpoint: Path) -> None:
    recipe = load_recipe("smollm2-135m")
    for folder, reason in ((nemotron, REASON), (checkpoint, None)):
        seen = estimate_resources(recipe, folder, None, None)
        row = dict(seen.rows())["prefix sharing"]
        assert row == (describe_sharing(reason) if reason else "on (verified when the model is loaded)")
        assert (seen.as_dict()["prefix_sharing"], seen.as_dict()["padded_reason"]) == (reason is None, reason)


FASTER = "fp32 (bf16 is several times faster on this CPU: --set train.precision=bf16)"
LACKING = "bf16 (not supported by this CPU: computed in fp32)"


@pytest.mark.parametrize(
    ("lacks", "device", "precision", "told"),
    [
        (False, None, "fp32", "fp32"),  # AVX-512 with bf16
        (False, None, "bf16", "bf16"),
        (False, "this CPU", "fp32", FASTER),  # AMX
        (False, "this CPU", "bf16", "bf16"),
        (True, None, "fp32", "fp32"),
        (True, None, "bf16", LACKING),
    ],
)
def test_the_plan_says_which_precision_is_fast_here(
    lacks: bool, device: str | None, precision: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmtool.model.precision.lacks_bf16", lambda: lacks)
    monkeypatch.setattr("rmtool.model.precision.fast_bf16_device", lambda: device)
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(8))
    recipe = load_recipe("debug", [("data.train", [str(data)]), ("data.holdout", 2)])
    recipe = replace(recipe, train=replace(recipe.train, precision=precision))
    assert dict(make_plan(recipe, tmp_path / "run").rows())["precision"] == told


def test_a_benchmark_measures_it_and_says_so(nemotron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rows", "sample"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "a b c", "responses": ["b", "c d"]}])
    (tmp_path / "model").symlink_to(nemotron)
    monkeypatch.setattr(benchlib, "_events", events := io.StringIO())
    spec = {"device": "cpu", "folder": str(tmp_path), "scratch": str(tmp_path), "precision": "fp32", "max_length": 64}
    bench_score.WORKERS["rmtool"]({**spec, "tokens_per_pack": 512, "compile": False, "size": None})
    told = [json.loads(line) for line in events.getvalue().splitlines()]
    assert [event["event"] for event in told] == ["padded", "scored"]
    [note] = benchlib.layout_notes(benchlib.padded_reason(told))
    assert note.startswith(OFF)
    assert benchlib.layout_notes(benchlib.padded_reason(told[1:])) == []
