"""What trackers have after a run: recipe, plan, system figures, every step once, sampled pairs with their rewards."""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from helpers import pair_rows, write_jsonl

from rmtool.config import TrackConfig
from rmtool.errors import RmtoolError
from rmtool.planning.plan import make_plan
from rmtool.recipe import load_recipe
from rmtool.training import eval_samples, tracking, worker
from rmtool.training.tracking import Tracker, read_metrics
from rmtool.ui import TerminalUi

TENSORBOARD_STUB = """
class SummaryWriter:
    def __init__(self, folder, purge_step):
        print("open", folder, purge_step)
    def add_text(self, name, text, step):
        print("text", name, step)
    def add_scalar(self, name, value, step):
        print(name, value, step)
    def flush(self):
        pass
    def close(self):
        print("closed")
"""
ROWS = [{"step": step, "train/rm/loss": 0.5**step} for step in (1, 2, 3)]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(tracking, "FINISH_S", 60)


def train(causal_lm: Path, folder: Path, *overrides: tuple[str, Any]) -> list[str]:
    """Train in this process, as a launched process would; return what it said."""
    data = write_jsonl(folder / "pairs.jsonl", pair_rows(12))
    text = f"model: {{path: {causal_lm}}}\ndata: {{train: [{data}], holdout: 4}}\n"
    text += "train: {batch_size: 4, learning_rate: 1e-3}\n"
    (folder / "tiny.yaml").write_text(text)
    recipe = load_recipe(str(folder / "tiny.yaml"), [("train.eval_every", 1), ("track.wandb", True), *overrides])
    run, err = folder / "run", io.StringIO()
    run.mkdir(exist_ok=True)
    from rmtool.launch.supervise import _plan_json

    (run / tracking.PLAN_FILE).write_text(_plan_json(make_plan(recipe, run)))
    try:
        worker.run(recipe, run, Accelerator(cpu=True), TerminalUi(io.StringIO(), err))
    finally:
        (folder / "said").write_text(err.getvalue())
    return err.getvalue().splitlines()


