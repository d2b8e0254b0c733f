"""The commands as a user types them: results, and every mistake as one clear error with its exit code."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import Shown, pair_rows, scored, write_jsonl

RESPONSES: list[dict[str, Any]] = [
    {"id": 1, "prompt": "Hello?", "response": "Hi, naïve ☃."},
    {"id": "b", "prompt": [{"role": "user", "content": "Hello?"}], "responses": ["Hi.", "No.", "A longer answer."]},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "note": None},
    {"prompt": "One?", "responses": ["Yes."]},
]


def test_score_keeps_rows_and_order_and_adds_rewards(rmtool: Any, model: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "r.jsonl", RESPONSES)
    shown = rmtool("score", source, "--model", model)
    assert shown.code == 0, shown.err
    assert shown.err.startswith(f"model: {model}")
    rows = scored(tmp_path / "r.scored.jsonl")
    assert [{k: v for k, v in row.items() if k not in ("reward", "rewards", "best")} for row in rows] == RESPONSES
    assert [list(row)[len(RESPONSES[n]) :] for n, row in enumerate(rows)] == [
        ["reward"], ["rewards", "best"], ["reward"], ["rewards", "best"],
    ]  # fmt: skip
    assert rows[1]["best"] == max(range(3), key=rows[1]["rewards"].__getitem__)
    assert all(isinstance(value, float) for value in (rows[0]["reward"], *rows[1]["rewards"], rows[2]["reward"]))


def test_a_score_does_not_depend_on_its_neighbors(rmtool: Any, model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]]} for row in pair_rows(9)]
    source = write_jsonl(tmp_path / "r.jsonl", rows)
    assert rmtool("score", source, "--model", model).code == 0
    whole = [value for row in scored(tmp_path / "r.scored.jsonl") for value in row["rewards"]]
    single = [{"prompt": row["prompt"], "response": text} for row in rows for text in row["responses"]]
    other = write_jsonl(tmp_path / "s.jsonl", single[::-1])
    assert rmtool("score", other, "--model", model, "--tokens-per-pack", 1).code == 0
    alone = [row["reward"] for row in scored(tmp_path / "s.scored.jsonl")][::-1]
    assert alone == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("change", [lambda path: write_jsonl(path, RESPONSES[::-1]), Path.unlink])
def test_a_file_that_changes_while_it_is_scored_is_refused(
    rmtool: Any, model: Path, tmp_path: Path, monkeypatch: Any, change: Any
) -> None:
    source = write_jsonl(tmp_path / "r.jsonl", RESPONSES)

    def meanwhile(*arguments: Any) -> Any:
        change(source)
        return rewards_with_fidelity(*arguments)

    from rmtool.model.fidelity import rewards_with_fidelity

    monkeypatch.setattr("rmtool.scoring.score.rewards_with_fidelity", meanwhile)
    shown = rmtool("score", source, "--model", model)
    assert (shown.code, shown.error) == (3, "E0301")
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} <= {"r.jsonl", "rmtool.log"}


def test_a_gzipped_file_scores_the_same(rmtool: Any, model: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "r.jsonl", RESPONSES)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(source.read_bytes()))
    assert rmtool("score", source, "--model", model).code == 0
    assert rmtool("score", packed, "--model", model, "--output", tmp_path / "o.jsonl").code == 0
    assert (tmp_path / "o.jsonl").read_bytes() == (tmp_path / "r.scored.jsonl").read_bytes()


def test_score_takes_the_newest_finished_run(rmtool: Any, model: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine" / "model"
    shutil.copytree(model, run)
    from rmtool.checkpoint import Manifest, write_manifest
    from rmtool.model.loading import load_for_inference

    fingerprint = load_for_inference(model).encoder.fingerprint()
    write_manifest(run, Manifest(fingerprint, 512, "fp32", "error", "error", "r", "b", []))
    source = write_jsonl(tmp_path / "r.jsonl", RESPONSES)
    shown = rmtool("score", source, "--json")
    assert shown.code == 0, shown.err
    assert shown.err.startswith("model: runs/mine/model")
    assert json.loads(shown.out) | {"model": ""} == {
        "model": "", "output": str(tmp_path / "r.scored.jsonl"),
        "rows": 4, "responses": 6, "nonfinite": 0, "truncated": 0, "skipped_rows": 0,
        "unread_fields": ["id"], "converted": [], "prefix_sharing": True, "padded_reason": None,
        "precision": "fp32", "fidelity": None, "fp32_packs": 0,
        "compiled_layers": "off",
    }  # fmt: skip
    # Another template reads conversations otherwise: refused, unless a template is named.
    (run / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert rmtool("score", source, "--overwrite").error == "E0403"
    assert rmtool("score", source, "--overwrite", "--chat-template", "tulu").code == 0


def test_score_says_what_fp16_has_cost(rmtool: Any, model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """An overflow, repeated in fp32, and the fidelity of the rest; NaN weights are not an overflow."""
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr("rmtool.model.precision.lacks_fp16", lambda: False)
    source = write_jsonl(tmp_path / "r.jsonl", RESPONSES)
    shown = rmtool("score", source, "--model", model, "--precision", "fp16", "--fidelity", 3)
    assert "fidelity (fp16): rms " in shown.err
    assert "(3 responses)" in shown.err
    assert "note: " not in shown.err
    shown = rmtool("score", source, "--model", model, "--precision", "fp32", "--fidelity", 3, "--overwrite")
    assert "note: fidelity not measured: rewards are computed in fp32" in shown.err
    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.{}_proj.weight"
    weights[name.format("up")] *= 5e5
    weights[name.format("down")] /= 5e5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    given = ("--precision", "fp16", "--tokens-per-pack", 1, "--overwrite")
    shown = rmtool("score", source, "--model", model, *given, "--json")
    packs = json.loads(shown.out)["fp32_packs"]
    assert 0 < packs < 6
    scaled = ", ".join(f"layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))
    assert f"note: inf or NaN in fp16 in {packs} of 6 packs, computed again in fp32; from then on scaled: {scaled}" in (
        shown.err
    )
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    shown = rmtool("score", source, "--model", model, *given)
    assert "inf or NaN in fp16 in 6 of 6 packs, computed again in fp32\n" in shown.err


def test_rewards_that_are_not_finite_are_null_and_counted(rmtool: Any, model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    shown = rmtool("score", write_jsonl(tmp_path / "r.jsonl", RESPONSES), "--model", model)
    assert shown.code == 1
    rows = scored(tmp_path / "r.scored.jsonl")
    assert (rows[0]["reward"], rows[0]["error"], rows[1]["best"]) == (None, "nonfinite", None)
    assert rmtool("eval", model, "--data", write_jsonl(tmp_path / "p.jsonl", pair_rows(3))).error == "E0409"


def test_eval_reports_metrics_subsets_and_samples(rmtool: Any, model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "p.jsonl", pair_rows(10))
    shown = rmtool("eval", model, "--data", data, "--json")
    assert shown.code == 0, shown.err
    result = json.loads(shown.out)
    names = [f"eval/rm/{name}" for name in ("accuracy", "loss", "chosen_rewards", "rejected_rewards", "reward_margin")]
    assert [name for name in result if "/" in name] == names
    assert (result["pairs"], set(result["subsets"]), len(result["samples"])) == (10, {"even", "odd"}, 5)
    assert (
        result["eval/rm/accuracy"]
        == sum(part["eval/rm/accuracy"] * part["pairs"] for part in result["subsets"].values()) / 10
    )
    # The rewards behind it are those that `score` writes.
    rows = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]]} for row in pair_rows(10)]
    assert rmtool("score", write_jsonl(tmp_path / "r.jsonl", rows), "--model", model).code == 0
    pairs = [row["rewards"] for row in scored(tmp_path / "r.scored.jsonl")]
    assert result["eval/rm/accuracy"] == sum(chosen > rejected for chosen, rejected in pairs) / 10
    assert result["eval/rm/chosen_rewards"] == pytest.approx(sum(chosen for chosen, _ in pairs) / 10)
    table = rmtool("eval", model, "--data", data).out
    assert all(word in table for word in ("accuracy", "reward margin", "even", "odd", "all", "Example pairs"))


def test_empty_responses_can_be_allowed(rmtool: Any, model: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "x", "response": ""}])
    assert rmtool("score", source, "--model", model).error == "E0306"
    assert rmtool("score", source, "--model", model, "--allow-empty").code == 0


def test_data_cannot_steer_the_terminal(rmtool: Any, model: Path, tmp_path: Path) -> None:
    rows = [row | {"prompt": "clear \x1b[2J", "subset": "\x1b[31m"} for row in pair_rows(2)]
    shown = rmtool("eval", model, "--data", write_jsonl(tmp_path / "p.jsonl", rows))
    assert shown.code == 0
    assert "\x1b" not in shown.out + shown.err


def test_equal_pairs_are_ties_and_count_as_wrong(rmtool: Any, model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "x", "chosen": "same", "rejected": "same"}]
    result = json.loads(rmtool("eval", model, "--data", write_jsonl(tmp_path / "p.jsonl", rows), "--json").out)
    assert (result["eval/rm/accuracy"], result["ties"]) == (0.0, 1)


def test_eval_counts_dropped_pairs_and_ends_with_one(rmtool: Any, model: Path, tmp_path: Path) -> None:
    rows = [*pair_rows(3), {"prompt": "long " * 200, "chosen": "a", "rejected": "b"}]
    data = write_jsonl(tmp_path / "p.jsonl", rows)
    assert rmtool("eval", model, "--data", data, "--max-length", 100).error == "E0305"
    shown = rmtool("eval", model, "--data", data, "--max-length", 100, "--on-long", "drop", "--json")
    assert shown.code == 1
    assert (json.loads(shown.out)["pairs"], json.loads(shown.out)["dropped"]) == (3, {"too_long": 1})


# ------------------------------------------------------------------------------------------------- mistakes

GOOD_PAIRS = pair_rows(6)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", GOOD_PAIRS)


def train(rmtool: Any, causal_lm: Path, data: Path, *more: str | Path) -> Shown:
    sets = ["train.batch_size=4", "train.tokens_per_pack=256", "data.holdout=0", "data.max_length=128"]
    flags = [part for text in sets for part in ("--set", text)]
    return rmtool("train", "--recipe", "smollm2-135m", "--model", causal_lm, "--data", data, *flags, *more)


def test_mistakes_before_training_starts(rmtool: Any, causal_lm: Path, pairs: Path, tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", GOOD_PAIRS)
    bad.write_text(bad.read_text() + '{"prompt": "x", "chosen": "y"}\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    cases: list[tuple[tuple[Any, ...], str, int, str]] = [
        (("--set", "train.learning_rat=1"), "E0204", 2, "did you mean learning_rate?"),
        (("--recipe", "debgu"), "E0201", 2, "use one of debug"),
        (("--data", bad), "E0303", 3, "bad.jsonl:7"),
        (("--data", empty), "E0302", 3, "empty.jsonl"),
        (("--data", "missing.jsonl"), "E0201", 2, "missing.jsonl"),
        (("--eval-data", "missing.jsonl"), "E0201", 2, "missing.jsonl"),
        (("--set", "data.holdout=6"), "E0302", 3, "6 pairs"),
        (("--output", "/proc/nowhere"), "E0501", 5, "/proc/nowhere"),
        (("--nodes", "2"), "E0207", 2, "--node-rank"),
        (("--nodes", "2", "--node-rank", "0"), "E0207", 2, "--main-address"),
        (("--nodes", "2", "--node-rank", "2"), "E0207", 2, "0 to 1"),
        (("--eval-data", pairs, "--set", "data.holdout=2"), "E0205", 2, "cannot both be set"),
    ]
    for arguments, id, code, words in cases:
        shown = train(rmtool, causal_lm, pairs, *arguments)
        assert (shown.error, shown.code) == (id, code), (arguments, shown.err)
        assert words in shown.err, arguments
        assert not list(tmp_path.glob("runs/*/model"))


def test_an_error_in_json_too(rmtool: Any, causal_lm: Path, pairs: Path) -> None:
    shown = train(rmtool, causal_lm, pairs, "--set", "train.seed=x", "--json", "--dry-run")
    error = json.loads(shown.out)["error"]
    assert (error["code"], error["exit"]) == ("E0205", 2)


def test_mistakes_of_eval_and_score(rmtool: Any, causal_lm: Path, model: Path, pairs: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "r.jsonl", RESPONSES)
    broken = write_jsonl(tmp_path / "broken.jsonl", RESPONSES)
    broken.write_text(broken.read_text() + '{"prompt": "x", \n')
    long = write_jsonl(tmp_path / "long.jsonl", [*RESPONSES, {"prompt": "a", "response": "word " * 600}])
    (tmp_path / "here.jsonl").write_text("kept")
    cases: list[tuple[tuple[Any, ...], str, int, str]] = [
        (("score", rows, "--model", causal_lm), "E0401", 4, "no score head"),
        (("eval", causal_lm, "--data", pairs), "E0401", 4, "no score head"),
        (("score", "missing.jsonl", "--model", model), "E0201", 2, "missing.jsonl"),
        (("score", broken, "--model", model), "E0301", 3, "broken.jsonl:5"),
        (("score", long, "--model", model), "E0305", 3, "long.jsonl:5"),
        (("score", pairs, "--model", model), "E0303", 3, "pairs.jsonl:1"),
        (("score", rows, "--model", model, "--output", "here.jsonl"), "E0601", 6, "--overwrite"),
        (("score", rows, "--model", model, "--output", rows, "--overwrite"), "E0601", 6, "is the input"),
        (("score", rows, "--model", model, "--output", "/proc/x/y.jsonl"), "E0501", 5, "/proc/x"),
        (("score", rows, "--model", "nowhere/here/there"), "E0404", 4, "nowhere"),
        (("score", rows, "--model", model, "--precision", "int3"), "E0206", 2, "auto, fp16, bf16, tf32 or fp32"),
        (("eval", model, "--data", rows), "E0303", 3, "r.jsonl:1"),
        (("eval", model), "E0701", 7, "allenai/reward-bench"),
        (("push", "nowhere", "me/rm"), "E0404", 4, "nowhere"),
    ]
    for arguments, id, code, words in cases:
        shown = rmtool(*arguments)
        assert (shown.error, shown.code) == (id, code), (arguments, shown.err)
        assert words in shown.err, arguments
    assert (tmp_path / "here.jsonl").read_text() == "kept"
    left = {path.name for path in tmp_path.iterdir()} - {"rmtool.log"}
    assert left == {"r.jsonl", "broken.jsonl", "long.jsonl", "here.jsonl", "pairs.jsonl", "m"}


def test_eval_leaves_no_text_in_the_cache(rmtool: Any, model: Path, pairs: Path, tmp_path: Path) -> None:
    assert rmtool("eval", model, "--data", pairs).code == 0
    assert not (tmp_path / "cache" / "records").exists()


def test_unknown_options_and_commands_are_usage_errors(rmtool: Any) -> None:
    assert rmtool("score").code == 2
    assert rmtool("scroe").code == 2
    assert rmtool("train", "--epochs", "3").code == 2


def test_libraries_words_go_to_the_log(causal_lm: Path, tmp_path: Path) -> None:
    """Loading a causal LM as a classifier makes transformers print a report; the terminal does not show it."""
    source = write_jsonl(tmp_path / "r.jsonl", RESPONSES)
    program = Path(sys.executable).parent / "rmtool"
    shown = subprocess.run([program, "score", source, "--model", causal_lm], capture_output=True, text=True)
    assert shown.returncode == 4
    assert shown.stderr.startswith("model: ")
    assert "error[E0401]" in shown.stderr
    assert "MISSING" not in shown.stdout + shown.stderr
    assert "MISSING" in Path(os.environ["RMTOOL_LOG"]).read_text()


@pytest.mark.parametrize("columns", ["80", "200"])
def test_the_tulu3_plan_is_printed_without_a_network(
    columns: str, rmtool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    shown = rmtool("train", "--recipe", "tulu3-8b", "--dry-run")
    assert shown.code == 0, shown.err
    words = ("64 (8 nodes x 8 processes)", "fsdp2", "256 pairs (4 per process)", "2,048 tokens", "3e-06, linear")
    assert all(word in shown.out for word in words)
    assert "--num_machines 8 --num_processes 64" in shown.out
    assert "--multi_gpu" in shown.out
    assert max(map(len, shown.out.split("\n# ")[0].splitlines())) <= int(columns)
    assert not (tmp_path / "runs").exists()


def test_every_bundled_recipes_launch_command_is_one_that_accelerate_reads() -> None:
    from accelerate.commands.launch import launch_command_parser

    from rmtool.planning.plan import launch_command
    from rmtool.recipe import load_recipe

    for name, engine, processes, machines in (
        ("debug", "auto", 1, 1),
        ("smollm2-135m", "auto", 1, 1),
        ("tulu3-8b", "fsdp2", 64, 8),
        ("tulu3-8b", "zero3", 64, 8),
    ):
        command = launch_command(load_recipe(name, [("launch.engine", engine)]), Path("runs/x"), machines - 1)
        assert command[1:3] == ["-m", "accelerate.commands.launch"]
        parsed = launch_command_parser().parse_args(command[3:])
        assert (parsed.num_processes, parsed.num_machines, parsed.machine_rank) == (processes, machines, machines - 1)
        assert (parsed.module, parsed.training_script, parsed.training_script_args) == (
            True,
            "rmtool.training.worker",
            ["runs/x/node-7" if machines > 1 else "runs/x"],
        )
        assert (parsed.multi_gpu, parsed.use_deepspeed) == (engine == "fsdp2", engine == "zero3")
        assert parsed.zero_stage == (3 if engine == "zero3" else None)


def test_train_passes_its_time_limit_and_restart_on(
    rmtool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a signal ends the command at once until the processes run."""
    given: list[Any] = []

    def run(plan: Any, ui: Any, request: Any, overwrite: bool, restart: bool) -> None:
        given.extend((plan.recipe.train.time_limit, request.deadline - request.started, overwrite, restart))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("rmtool.launch.supervise.run", run)
    shown = rmtool("train", "--recipe", "debug", "--output", "run", "--time-limit", "1h30m", "--restart")
    assert shown.code == 143
    assert given == ["1h30m", pytest.approx(5400), False, True]
