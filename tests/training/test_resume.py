"""An interrupted run, resumed: bit-identical to one that was not interrupted, or refused with what changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from helpers import ROOT, Lines, pair_rows, write_jsonl
from same_run import assert_same_run, rows, weights

from rmtool.checkpoint import MANIFEST
from rmtool.config import Recipe
from rmtool.data.rejects import Rejects
from rmtool.dataset.split import load_split
from rmtool.errors import RmtoolError, Stopped
from rmtool.launch.run_folder import begin
from rmtool.model.loading import training_encoder
from rmtool.planning.plan import make_plan
from rmtool.recipe import CONFIG_FILE, as_dict, dump_recipe, load_recipe
from rmtool.training import resume, worker
from rmtool.training.checkpoint_writer import CheckpointWriter
from rmtool.training.engine import Engine
from rmtool.training.pack_budget import read_pack_budget, write_pack_budget
from rmtool.training.saver import Saver
from rmtool.training.snapshots import Snapshots
from rmtool.ui import SilentUi

Set = list[tuple[str, Any]]


def make_inputs(root: Path, causal_lm: Path, **train: Any) -> Path:
    """Write a base model, data and a recipe; return the recipe."""
    shutil.copytree(causal_lm, root / "lm")
    data = write_jsonl(root / "pairs.jsonl", [row | {"margin": 0.5} for row in pair_rows(22)])
    settings = {"batch_size": 4, "learning_rate": 1e-3, "epochs": 2, "eval_every": 2, "tokens_per_pack": 300}
    settings |= {"save_every": 1, "keep": "best", **train}
    path = root / "tiny.yaml"
    text = f"model: {{path: {root}/lm}}\ndata: {{train: [{data}], holdout: 4, max_length: 256}}\ntrain: "
    path.write_text(text + json.dumps(settings))
    return path


def train(recipe: Recipe, folder: Path) -> list[str]:
    """Run a training process here; return what it says."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(dump_recipe(recipe))
    ui = Lines()
    worker.run(recipe, folder, Accelerator(cpu=True), ui)
    return ui.lines


class Killed(BaseException):
    """In place of SIGKILL: nothing of rmtool handles it."""


