"""Invalid rows through the commands: an error that lists them, or skipped; and what does not change a reward."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers import pair_rows, scored, write_jsonl

from rmtool.checkpoint import MANIFEST
from rmtool.dataset.report import LENGTHS_FILE, REPORT_FILE


def with_invalid_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Line 2 is truncated, line 4 has an empty response, line 6 is not an object."""
    lines = [json.dumps(row) for row in rows]
    lines[1] = lines[1][:20]
    lines[3] = json.dumps(rows[3] | {"response": " ", "chosen": " "})
    lines[5] = "[]"
    path.write_text("\n".join(lines) + "\n")
    return path


RATED = {"score_chosen": 2, "score_rejected": 1}
ROWS = [{"prompt": row["prompt"], "response": row["chosen"]} for row in pair_rows(8)]


def test_score_lists_all_invalid_rows_and_writes_nothing(rmtool: Any, model: Path, tmp_path: Path) -> None:
    source = with_invalid_rows(tmp_path / "r.jsonl", ROWS)
    shown = rmtool("score", source, "--model", model)
    assert (shown.code, shown.error) == (3, "E0301")
    assert "3 invalid rows" in shown.err
    assert all(f"--> {source}:{line}" in shown.err for line in (2, 4, 6))
    assert not (tmp_path / "r.scored.jsonl").exists()


def test_score_skips_invalid_rows_and_scores_the_others(rmtool: Any, model: Path, tmp_path: Path) -> None:
    source = with_invalid_rows(tmp_path / "r.jsonl", ROWS)
    shown = rmtool("score", source, "--model", model, "--on-bad-row", "skip", "--json")
    assert shown.code == 1
    assert json.loads(shown.out)["skipped_rows"] == 3
    skipped = sorted(scored(tmp_path / "r.scored.rejects.jsonl"), key=lambda row: row["line"])
    assert [(row["line"], row["code"]) for row in skipped] == [(2, "E0301"), (4, "E0306"), (6, "E0301")]
    clean = write_jsonl(tmp_path / "clean.jsonl", [ROWS[at] for at in (0, 2, 4, 6, 7)])
    assert rmtool("score", clean, "--model", model).code == 0
    assert scored(tmp_path / "r.scored.jsonl") == scored(tmp_path / "clean.scored.jsonl")


def test_eval_skips_invalid_rows(rmtool: Any, model: Path, tmp_path: Path) -> None:
    source = with_invalid_rows(tmp_path / "pairs.jsonl", pair_rows(8))
    assert rmtool("eval", model, "--data", source).code == 3
    shown = rmtool("eval", model, "--data", source, "--on-bad-row", "skip", "--json")
    assert shown.code == 1
    result = json.loads(shown.out)
    assert (result["pairs"], result["skipped_rows"]) == (5, 3)
    assert len(scored(tmp_path / "pairs.rejects.jsonl")) == 3


def test_eval_reads_other_formats_and_names(rmtool: Any, model: Path, tmp_path: Path) -> None:
    pairs = [(row["prompt"], row["chosen"], row["rejected"]) for row in pair_rows(6)]
    formats = {
        "plain": lambda q, good, bad: {"prompt": q, "chosen": good, "rejected": bad},
        "judge": lambda q, good, bad: {"question": q, "response_A": bad, "response_B": good, "label": "B>A"},
        "mine": lambda q, good, bad: {"q": q, "good": good, "bad": bad},
    }
    columns = ("--column", "prompt=q", "--column", "chosen=good", "--column", "rejected=bad")
    results = []
    for name, make in formats.items():
        source = write_jsonl(tmp_path / f"{name}.jsonl", [make(*pair) for pair in pairs])
        more = columns if name == "mine" else ()
        shown = rmtool("eval", model, "--data", source, "--samples", 0, "--json", *more)
        assert shown.code == 0, shown.err
        results.append({name: value for name, value in json.loads(shown.out).items() if name.startswith("eval/rm")})
    assert results[1] == pytest.approx(results[0])
    assert results[2] == pytest.approx(results[0])


def test_order_packing_line_ends_and_gzip_do_not_change_rewards(rmtool: Any, model: Path, tmp_path: Path) -> None:
    """Metamorphic: the same rows in another order, in two files, gzipped, with CRLF, with a byte order mark."""
    text = write_jsonl(tmp_path / "whole.jsonl", ROWS).read_bytes()
    lines = text.splitlines(keepends=True)
    files = {
        "reversed.jsonl": b"".join(reversed(lines)),
        "first.jsonl": b"".join(lines[:3]),
        "second.jsonl": b"".join(lines[3:]),
        "packed.jsonl.gz": gzip.compress(text),
        "crlf.jsonl": text.replace(b"\n", b"\r\n"),
        "bom.jsonl": b"\xef\xbb\xbf" + text.rstrip(b"\n"),
    }
    rewards = {}
    for name in ("whole.jsonl", *files):
        if name in files:
            (tmp_path / name).write_bytes(files[name])
        out = tmp_path / f"{name}.out.jsonl"
        assert rmtool("score", tmp_path / name, "--model", model, "--output", out).code == 0
        rewards[name] = [row["reward"] for row in scored(out)]
    expected = pytest.approx(rewards.pop("whole.jsonl"), abs=1e-6)
    assert rewards.pop("reversed.jsonl")[::-1] == expected
    assert rewards.pop("first.jsonl") + rewards.pop("second.jsonl") == expected
    assert all(found == expected for found in rewards.values())