def wandb_records(path: Path) -> Iterator[Any]:
    """Yield the records of an offline run: after a header of 7 bytes blocks as in LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.mark.slow
def test_an_offline_run_of_wandb_has_recipe_plan_system_steps_and_samples(causal_lm: Path, tmp_path: Path) -> None:
    pairs = [pair_rows(1)[0] | {"prompt": "x" * 5000}]
    eval_data = write_jsonl(tmp_path / "eval.jsonl", pair_rows(40)[8:] + pairs)
    said = train(causal_lm, tmp_path, ("data.holdout", 0), ("data.eval", [str(eval_data)]), ("data.max_length", 8000))
    assert any("wandb: offline (WANDB_MODE=offline)" in line for line in said)
    [path] = tmp_path.glob("run/wandb/offline-run-*/*.wandb")
    records = list(wandb_records(path))
    config = {item.key: json.loads(item.value_json) for each in records for item in each.run.config.update}
    assert config["train"]["batch_size"] == 4
    assert config["plan"]["global batch size"] == "4 pairs (4 per process)"
    assert config["system"]["world_size"] == 1
    assert config["system"]["versions"].keys() >= {"rmtool", "torch", "transformers", "accelerate", "python"}
    assert config["system"]["devices"][0].startswith("CPU, ")
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in each.history.item}
        for each in records
        if each.history.item
    ]
    metrics = read_metrics(tmp_path / "run")
    assert [row["_step"] for row in rows] == [row["step"] for row in metrics] == [1, 2, 3]
    for row, logged in zip(rows, metrics, strict=True):
        assert {name: row[name] for name in logged} == logged
    # wandb may start when the pairs of earlier evaluations have been replaced.
    data = json.loads((path.parent / "files" / rows[-1]["eval/samples.path"]).read_text())
    assert data["columns"] == list(eval_samples.COLUMNS)
    assert len(data["data"]) == eval_samples.SAMPLES == 32
    texts = [cell for line in data["data"] for cell in line if isinstance(cell, str)]
    assert all(len(text) <= eval_samples.MAX_TEXT + 3 for text in texts)
    written = [json.loads(line) for line in (tmp_path / "run/eval_samples.jsonl").read_text().splitlines()]
    assert [line[3:5] for line in data["data"]] == [[row["chosen_reward"], row["rejected_reward"]] for row in written]
    assert any(each.WhichOneof("record_type") == "stats" for each in records) or any(
        each.environment.host for each in records
    )


@pytest.mark.slow
def test_sampled_rewards_are_those_of_the_saved_model(causal_lm: Path, tmp_path: Path) -> None:
    from rmtool.data.rejects import Rejects
    from rmtool.dataset.split import load_split
    from rmtool.model.loading import load_for_inference, training_encoder
    from rmtool.model.rewards import compute_rewards
    from rmtool.ui import SilentUi

    train(causal_lm, tmp_path, ("track.wandb", False))
    recipe = load_recipe(str(tmp_path / "tiny.yaml"))
    split = load_split(recipe, training_encoder(recipe, causal_lm)[0], Rejects(), SilentUi())
    model = load_for_inference(tmp_path / "run" / "model").model
    with SilentUi().progress("", 0, "") as bar:
        rewards = compute_rewards(model, split.eval.groups, 4096, bar)
    rows = [json.loads(line) for line in (tmp_path / "run/eval_samples.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    for row, values, record in zip(rows, rewards, split.eval_records.records(), strict=True):
        assert [row["chosen_reward"], row["rejected_reward"]] == pytest.approx(values, abs=1e-5)
        assert row["prompt"] == f"user: {record.prompt[0].content}"
        assert [row["chosen"], row["rejected"]] == [response[0].content for response in record.responses]


@pytest.mark.slow
@pytest.mark.parametrize("api_key", [None, "0" * 40], ids=["unreachable at the start", "nothing listens"])
def test_a_strict_run_without_its_tracker_takes_no_step(
    causal_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api_key: str | None
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    if api_key:
        monkeypatch.setenv("WANDB_API_KEY", api_key)
    with pytest.raises(RmtoolError) as caught:
        train(causal_lm, tmp_path, ("track.strict", True))
    assert caught.value.id == "E0702"
    assert ("Connection refused" in caught.value.what) == bool(api_key)
    assert (tmp_path / "run/metrics.jsonl").read_text() == ""
    assert not (tmp_path / "run/model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_a_tracker_that_ends_during_the_run_costs_no_model(
    causal_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    def log(self: Tracker, numbers: Any) -> None:
        self.processes[0].process.kill()
        self.processes[0].process.wait()
        plain_log(self, numbers)

    plain_log = Tracker.log
    monkeypatch.setattr(Tracker, "log", log)
    if strict:
        with pytest.raises(RmtoolError, match="wandb ended") as caught:
            train(causal_lm, tmp_path, ("track.strict", True))
        assert caught.value.id == "E0702"
    else:
        train(causal_lm, tmp_path)
    assert (tmp_path / "said").read_text().count("wandb ended, metrics.jsonl only") == 1
    assert (tmp_path / "run/model/rmtool.json").exists()
    assert len(read_metrics(tmp_path / "run")) == 2


def test_samples_are_those_of_the_step_and_shortened(tmp_path: Path) -> None:
    row = dict.fromkeys(eval_samples.COLUMNS, 0.5) | {"prompt": "x" * 5000}
    assert eval_samples.read_samples(tmp_path, 3) == []
    eval_samples.write_samples(tmp_path, [row | {"step": 3}])
    assert eval_samples.read_samples(tmp_path, 2) == []
    assert eval_samples.read_samples(tmp_path, 3) == [["x" * 2000 + "...", *[0.5] * 5]]


def tensorboard(folder: Path, resumed: bool = False, stub: str | None = None) -> list[str]:
    """Track three steps, or the third of a resumed run; return the notices."""
    err = io.StringIO()
    config = {"name": "x", "train": {"seed": 7}, "system": {"world_size": 1}}
    ui = TerminalUi(io.StringIO(), err)
    tracker = Tracker(folder, TrackConfig(tensorboard=True), config, ui, resumed)
    for row in ROWS[2:] if resumed else ROWS:
        tracker.log(row)
    tracker.close()
    return err.getvalue().splitlines()


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace torch by a package that has only this SummaryWriter."""

    def use(text: str) -> None:
        folder = tmp_path / "stub" / "torch" / "utils"
        (folder / "tensorboard").mkdir(parents=True)
        for package in (folder.parent, folder):
            (package / "__init__.py").write_text("")
        (folder / "tensorboard" / "__init__.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'stub'}:{os.environ.get('PYTHONPATH', '')}")

    return use


