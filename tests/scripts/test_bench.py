"""The benchmarks' own arithmetic, and their rmtool workers on a tiny model, so that the scripts do not rot."""

from __future__ import annotations

import io
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_cost
import bench_score
import bench_train
import benchlib
import pytest
import simulate_scale
from helpers import ROOT, pair_rows, write_jsonl

Work = Callable[[Callable[[Any], None], dict[str, Any]], list[dict[str, Any]]]


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Work:
    """Run a worker function in this process; returns its events."""

    def run(worker: Callable[[Any], None], spec: dict[str, Any]) -> list[dict[str, Any]]:
        stream = io.StringIO()
        monkeypatch.setattr(benchlib, "_events", stream)
        worker({"device": "cpu", "scratch": str(tmp_path), "folder": str(tmp_path), "seed": 0, **spec})
        return [json.loads(line) for line in stream.getvalue().splitlines()]

    return run


@pytest.fixture
def saved(work: Work, causal_lm: Path, tmp_path: Path) -> dict[str, Any]:
    """What the checkpoint in tmp_path/model is made of."""
    spec = {"model": str(causal_lm), "checkpoint": str(tmp_path / "model"), "random_llama": None, "save_dtype": "fp32"}
    return work(benchlib.save_checkpoint, spec)[0]


def test_spread_is_the_median_and_the_extremes() -> None:
    assert benchlib.spread([3.0, 1.0, 2.0, 10.0]) == benchlib.Spread(2.5, 1.0, 10.0, 4)
    assert str(benchlib.spread([0.5])) == "0.5 (0.5 to 0.5, n=1)"
    with pytest.raises(ValueError, match="no measurements"):
        benchlib.spread([])


def test_ratio_compares_only_the_same_work() -> None:
    ours, theirs = {(1, 0): 2.0, (1, 1): 1.0, (2, 0): 9.0}, {(1, 0): 6.0, (1, 1): 5.0, (3, 0): 1.0}
    assert benchlib.ratio(ours, theirs) == benchlib.Spread(4.0, 3.0, 5.0, 2)


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (0.0312, "0.0312"), (1.234, "1.23"), (99.94, "99.9"), (1234.5, "1,234")]
)
def test_digits_keep_three_figures(value: float, shown: str) -> None:
    assert benchlib.digits(value) == shown


def test_tokens_padded_packed_and_shared() -> None:
    rows = [[5, 6], [9, 7], [2, 3]]
    assert benchlib.count_tokens(rows, 20, 2) == benchlib.Tokens(4 * 9 + 2 * 3, 32, 20)
    assert benchlib.count_tokens(rows, 20, 1).padded == 2 * 6 + 2 * 9 + 2 * 3
    assert benchlib.Tokens(60, 32, 20).per(2) == ["30.0", "16.0", "10.0"]


def test_a_table_aligns_numbers_on_the_right() -> None:
    lines = benchlib.table("Title", ("", "n"), [("one", "1"), ("two", "100")]).splitlines()
    assert lines == ["", "Title", "", "       n", "---  ---", "one    1", "two  100"]


def test_peer_batches() -> None:
    assert bench_train.peer_batches("auto", 16) == [16, 8, 4, 2, 1]
    assert bench_train.peer_batches("auto", 6) == [6, 3]
    assert bench_train.peer_batches("4", 16) == [4]
    for wrong in ("5", "0", "x"):
        with pytest.raises(benchlib.BenchError, match="divides"):
            bench_train.peer_batches(wrong, 16)


def test_sorted_batches_keep_the_budget_and_every_item() -> None:
    lengths = [3, 50, 7, 7, 20, 1]
    batches = list(bench_score.sorted_batches(lengths, 21))
    assert sorted(item for batch in batches for item in batch) == list(range(6))
    assert all(len(batch) == 1 or len(batch) * max(lengths[item] for item in batch) <= 21 for batch in batches)


def test_rows_are_filled_up_with_answers_to_other_prompts() -> None:
    groups = bench_score.group_answers([("p", ["a", "b"]), ("q", ["c"]), ("p", ["b", "d"]), ("r", ["e", "f"])])
    assert groups == {"p": ["a", "b", "d"], "q": ["c"], "r": ["e", "f"]}
    for prompt, answers, strangers in bench_score.fill_up(groups, 3, random.Random(0)):
        assert len(set(answers)) == 3
        own = groups[prompt][:3]
        assert answers[: len(own)] == own
        assert strangers == 3 - len(own)