def train_until(recipe: Recipe, folder: Path, step: int) -> None:
    """Train, and stop after the snapshot of this step."""
    save = Saver.save

    def save_and_stop(self: Saver) -> None:
        save(self)
        if self.progress.step == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "save", save_and_stop)
        with pytest.raises(Killed):
            train(recipe, folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, causal_lm: Path) -> Path:
    """A recipe, an uninterrupted run of it (alone), and one that was killed after step 7 (killed)."""
    root = tmp_path_factory.mktemp("resume")
    recipe = load_recipe(str(make_inputs(root, causal_lm)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RMTOOL_CACHE", str(root / "cache"))
        train(recipe, root / "alone")
        train_until(recipe, root / "killed", 7)  # in the middle of the second epoch
    return root


@pytest.fixture
def killed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all that may be changed: `lm`, `pairs.jsonl`, the recipe, and `run`, which was killed after step 7."""
    for name in ("lm", "killed"):
        shutil.copytree(root / name, tmp_path / name)
    (tmp_path / "killed").rename(tmp_path / "run")
    shutil.copy(root / "pairs.jsonl", tmp_path)
    (tmp_path / "tiny.yaml").write_text((root / "tiny.yaml").read_text().replace(str(root), str(tmp_path)))
    monkeypatch.setenv("RMTOOL_CACHE", str(root / "cache"))
    return tmp_path


def load(place: Path, *overrides: tuple[str, Any]) -> Recipe:
    return load_recipe(str(place / "tiny.yaml"), overrides)


def test_a_killed_run_goes_on_bit_for_bit(killed: Path, root: Path) -> None:
    """From other folders than before: what is in the files is compared."""
    with open(killed / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 8}\n{"st')  # steps after the snapshot, and a torn line
    (killed / "run/best-step-99").mkdir()  # of a step that is taken again
    said = train(load(killed), killed / "run")
    assert_same_run(killed / "run", root / "alone")
    line = next(line for line in said if "resuming" in line)
    assert line.startswith("resuming from step 7 of 10 (snapshot verified: ")
    assert line.endswith("data, recipe, model, tokenizer and versions unchanged)")


def test_a_lost_metrics_file_is_restored_from_the_snapshot(killed: Path, root: Path) -> None:
    (killed / "run/metrics.jsonl").unlink()
    train(load(killed), killed / "run")
    assert rows(killed / "run") == rows(root / "alone")


def test_a_damaged_snapshot_costs_one_step(killed: Path, root: Path) -> None:
    (killed / "run/snapshots/step-00000007/state/.metadata").write_bytes(b"not a pickle")
    said = train(load(killed), killed / "run")
    assert "step-00000007 is corrupted (state/.metadata has 12 bytes instead of " in said[0]
    assert any("resuming from step 6" in line for line in said)
    assert_same_run(killed / "run", root / "alone")


def test_without_a_valid_snapshot_the_run_starts_again_and_nothing_is_lost(killed: Path, root: Path) -> None:
    for path in (killed / "run/snapshots").iterdir():
        (path / "progress.json").write_text("{}")
    before = (killed / "run/metrics.jsonl").read_bytes()
    (killed / "run/previous").mkdir()
    said = train(load(killed), killed / "run")
    assert any("starting at step 1" in line and "previous-2" in line for line in said)
    assert (killed / "run/previous-2/metrics.jsonl").read_bytes() == before
    assert len(list((killed / "run/previous-2/snapshots").iterdir())) == 2
    assert weights(killed / "run") == weights(root / "alone")


def test_an_evaluation_that_was_interrupted_is_done_first(killed: Path, root: Path) -> None:
    """The row of its step is logged once, with the evaluation."""
    shutil.rmtree(killed / "run")
    recipe = load(killed)

    def interrupted(trainer: Any, held_out: Any, ui: Any, stopping: Any, log_samples: Any) -> dict[str, float]:
        stopping.reason = "SIGTERM"
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rmtool.training.trainer.run_eval", interrupted)
        with pytest.raises(Stopped) as caught:
            train(recipe, killed / "run")
    assert caught.value.exit_code == 75
    assert [row["step"] for row in rows(killed / "run")] == [1]
    train_until(recipe, killed / "run", 3)
    [done] = (killed / "run/snapshots").glob("step-*3/progress.json")
    assert json.loads(done.read_text())["progress"]["pending"] is None  # not again
    train(recipe, killed / "run")
    assert_same_run(killed / "run", root / "alone")


def test_snapshots_are_deleted_after_the_model_is_saved(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(CheckpointWriter, "finish", full)
    with pytest.raises(OSError, match="no space left"):
        train(load(killed), killed / "run")
    assert Snapshots(killed / "run", 2).steps() == [9, 8]  # none after the last step


def test_a_disk_without_room_is_an_error_before_the_first_step(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(killed / "run")
    monkeypatch.setattr("rmtool.training.snapshots.free_bytes", lambda folder: 0)
    with pytest.raises(RmtoolError) as caught:
        train(load(killed), killed / "run")
    assert caught.value.id == "E0502"
    assert not (killed / "run/metrics.jsonl").exists()


def test_steps_that_were_skipped_before_a_resume_count(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For train.max_skips, and in the report."""
    shutil.rmtree(killed / "run")
    recipe, update, norms = load(killed, ("train.on_nonfinite", "skip"), ("train.max_skips", 1)), Engine.update, []

    def fail_at(step: int) -> None:
        def failing(self: Engine, rate: float) -> float:
            norms.append(update(self, rate))
            return float("nan") if len(norms) == step else norms[-1]

        monkeypatch.setattr(Engine, "update", failing)

    fail_at(2)
    train_until(recipe, killed / "run", 3)
    fail_at(5)
    with pytest.raises(RmtoolError) as caught:
        train(recipe, killed / "run")
    assert caught.value.id == "E0802"
    assert "step 5: the gradient norm is NaN or inf, and 1 steps before it were skipped" in caught.value.what
    monkeypatch.setattr(Engine, "update", update)
    train(recipe, killed / "run")
    assert [each["step"] for each in json.loads((killed / "run/report.json").read_text())["skipped_steps"]] == [2]


# What changed.


def edit(path: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    change(found)
    write_jsonl(path, found)


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def another_version(place: Path, patch: pytest.MonkeyPatch) -> Set:
    version = resume.version_of
    patch.setattr(resume, "version_of", lambda name: "9.9" if name == "torch" else version(name))
    return []


def in_files(change: Callable[[Path], Any]) -> Callable[[Path, pytest.MonkeyPatch], Set]:
    def changed(place: Path, patch: pytest.MonkeyPatch) -> Set:
        change(place)
        return []

    return changed


def in_recipe(*overrides: tuple[str, Any]) -> Callable[[Path, pytest.MonkeyPatch], Set]:
    return lambda place, patch: list(overrides)


def more_data(place: Path, patch: pytest.MonkeyPatch) -> Set:
    write_jsonl(place / "more.jsonl", pair_rows(3))
    return [("data.train", [str(place / "pairs.jsonl"), str(place / "more.jsonl")])]


CHANGES = {
    "a row is edited": (
        in_files(lambda place: edit(place / "pairs.jsonl", lambda rows: rows[3].update(chosen="other"))),
        "data.train[0]",
    ),
    "a row is added": (
        in_files(lambda place: edit(place / "pairs.jsonl", lambda rows: rows.append(pair_rows(40)[39]))),
        "data.train[0]",
    ),
    "two rows are swapped": (
        in_files(lambda place: edit(place / "pairs.jsonl", lambda rows: rows.reverse())),
        "data.train[0]",
    ),
    "a margin is edited": (
        in_files(lambda place: edit(place / "pairs.jsonl", lambda rows: rows[3].update(margin=9.0))),
        "data.train[0]",
    ),
    "data is added": (more_data, "data.train[1]"),
    "held-out pairs": (in_recipe(("data.holdout", 5)), "data.holdout"),
    "learning rate": (in_recipe(("train.learning_rate", 2e-3)), "train.learning_rate"),
    "batch size": (in_recipe(("train.batch_size", 5)), "train.batch_size"),
    "seed": (in_recipe(("train.seed", 1)), "train.seed"),
    "epochs": (in_recipe(("train.epochs", 3)), "train.epochs"),
    "loss": (in_recipe(("train.loss", "hinge")), "train.loss"),
    "precision": (in_recipe(("train.precision", "bf16")), "train.precision"),
    "adapters": (in_recipe(("lora.rank", 4)), "lora.rank"),
    "model config": (
        in_files(lambda place: edit_json(place / "lm/config.json", rms_norm_eps=1e-3)),
        "model config",
    ),
    "model weights": (in_files(lambda place: flip(place / "lm/model.safetensors")), "model weights"),
    "tokenizer": (
        in_files(lambda place: edit_json(place / "lm/tokenizer.json", truncation=None, added=1)),
        "tokenizer",
    ),
    "chat template": (
        in_files(lambda place: (place / "lm/chat_template.jinja").write_text("{{ messages }}")),
        "tokenizer",
    ),
    "tokenizer file": (
        in_files(lambda place: (place / "lm/tokenizer_config.json").rename(place / "lm/tokenizer_other.json")),
        "tokenizer",
    ),
    "score head": (in_files(lambda place: (place / "lm/value_head.bin").write_bytes(b"1")), "model weights"),
    "package version": (another_version, "version of torch"),
}


def begin_again(place: Path, overrides: Set, restart: bool = False) -> list[str]:
    """Do what the launcher does before it starts a process."""
    ui = Lines()
    begin(make_plan(load(place, *overrides), place / "run"), restart, ui)
    return ui.lines


def test_a_model_file_that_cannot_be_read_is_named(killed: Path) -> None:
    tokenizer = killed / "lm/tokenizer.json"
    tokenizer.unlink()
    (killed / "lm/tokenizer.json").symlink_to(killed / "lm/tokenizer.json")  # a loop: open fails
    with pytest.raises(RmtoolError) as caught:
        resume._hash([tokenizer])
    assert (caught.value.id, caught.value.exit_code) == ("E0501", 5)
    assert caught.value.what.startswith(f"cannot read {tokenizer}: ")


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_is_refused_by_name_before_a_process_starts(
    killed: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    change, expected = CHANGES[name]
    before = {path: path.read_bytes() for path in (killed / "run").rglob("*") if path.is_file()}
    overrides = change(killed, monkeypatch)
    with pytest.raises(RmtoolError) as caught:
        begin_again(killed, overrides)
    error = caught.value
    assert (error.id, error.exit_code) == ("E0603", 6)
    assert expected in error.what
    assert len(error.rows) == 1
    old, new = error.rows[0].removeprefix(f"{expected}: ").split(" -> ")
    assert old != new
    assert "--restart" in error.hint
    assert {path: path.read_bytes() for path in before} == before  # nothing is touched


def test_the_training_process_refuses_what_the_launcher_cannot_know(killed: Path) -> None:
    """The launcher does not tokenize; a template outside of the model's folder changes the ids."""
    (killed / "other.jinja").write_text(
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}{{ eos_token }}{% endfor %}"
    )
    changed = [("model.chat_template", str(killed / "other.jinja"))]
    begin_again(killed, changed)
    with pytest.raises(RmtoolError) as caught:
        train(load(killed, *changed), killed / "run")
    assert (caught.value.id, caught.value.exit_code) == ("E0603", 6)
    assert "training and eval pairs" in caught.value.what


HARMLESS: dict[str, Set] = {
    "tokens per pack": [("train.tokens_per_pack", 100)],
    "evaluations": [("train.eval_every", 3)],
    "tracking": [("track.project", "p"), ("track.name", "n")],
    "snapshots": [("train.save_every", 3), ("train.save_minutes", 1), ("train.keep_snapshots", 1)],
    "output": [("hub.repo_id", "a/b"), ("name", "other")],
    "cache": [("data.cache", False)],
    "a model on the Hub, which the training process compares": [("model.path", "me/model")],
    "processes and engine": [("launch.gpus_per_node", 2), ("launch.engine", "zero3")],
    "gradient checkpointing": [("train.gradient_checkpointing", True)],
}


def test_data_under_another_name_goes_on(killed: Path) -> None:
    (killed / "pairs.jsonl").rename(killed / "other.jsonl")
    assert begin_again(killed, [("data.train", [str(killed / "other.jsonl")])]) == []


@pytest.mark.parametrize("name", HARMLESS)
def test_what_may_change_goes_on(killed: Path, name: str) -> None:
    assert begin_again(killed, HARMLESS[name]) == []


def test_a_harmless_change_is_said_and_takes_the_same_steps(killed: Path, root: Path) -> None:
    recipe = load(killed, *HARMLESS["tokens per pack"], *HARMLESS["evaluations"])
    said = train(recipe, killed / "run")
    assert "changed since the snapshot: train.tokens_per_pack from 300 to 100" in said
    ours, theirs = rows(killed / "run"), rows(root / "alone")
    assert [row["train/rm/loss"] for row in ours] == pytest.approx([row["train/rm/loss"] for row in theirs], abs=1e-5)
    assert [row["step"] for row in ours if "eval/rm/loss" in row] == [2, 4, 6, 9, 10]


def test_every_recipe_key_is_compared_or_harmless_for_a_reason(killed: Path) -> None:
    plan = make_plan(load(killed), killed / "run")
    names = resume.identity(plan.recipe, plan.sources, None)
    keys = {
        f"{section}.{key}" for section, keys in as_dict(plan.recipe).items() if isinstance(keys, dict) for key in keys
    }
    assert keys <= names.keys()
    assert all(key in keys | as_dict(plan.recipe).keys() for key in resume.HARMLESS)
    assert all(resume.HARMLESS.values())


# Sorted by sections; all others are in `HARMLESS`.
DECIDES_STEPS = {
    "model": "weights head",
    "data": "holdout columns rating_margins max_pairs_per_prompt max_length on_long on_empty on_identical",
    "train": "batch_size learning_rate epochs max_steps seed schedule warmup_steps warmup_ratio weight_decay betas eps "
    "max_grad_norm use_margins loss label_smoothing center_rewards_coefficient freeze precision keep metric_for_best "
    "save_dtype",
    "lora": "rank alpha targets quantize",
}


def test_every_key_that_decides_the_steps_is_compared_and_no_other(killed: Path) -> None:
    known = resume.identity(load(killed), [None], None)
    changed = {name: "other" for name, value in known.items() if value is not None}
    compared = {name for name, *_ in resume.changes(known, changed) if "version" not in name}
    assert compared == {f"{section}.{key}" for section, keys in DECIDES_STEPS.items() for key in keys.split()}


@pytest.mark.parametrize("package", ["rmtool", "torch", "transformers", "accelerate", "deepspeed", "numpy"])
def test_every_package_that_decides_the_steps_is_compared(
    package: str, killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, known = resume.version_of, resume.identity(load(killed), [None], None)
    monkeypatch.setattr(resume, "version_of", lambda name: "9.9" if name == package else version(name))
    changed = resume.identity(load(killed), [None], None)
    assert resume.changes(known, changed) == [(f"version of {package}", version(package), "9.9")]


def test_random_weights_have_no_files_to_compare(killed: Path) -> None:
    recipe = load(killed, ("model.weights", "random"))
    known = resume.identity(recipe, [None], killed / "lm")
    flip(killed / "lm/model.safetensors")
    assert resume.identity(recipe, [None], killed / "lm") == known


def test_all_of_the_pairs_is_in_their_digest(killed: Path) -> None:
    """The launcher does not know the rows of a Hub dataset, and a process not those of another."""
    recipe = load(killed)
    encoder, _ = training_encoder(recipe, killed / "lm")
    split = load_split(recipe, encoder, Rejects(), SilentUi())

    def digest(split: Any) -> str:
        return worker._rank_fingerprint(recipe, killed / "lm", "", split)["data"]

    def edited(part: str, **values: Any) -> Any:
        data = getattr(split, part)
        rows = [replace(data.metadata[0], **values), *list(data.metadata)[1:]]
        return SimpleNamespace(**{**vars(split), part: SimpleNamespace(metadata=rows, groups=data.groups)})

    assert digest(edited("train")) == digest(split)
    first, held_out = split.train.metadata[0], split.eval.metadata[0]
    changed = [
        edited("train", margins=(9.0,)),
        edited("train", weight=2.0),
        edited("train", preferences=tuple((loser, winner) for winner, loser in first.preferences)),
        edited("eval", margins=(9.0,)),
    ]
    assert held_out.margins != (9.0,)
    assert digest(split) not in map(digest, changed)


# Starting again.


def test_restart_moves_everything_of_the_old_run(killed: Path) -> None:
    run = killed / "run"
    write_pack_budget(run, 300, 150)
    names = {path.name for path in run.iterdir()} - {".data-read", "rank-0.json"}
    assert names >= {"snapshots", "metrics.jsonl", "held_out.jsonl", "report.json", "config.yaml"}
    assert any(name.startswith("best-step-") for name in names)
    [said] = begin_again(killed, [], restart=True)
    assert "starting at step 1" in said
    assert {path.name for path in run.iterdir()} == {"previous"}
    assert {path.name for path in (run / "previous").iterdir()} == names


def test_a_run_without_snapshots_is_moved_and_that_is_said(killed: Path) -> None:
    run = killed / "run"
    shutil.rmtree(run / "snapshots")
    (run / "previous/model").mkdir(parents=True)
    write_pack_budget(run, 300, 150)  # of a run that was out of memory in its first steps
    before = (run / "metrics.jsonl").read_bytes()
    [said] = begin_again(killed, [])
    assert "has no snapshot: starting at step 1" in said
    assert (run / "previous-2/metrics.jsonl").read_bytes() == before
    assert (run / "previous/model").is_dir()
    assert read_pack_budget(run, 300) == 150
    (run / "metrics.jsonl").touch()
    assert begin_again(killed, []) == []  # there is nothing to move
    for name in ("best-step-3", "snapshots"):  # nor is either of these a step that another run could go on from
        (run / name).mkdir()
        [said] = begin_again(killed, [])
        assert "previous-" in said
    (run / "metrics.jsonl").write_bytes(before)
    [said] = begin_again(killed, [])
    assert "previous-" in said


def test_a_damaged_snapshot_is_left_to_the_training_process(killed: Path) -> None:
    (killed / "run/snapshots/step-00000007/progress.json").write_text("{")
    assert begin_again(killed, [("train.seed", 7)]) == []


def test_a_finished_run_replaces_what_is_in_previous(killed: Path) -> None:
    run = killed / "run"
    for folder, text in ((run / "previous/model", "older"), (run / "model", "old")):
        folder.mkdir(parents=True)
        (folder / MANIFEST).write_text(text)
    assert begin_again(killed, []) == []
    assert (run / "previous/model" / MANIFEST).read_text() == "old"
    assert not (run / "snapshots").exists()
    assert [path.name for path in run.glob("previous*")] == ["previous"]


def test_another_node_leaves_the_files_of_the_run_to_node_0(killed: Path) -> None:
    before = {path.name for path in (killed / "run").iterdir()}
    plan = replace(make_plan(load(killed), killed / "run"), node=1)
    plan.folder.mkdir()
    begin(plan, True, SilentUi())
    assert {path.name for path in (killed / "run").iterdir()} == before | {"node-1"}


# Kills at random instants.


def kill_chain(root: Path, kills: int, seed: int) -> dict[str, Any]:
    environment = {**os.environ, "RMTOOL_CACHE": str(root / "cache"), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, ROOT / "tests/training/kill_chain.py", root, root / "tiny.yaml", str(kills), str(seed)]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr[-3000:]
    assert_same_run(root / "killed", root / "alone")
    return dict(json.loads(shown.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_kills_at_random_instants_end_in_the_same_run(tmp_path: Path, causal_lm: Path) -> None:
    make_inputs(tmp_path, causal_lm)
    found = kill_chain(tmp_path, 4, seed=1)
    assert found["killed"] >= 1  # on a machine that gets faster meanwhile, the run may end before the second one


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fifty_kills_at_random_instants_end_in_the_same_run(tmp_path: Path, causal_lm: Path, precision: str) -> None:
    make_inputs(tmp_path, causal_lm, precision=precision, epochs=60, eval_every=10)
    found = kill_chain(tmp_path, 50, seed=2)
    assert found["killed"] == 50
    assert found["resumed"] >= 25


def test_the_loop_alone_has_no_snapshots(killed: Path, root: Path) -> None:
    """With snapshots off there is neither a folder nor a check of the disk; the steps are the same."""
    off = replace(load(killed).train, save_every=None, save_minutes=None)
    shutil.rmtree(killed / "run")
    train(replace(load(killed), train=off), killed / "run")
    assert weights(killed / "run") == weights(root / "alone")
