"""The field guide: situations from bug reports of other tools, one YAML file each, with the right value.

A new report is one more file in this folder:

    title: the situation, in one sentence
    seen: where it was reported, or "own"
    files:                      # written before the first run
      pairs.jsonl: [{...}]      # rows, in the form that the name says: .jsonl, .json, .parquet, also .gz; or text
    model: {...}                # changes to the tiny reward model in folder `model`; see `change_model`
    base: {...}                 # and to the causal LM in `base`
    models: {name: {...}}       # further copies of the reward model, with their changes
    runs:
      - run: eval model --data pairs.jsonl
        exit: 0                 # default 0
        error: E0303            # id of the error
        says: [text]            # in the output, in any line breaks
        not: [text]             # not in the output
        result: {pairs: 3}      # values of the --json result
        rewards: [0.1, null]    # of score's output, in order
        like: eval model --data plain.jsonl      # the same rewards or metrics as this command
        unlike: eval model --data other.jsonl    # different ones
        row: {reward: 1.0, note: text}           # fields of the first row of score's output
        absent: [out.jsonl]     # files that must not exist afterwards

`like` compares score's rewards, eval's metrics, or the losses of train. `base` is a causal LM without a score head,
`original` the reward model without the changes.
"""

from __future__ import annotations

import gzip
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import Shown, sanitizing, scored
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parent
SITUATIONS = sorted(FOLDER.glob("*.yaml"))
KEYS = {"title", "seen", "files", "model", "base", "models", "runs", "env"}
RUN_KEYS = {"run", "exit", "error", "says", "not", "result", "rewards", "like", "unlike", "row", "absent"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=sanitizing if path.stem == "response_with_eos_text" else ())
        for path in SITUATIONS
    ],
)
def test_situation(
    path: Path,
    rmtool: Any,
    checkpoint: Path,
    causal_lm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    situation = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert situation.keys() <= KEYS, f"unknown keys {situation.keys() - KEYS}"
    assert situation["title"]
    assert situation["seen"]
    monkeypatch.setattr("rmtool.dataset.report.draw_lengths", lambda *_: None)  # half a second; tests/cli has it
    for name, value in situation.get("env", {}).items():
        monkeypatch.setenv(name, value)
    for name, changes in {"model": situation.get("model", {}), **situation.get("models", {})}.items():
        change_model(shutil.copytree(checkpoint, tmp_path / name), **changes)
    change_model(shutil.copytree(causal_lm, tmp_path / "base"), **situation.get("base", {}))
    shutil.copytree(checkpoint, tmp_path / "original")
    for name, content in situation.get("files", {}).items():
        write(tmp_path / name, content)
    references: dict[str, Any] = {}  # the outcomes of commands that others are compared with
    for run in situation["runs"]:
        check(run, rmtool, references)


def change_model(
    folder: Path,
    config: dict[str, Any] | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    rename: dict[str, str] | None = None,
    drop: list[str] | None = None,
    shape: dict[str, list[int]] | None = None,
    value: dict[str, float] | None = None,
    reshape: dict[str, list[int]] | None = None,
    dtype: dict[str, str] | None = None,
    prefix: dict[str, str] | None = None,
    beside: dict[str, dict[str, str]] | None = None,
    write: dict[str, Any] | None = None,
    remove: list[str] | None = None,
) -> None:
    """Change a checkpoint.

    Args:
        config, tokenizer_config, tokenizer: keys of these .json files to set; null removes one.
        rename, drop: tensors. shape: tensors that become zeros of this shape. value: tensors of which the first number
            becomes this. reshape, dtype: tensors that become this shape or type.
        prefix: beginnings of names and what they become.
        beside: further .safetensors files, each with names and the tensors of this checkpoint that they contain.
        write: files and their text or JSON. remove: files.
    """
    for name, changes in (("config", config), ("tokenizer_config", tokenizer_config), ("tokenizer", tokenizer)):
        if changes:
            path = folder / f"{name}.json"
            values = json.loads(path.read_text()) | changes
            values = {key: value for key, value in values.items() if key not in changes or value is not None}
            path.write_text(json.dumps(values))
    weights = load_file(folder / "model.safetensors")
    for name, tensors in (beside or {}).items():
        save_file({new: weights[old] for new, old in tensors.items()}, folder / name)
    for old, new in (rename or {}).items():
        weights[new] = weights.pop(old)
    for name in drop or []:
        del weights[name]
    for name, size in (shape or {}).items():
        weights[name] = torch.zeros(size)
    for name, number in (value or {}).items():
        weights[name].view(-1)[0] = number
    for name, size in (reshape or {}).items():
        weights[name] = weights[name].reshape(size)
    for name, kind in (dtype or {}).items():
        weights[name] = weights[name].to(getattr(torch, kind))
    for old, new in (prefix or {}).items():
        weights = {new + name.removeprefix(old) if name.startswith(old) else name: weights[name] for name in weights}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (write or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    for name in remove or []:
        (folder / name).unlink()


def write(path: Path, content: Any) -> None:
    """Write rows, or text, in the form that the file's name says."""
    name = path.name.removesuffix(".gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        data = content.encode()
    elif name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet

        names = dict.fromkeys(name for row in content for name in row)  # missing fields are null
        table = pa.table({name: [row.get(name) for row in content] for name in names})
        pyarrow.parquet.write_table(table, path)
        return
    elif name.endswith(".json"):
        data = json.dumps(content).encode()
    else:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)


def check(run: dict[str, Any], rmtool: Any, references: dict[str, Any]) -> None:
    assert run.keys() <= RUN_KEYS, f"unknown keys {run.keys() - RUN_KEYS}"
    shown, outcome = start(run["run"], rmtool)
    output = " ".join((shown.out + shown.err).split())
    expected = (run.get("exit", 0), run.get("error"))
    assert (shown.code, shown.error) == expected, shown.err
    for text in run.get("says", []):
        assert " ".join(text.split()) in output, f"{text!r} is not in {shown.out + shown.err}"
    for text in run.get("not", []):
        assert text not in output
    for name, value in run.get("result", {}).items():
        assert json.loads(shown.out)[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    if "rewards" in run:
        assert outcome == pytest.approx(run["rewards"], abs=1e-5)
    if "row" in run:
        row = rows_of(output_of(run["run"]))[0]
        assert {name: row[name] for name in run["row"]} == run["row"]
    for line in {run.get("like"), run.get("unlike")} - {None}:
        if line not in references:
            references[line] = start(line, rmtool)[1]
    if "like" in run:
        assert outcome == pytest.approx(references[run["like"]], abs=1e-5, nan_ok=True)
    if "unlike" in run:
        assert outcome != pytest.approx(references[run["unlike"]], abs=1e-5)
    assert not [name for name in run.get("absent", []) if os.path.exists(name)]


def start(line: str, rmtool: Any) -> tuple[Shown, Any]:
    """Run a command; return what it printed, and its rewards or metrics if it has any."""
    command = shlex.split(line)
    if command[0] == "eval" and "--json" not in command:
        command.append("--json")
    if command[0] == "score" and "--overwrite" not in command:
        command.append("--overwrite")
    shown = rmtool(*command)
    if command[0] == "score" and output_of(line).is_file():
        rows = rows_of(output_of(line))
        return shown, [reward for row in rows for reward in row.get("rewards", [row.get("reward")])]
    if command[0] == "eval" and shown.code in (0, 1):
        return shown, {name: value for name, value in json.loads(shown.out).items() if name.startswith("eval/rm/")}
    if command[0] == "train" and "--output" in command:
        metrics = Path(command[command.index("--output") + 1]) / "metrics.jsonl"
        if metrics.is_file():
            return shown, [row["train/rm/loss"] for row in scored(metrics)]
    return shown, None


def output_of(line: str) -> Path:
    """The output file of a score command."""
    command = shlex.split(line)
    if "--output" in command:
        return Path(command[command.index("--output") + 1])
    name = Path(command[1])
    for suffix in (".gz", ".jsonl", ".json", ".parquet", ".arrow"):
        name = name.with_name(name.name.removesuffix(suffix))
    return name.with_name(f"{name.name}.scored.jsonl")


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, in the form that its name says."""
    name, data = path.name.removesuffix(".gz"), path.read_bytes()
    if name.endswith(".parquet"):
        import pyarrow.parquet

        return list(pyarrow.parquet.read_table(path).to_pylist())
    text = (gzip.decompress(data) if path.name.endswith(".gz") else data).decode()
    return list(json.loads(text)) if name.endswith(".json") else [json.loads(line) for line in text.split("\n")[:-1]]