def test_a_dry_run_ends_as_the_run_would(rmtool: Any, causal_lm: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", [*pair_rows(6), {"prompt": "q", "chosen": 5, "rejected": "x"}])
    command = ("train", "--recipe", "smollm2-135m", "--model", causal_lm, "--data", data, "--set", "data.holdout=2")
    assert rmtool(*command, "--dry-run").code == 3
    for more in ((), ("--json",)):
        shown = rmtool(*command, "--dry-run", "--on-bad-row", "skip", *more)
        assert shown.code == 1
        assert "invalid rows skipped" in shown.out or json.loads(shown.out)["report"]["skipped_rows"] == 1


def test_a_finished_run_is_refused_before_data_is_read(rmtool: Any, tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / MANIFEST).write_text("{}")
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": 5}])
    shown = rmtool("train", "--data", bad, "--output", tmp_path / "run")
    assert (shown.code, shown.error) == (6, "E0601")


def test_a_dry_run_does_not_change_a_finished_run(rmtool: Any, causal_lm: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(6))
    run = tmp_path / "run"
    command = ("train", "--recipe", "smollm2-135m", "--model", causal_lm, "--data", data, "--set", "data.holdout=2")
    command = (*command, "--output", run, "--dry-run")
    shown = rmtool(*command)
    assert (shown.code, str(run / LENGTHS_FILE) in shown.out.replace("\n", "")) == (0, True)
    assert sorted(path.name for path in run.iterdir()) == [LENGTHS_FILE, REPORT_FILE]
    (run / "model").mkdir()
    for name in (LENGTHS_FILE, REPORT_FILE, f"model/{MANIFEST}"):
        (run / name).write_text("the finished run's")
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    for more in ((), ("--overwrite",), ("--json",)):
        shown = rmtool(*command, *more)
        assert shown.code == 0, shown.err
        assert "chosen response is longer" in shown.out or json.loads(shown.out)["report"]["pairs"] == 4
        assert str(run / LENGTHS_FILE) not in shown.out.replace("\n", "")
        assert before == sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))


def test_rating_margins_warn_about_sources_without_ratings(rmtool: Any, causal_lm: Path, tmp_path: Path) -> None:
    rated = write_jsonl(tmp_path / "rated.jsonl", [row | RATED for row in pair_rows(6)])
    plain = write_jsonl(tmp_path / "plain.jsonl", pair_rows(6))
    command = ("train", "--recipe", "smollm2-135m", "--model", causal_lm, "--data", rated, "--data", plain)
    command = (*command, "--set", "data.holdout=2", "--dry-run")
    assert "no ratings" not in rmtool(*command).err
    said = " ".join(rmtool(*command, "--set", "data.rating_margins=true").err.split())
    assert f"{plain} has no ratings" in said
    assert f"{rated} has no ratings" not in said


def test_skipped_rows_are_never_written_to_an_input(rmtool: Any, model: Path, causal_lm: Path, tmp_path: Path) -> None:
    pairs = with_invalid_rows(tmp_path / "ev.jsonl", pair_rows(8))
    write_jsonl(tmp_path / "ev.rejects.jsonl", pair_rows(5))
    (tmp_path / "linked.jsonl").symlink_to("ev.rejects.jsonl")
    responses = with_invalid_rows(tmp_path / "sc.rejects.jsonl", ROWS)
    run = tmp_path / "run"
    run.mkdir()
    copied = with_invalid_rows(run / "rejects.jsonl", pair_rows(8))
    commands: list[tuple[Any, ...]] = [
        ("eval", model, "--data", pairs, "--data", "ev.rejects.jsonl"),
        ("eval", model, "--data", pairs, "--data", "linked.jsonl"),
        ("score", responses, "--model", model, "--output", "sc.jsonl"),
        ("train", "--recipe", "smollm2-135m", "--model", causal_lm, "--data", copied, "--output", run, "--dry-run"),
    ]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    for command in commands:
        shown = rmtool(*command, "--on-bad-row", "skip")
        assert (shown.code, shown.error) == (6, "E0601"), command
        assert "it is an input" in shown.err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}


@pytest.mark.parametrize("kind", ["rows of the user's", "not a file"])
def test_only_a_file_of_skipped_rows_is_replaced(rmtool: Any, model: Path, tmp_path: Path, kind: str) -> None:
    pairs = with_invalid_rows(tmp_path / "ev.jsonl", pair_rows(8))
    path = tmp_path / "ev.rejects.jsonl"
    command = ("eval", model, "--data", pairs, "--on-bad-row", "skip")
    for _ in range(2):
        assert rmtool(*command).code == 1
        assert len(scored(path)) == 3
    path.unlink()
    if kind == "not a file":
        os.mkfifo(path)  # to read from it would block forever
    else:
        write_jsonl(path, pair_rows(2))
    assert rmtool(*command).error == "E0601"
    assert kind == "not a file" or scored(path) == pair_rows(2)