def test_tensorboard_gets_every_metric_and_the_recipe(stub: Any, tmp_path: Path, capfd: Any) -> None:
    stub(TENSORBOARD_STUB)
    assert tensorboard(tmp_path) == [f"TensorBoard: tensorboard --logdir {tmp_path}/tensorboard"]
    texts = ["text recipe 0", "text system 0"]
    scalars = [f"train/rm/loss {row['train/rm/loss']} {row['step']}" for row in ROWS]
    shown = capfd.readouterr().err.splitlines()
    assert shown == [f"open {tmp_path}/tensorboard None", *texts, *scalars, "closed"]


def test_a_resumed_run_replaces_the_steps_that_tensorboard_has(stub: Any, tmp_path: Path, capfd: Any) -> None:
    stub(TENSORBOARD_STUB)
    write_jsonl(tmp_path / tracking.METRICS_FILE, ROWS[:2])
    tensorboard(tmp_path, resumed=True)
    shown = capfd.readouterr().err.splitlines()
    assert shown[0] == f"open {tmp_path}/tensorboard 3"
    assert [line for line in shown if line.startswith("train")] == ["train/rm/loss 0.125 3"]


@pytest.mark.parametrize(
    ("text", "notice"),
    [
        ("raise ImportError('protobuf')", "cannot start TensorBoard, metrics.jsonl only: protobuf"),
        (
            TENSORBOARD_STUB.replace("print(name, value, step)", "raise OSError(28, 'No space left on device')"),
            "cannot log to TensorBoard, metrics.jsonl only: [Errno 28] No space left on device",
        ),
    ],
    ids=["import", "full disk"],
)
def test_a_failure_of_tensorboard_is_said_once(stub: Any, tmp_path: Path, text: str, notice: str) -> None:
    stub(text)
    assert [line for line in tensorboard(tmp_path) if "metrics.jsonl only" in line] == [notice]
    assert read_metrics(tmp_path) == ROWS


@pytest.mark.slow
def test_tensorboard_reads_the_files_of_a_resumed_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tensorboard(tmp_path)
    write_jsonl(tmp_path / tracking.METRICS_FILE, ROWS[:2])
    tensorboard(tmp_path, resumed=True)
    found = EventAccumulator(str(tmp_path / tracking.TENSORBOARD)).Reload()
    assert [(each.step, each.value) for each in found.Scalars("train/rm/loss")] == [(1, 0.5), (2, 0.25), (3, 0.125)]
    texts = [found.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0] for name in ("recipe", "system")]
    assert b'"seed": 7' in texts[0]
    assert b'"world_size": 1' in texts[1]


def test_tensorboard_that_is_not_installed_is_an_error_of_the_plan(
    rmtool: Any, causal_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(8))
    command = ("train", "--model", causal_lm, "--data", data, "--dry-run", "--set", "data.holdout=0")
    monkeypatch.setattr("rmtool.packages.version_of", lambda name: None)
    shown = rmtool(*command, "--set", "track.tensorboard=true")
    assert (shown.code, shown.error) == (5, "E0507")