def test_the_line_through_points_on_a_line() -> None:
    points = [(float(tokens), 0.5 + 0.01 * tokens) for tokens in (1024, 4096, 65536)]
    line = bench_cost.fit_line(points)
    assert line == pytest.approx((0.5, 0.01))
    assert bench_cost.off_the_line((1000.0, 1.1 * 10.5), line) == pytest.approx(0.1)


def test_workers_train_on_the_same_pairs_in_the_same_order(work: Work, saved: dict[str, Any], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", pair_rows(12))
    pairs = work(bench_train.write_pairs, {"data": str(data), "pairs": 6, "max_length": 128})[0]
    visited = benchlib.read_jsonl(tmp_path / "visited.jsonl")
    assert sorted(map(str, visited)) == sorted(map(str, benchlib.read_jsonl(tmp_path / "pairs.jsonl")))
    assert len(pairs["lengths"]) == 6
    spec = {"batch_size": 2, "max_length": 128, "precision": "fp32", "tokens_per_pack": 64, "steps": 3, "liger": "auto"}
    spec["compile"] = False
    start, *steps = work(bench_train.train_with_rmtool, spec)
    assert start["event"] == "start"
    assert [step["pairs"] for step in steps] == [2, 2, 2]
    assert sum(step["tokens"] for step in steps) <= sum(length for row in pairs["lengths"] for length in row)
    assert all(step["seconds"] > 0 and step["memory"] > 0 and step["tokens"] > 0 for step in steps)
    assert steps[0]["loss"] == pytest.approx(_plain_loss(tmp_path / "model", visited[:2]), abs=1e-5)
    assert saved["parameters"] > saved["matrix_parameters"] > 0


def _plain_loss(folder: Path, pairs: list[dict[str, Any]]) -> float:
    """The loss of these pairs in plain transformers, one conversation at a time."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def reward(chat: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")["input_ids"]).logits

    margins = torch.cat([reward(pair["chosen"]) - reward(pair["rejected"]) for pair in pairs])
    return -torch.nn.functional.logsigmoid(margins).mean().item()


@pytest.mark.parametrize("responses", [2, 4])
def test_all_ways_to_score_agree(work: Work, saved: dict[str, Any], tmp_path: Path, responses: int) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", pair_rows(8))
    wanted = {"responses": responses, "count": 8, "min_prompt": 0, "max_length": 256, "sample": responses}
    rows = work(bench_score.write_rows, {**wanted, "data": str(data)})[0]
    assert {len(row) for row in rows["lengths"]} == {responses}
    assert rows["paired"] == (0 if responses == 2 else 4)
    spec = {"precision": "fp32", "max_length": 256, "tokens_per_pack": 512, "compile": False}
    sizes = {"rmtool": None, "pipeline": 3, "sorted": 200}
    found = {name: work(bench_score.WORKERS[name], {**spec, "size": size})[0] for name, size in sizes.items()}
    for name in ("pipeline", "sorted"):
        assert found[name]["rewards"] == pytest.approx(found["rmtool"]["rewards"], abs=1e-4)
    assert len(found["rmtool"]["rewards"]) == 8
    assert 0 < found["rmtool"]["tokens"] < sum(map(sum, rows["lengths"]))
    tuned = work(bench_score.WORKERS["tune-sorted"], {**spec, "candidates": [64, 256]})
    assert [event["candidate"] for event in tuned] == [64, 256]


def test_steps_of_growing_size_are_timed(work: Work, saved: dict[str, Any], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", pair_rows(12))
    spec = {"data": str(data), "precision": "fp32", "max_length": 256, "tokens_per_pack": 256}
    events = work(bench_cost.time_steps, {**spec, "sizes": [128, 512], "repeats": 2})
    assert [event["size"] for event in events] == [128, 512, 128, 512]
    points = bench_cost.median_points(events)
    assert points[1][0] > 3 * points[0][0]
    bench_cost.draw(tmp_path / "cost.png", events, bench_cost.fit_line(points))
    assert (tmp_path / "cost.png").stat().st_size > 1000


@pytest.mark.parametrize("way", list(bench_cost.WAYS))
def test_planning_many_records(work: Work, way: str) -> None:
    event = work(bench_cost.plan_records, {"records": 300, "batch_size": 16, "tokens_per_pack": 2048, "way": way})[0]
    assert (event["packs"] > 10) == (way != "making the trees")


@pytest.mark.slow
def test_the_training_benchmark_from_end_to_end(causal_lm: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", pair_rows(12))
    result = _bench("bench_train.py", "--model", causal_lm, "--data", data, "--json", tmp_path / "result.json")
    assert result.returncode == 0, result.stderr
    assert "Training causal_lm" in result.stdout
    report = json.loads((tmp_path / "result.json").read_text())
    assert report["peak_gflops"] > 0
    assert [len(run["steps"]) for run in report["runs"]] == [2]
    assert 0 < report["fraction_of_peak"]["rmtool"] < 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "result.json", "tmp"]
    assert not list((tmp_path / "tmp").iterdir()), "the temporary folder is left behind"


@pytest.mark.slow
def test_mistakes_and_failed_workers_are_said(causal_lm: Path, tmp_path: Path) -> None:
    missing = _bench("bench_train.py", "--model", causal_lm, "--data", tmp_path / "none.jsonl")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "none.jsonl" in missing.stderr
    data = write_jsonl(tmp_path / "few.jsonl", pair_rows(2))
    few = _bench("bench_train.py", "--model", causal_lm, "--data", data)
    assert few.returncode == 2
    assert "only 2 usable pairs, 4 wanted" in few.stderr
    assert "Traceback" not in few.stderr


def _bench(script: str, *options: object) -> subprocess.CompletedProcess[str]:
    """A benchmark of rmtool alone, two steps of two pairs, its temporary files in a folder beside the data."""
    import os

    data = Path(str(options[list(options).index("--data") + 1]))
    (data.parent / "tmp").mkdir(exist_ok=True)
    small = (
        "--without-peers",
        "--steps",
        "1",
        "--rounds",
        "1",
        "--batch-size",
        "2",
        "--max-length",
        "128",
        "--cores",
        "1",
    )
    command = [sys.executable, str(ROOT / "scripts" / "bench" / script), *map(str, options), *small]
    environment = {**os.environ, "TMPDIR": str(data.parent / "tmp")}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def test_simulated_ranks_wait_for_the_heaviest_pair_and_for_the_network(
    causal_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*pair_rows(40), {"prompt": "p", "chosen": "word " * 200, "rejected": "other"}]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    measured = {"line": [0.1, 0.01], "points": [[90, 1.0], [190, 2.0]]}
    (tmp_path / "cost.json").write_text(json.dumps(measured))
    words = ["--measured", str(tmp_path / "cost.json"), "--data", str(tmp_path / "pairs.jsonl"), "--config",
             str(causal_lm), "--tokenizer", str(causal_lm), "--gpus", "1", "16", "--pairs-per-gpu", "4",
             "--pairs-per-step", "64", "--json", str(tmp_path / "out.json")]  # fmt: skip
    assert simulate_scale.main(simulate_scale.parse(words)) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    alone, many = found["64 pairs per step, 1 GPUs"], found["64 pairs per step, 16 GPUs"]
    assert all(step["slowest"] == 1.0 and step["network"] == 0.0 for step in alone)
    assert all(step["slowest"] >= max(1.0, step["one_pair"]) and step["network"] > 0 for step in many)
    assert max(step["one_pair"] for step in many) > 2.0  # the long pair was drawn, and nobody can cut it
    assert statistics.median(s["compute"] for s in many) < statistics.median(s["compute"] for s in alone)
    assert "a pack costs 10 tokens more than it has" in capsys.readouterr().out


def test_a_ring_passes_the_slowest_link() -> None:
    machine = simulate_scale.Machine(1.0, 1.0, nvlink=100.0, nic=5.0, hop_within=1.0, hop_between=10.0)
    assert machine.collective(800.0, 0, 8) == pytest.approx(800 * 7 / 8 / 100)
    assert machine.collective(800.0, 0, 16) == pytest.approx(800 * 15 / 16 / 40)  # eight adapters carry eight rings
    assert machine.collective(0.0, 3, 16) == pytest.approx(3 * (14 * 1.0 + 2 * 10.0))


def test_what_was_measured_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(benchlib.BenchError, match=r"bench_cost\.py steps --json"):
        simulate_scale.read_measured(tmp_path / "cost.json")
