"""Every error id: what provokes it, and that its advice, followed, works.

An entry is (id, command, the same command after its hint was followed, its exit code). `FILES` are written before.
That every option and key of a hint exists in its command is checked wherever a test runs a command (`advice.py`).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import pair_rows, write_jsonl

from rmtool.errors import ERRORS

LONG = "word " * 700
RECIPE = "model: {path: base}\ndata: {train: [pairs.jsonl]}\ntrain: {batch_size: 4, learning_rate: 1e-4}\n"
ROWS: dict[str, list[dict[str, Any]]] = {
    "pairs.jsonl": pair_rows(8),
    "rows.jsonl": [{"prompt": "Hello?", "response": "Hi."}],
    "ties.jsonl": [{"prompt": "a", "responses": ["x", "y"], "ratings": [1, 1]}],
    "other_fields.jsonl": [{"prompt": "a", "good": "x", "bad": "y"}],
    "identical.jsonl": [{"prompt": "a", "chosen": "x", "rejected": "x"}, *pair_rows(4)],
    "empty.jsonl": [{"prompt": "a", "chosen": "x", "rejected": ""}],
    "long.jsonl": [{"prompt": LONG, "chosen": "x", "rejected": "y"}],
    "long_rows.jsonl": [{"prompt": LONG, "response": "x"}],
    "system.jsonl": [{"system": "Be brief.", "prompt": "Hello?", "response": "Hi."}],
    "scored.jsonl": [{"prompt": "a", "response": "b", "reward": 1}],
}
TEXTS = {
    "broken.jsonl": '{"prompt": "a", "chosen": "x", "rejected": "y"}\n{"prompt": \n',
    "nothing.jsonl": "",
    "pairs.txt": "",
    "broken.yaml": "model: {path: base}\n bad: [\n",
    "r.yaml": RECIPE,
    "unknown.yaml": RECIPE.replace("learning_rate", "learning_rat"),
    "refuses.jinja": "{% for m in messages %}{{ m.content if m.role != 'system' else raise_exception(m) }}{% endfor %}",
    "clock.jinja": "{{ strftime_now(format) }}{% for message in messages %}{{ message.content }}{% endfor %}",
    "date.jinja": "{{ strftime_now('%d %b %Y') }}{% for message in messages %}{{ message.content }}{% endfor %}",
}
PLAN = "train --recipe r.yaml --dry-run"
EVAL, SCORE = "eval model --data", "score rows.jsonl --model model"
FOLLOWED: list[tuple[str, str, str, int]] = [
    ("E0201", "train --recipe smoll", f"{PLAN}", 0),
    ("E0201", "train --recipe no.yaml", f"{PLAN}", 0),
    ("E0201", f"{EVAL} no.jsonl", f"{EVAL} pairs.jsonl", 0),
    ("E0201", f"{EVAL} pairs.txt", f"{EVAL} pairs.jsonl", 0),
    ("E0201", f"{EVAL} base", f"{EVAL} pairs.jsonl", 0),
    ("E0201", "score no.jsonl --model model", SCORE, 0),
    ("E0201", f"{SCORE} --chat-template no.jinja", f"{SCORE} --chat-template tulu", 0),
    ("E0202", "train --recipe broken.yaml", PLAN, 0),
    ("E0202", "train --recipe ./nothing.jsonl", PLAN, 0),
    ("E0204", "train --recipe unknown.yaml --dry-run", PLAN, 0),
    ("E0204", f"{PLAN} --set train.warmup=1", f"{PLAN} --set train.warmup_steps=1", 0),
    ("E0204", f"{PLAN} --set max_length=100", f"{PLAN} --set data.max_length=100", 0),
    ("E0204", f"{PLAN} --set train.patience=1", f"{PLAN} --set train.early_stopping_patience=null", 0),
    ("E0204", f"{EVAL} pairs.jsonl --column promt=prompt", f"{EVAL} pairs.jsonl --column prompt=prompt", 0),
    ("E0205", f"{PLAN} --set train.batch_size=0", f"{PLAN} --set train.batch_size=4", 0),
    ("E0205", f"{PLAN} --set train.keep=best", f"{PLAN} --set train.keep=best --set data.holdout=2", 0),
    ("E0205", f"{PLAN} --set lora.quantize=4bit", f"{PLAN} --set lora.quantize=none", 0),
    ("E0206", f"{EVAL} pairs.jsonl --on-long cut", f"{EVAL} pairs.jsonl --on-long drop", 0),
    ("E0206", f"{EVAL} pairs.jsonl --column prompt", f"{EVAL} pairs.jsonl --column prompt=prompt", 0),
    ("E0206", f"{PLAN} --set seed", f"{PLAN} --set train.seed=1", 0),
    ("E0207", "train --recipe r.yaml --nodes 2", f"{PLAN} --nodes 1", 0),
    ("E0207", f"{PLAN} --nodes 2 --node-rank 2", f"{PLAN} --nodes 2 --node-rank 1", 0),
    ("E0209", f"{PLAN} --set train.warmup_steps=3", f"{PLAN} --set train.warmup_steps=2", 0),
    ("E0209", f"{PLAN} --set train.warmup_steps=3", f"{PLAN} --set train.warmup_ratio=0.1", 0),
    (
        "E0209",
        f"{PLAN} --set data.holdout=1 --set train.eval_every=1 --set train.early_stopping_patience=1",
        f"{PLAN} --set data.holdout=1 --set train.eval_every=1 --set train.early_stopping_patience=null",
        0,
    ),
    ("E0271", "push model a/b/c", "push model a/b --dry-run", 0),
    ("E0272", "push linked a/b --dry-run", "push model a/b --dry-run", 0),
    ("E0301", f"{EVAL} broken.jsonl", f"{EVAL} broken.jsonl --on-bad-row skip", 1),
    ("E0302", f"{EVAL} nothing.jsonl", f"{EVAL} pairs.jsonl", 0),
    ("E0302", f"{EVAL} ties.jsonl", f"{EVAL} pairs.jsonl", 0),
    ("E0302", f"{EVAL} long.jsonl --max-length 200 --on-long drop", f"{EVAL} long.jsonl --on-long truncate_prompt", 0),
    ("E0302", f"{PLAN} --set data.holdout=8", f"{PLAN} --set data.holdout=7", 0),
    ("E0303", f"{EVAL} other_fields.jsonl", f"{EVAL} other_fields.jsonl --column chosen=good --column rejected=bad", 0),
    (
        "E0303",
        f"{PLAN} --data other_fields.jsonl",
        f"{PLAN} --data other_fields.jsonl --set data.columns.chosen=good --set data.columns.rejected=bad",
        0,
    ),
    ("E0303", "score scored.jsonl --model model", SCORE, 0),
    ("E0304", f"{PLAN} --data identical.jsonl", f"{PLAN} --data identical.jsonl --set data.on_identical=drop", 0),
    (
        "E0305",
        f"{EVAL} long.jsonl --max-length 200",
        f"{EVAL} long.jsonl --max-length 200 --on-long truncate_prompt",
        0,
    ),
    ("E0305", f"{EVAL} long.jsonl --max-length 200", f"{EVAL} long.jsonl --max-length 3000", 0),
    (
        "E0305",
        "score long_rows.jsonl --model model --max-length 200",
        "score long_rows.jsonl --model model --max-length 200 --on-long truncate_prompt",
        0,
    ),
    (
        "E0305",
        f"{PLAN} --data long.jsonl --set data.max_length=200",
        f"{PLAN} --data long.jsonl --set data.max_length=200 --set data.on_long=truncate_prompt",
        0,
    ),
    ("E0306", f"{EVAL} empty.jsonl", f"{EVAL} empty.jsonl --allow-empty", 0),
    ("E0306", f"{PLAN} --data empty.jsonl", f"{PLAN} --data empty.jsonl --set data.on_empty=keep", 0),
    (
        "E0307",
        "score system.jsonl --model model --chat-template refuses.jinja",
        f"{SCORE} --chat-template refuses.jinja",
        0,
    ),
    ("E0308", f"{PLAN} --set data.train=[{{path: pairs.jsonl, rows: 9}}]", f"{PLAN} --set data.holdout=0", 0),
    ("E0308", f"{PLAN} --set data.holdout=0.1", f"{PLAN} --set data.holdout=1", 0),
    ("E0401", f"{EVAL.replace('model', 'base')} pairs.jsonl", "train --recipe r.yaml --model base --dry-run", 0),
    ("E0404", "eval no", f"{EVAL} pairs.jsonl", 0),
    ("E0404", "push no a/b", "push model a/b --dry-run", 0),
    ("E0405", f"{EVAL.replace('model', 'plain')} pairs.jsonl", "eval plain --data pairs.jsonl --chat-template tulu", 0),
    ("E0405", f"{SCORE} --chat-template clock.jinja", f"{SCORE} --chat-template date.jinja", 0),
    ("E0407", f"{EVAL.replace('model', 'unsafe')} pairs.jsonl", f"{EVAL} pairs.jsonl", 0),
    ("E0408", f"{EVAL.replace('model', 'manifest')} pairs.jsonl", f"{EVAL} pairs.jsonl", 0),
    ("E0415", f"{EVAL.replace('model', 'pad')} pairs.jsonl", f"{EVAL} pairs.jsonl", 0),
    ("E0471", "push unsafe a/b --dry-run", "push model a/b --dry-run", 0),
    ("E0472", "push short a/b --dry-run", "push model a/b --dry-run", 0),
    ("E0501", f"{SCORE} --output no/folder/out.jsonl", f"{SCORE} --output out.jsonl", 0),
    ("E0601", f"{SCORE} --output pairs.jsonl", f"{SCORE} --output out.jsonl", 0),
    ("E0601", f"{SCORE} --output base", f"{SCORE} --output out.jsonl", 0),
]
HUB = "needs answers of a Hub: tests/hub/test_push.py"
NOT_FOLLOWED = {
    "E0203": "needs a Hub dataset: tests/data/test_formats.py",
    "E0208": "needs two nodes that differ: tests/training/test_engine.py",
    **dict.fromkeys(("E0273", "E0274", "E0275", "E0276", "E0277", "E0278"), HUB),
    **dict.fromkeys(("E0570", "E0771", "E0772", "E0773", "E0774", "E0775"), HUB),
    "E0402": "a different checkpoint is the advice: tests/model/test_loading.py",
    "E0403": "restored files are the advice: tests/model/test_loading.py",
    "E0406": "a different model is the advice: tests/model/test_loading.py",
    "E0409": "a repaired checkpoint is the advice: tests/evaluation, tests/model",
    "E0410": "needs a model with this RoPE scaling: tests/packing/test_prefix_sharing.py",
    "E0411": "needs a model with few positions: tests/model/test_loading.py",
    "E0412": "a different model is the advice: tests/packing/test_prefix_sharing.py",
    "E0413": "needs a base model and peft's merge: tests/field/adapter.yaml",
    "E0414": "a different checkpoint is the advice: tests/field/checkpoint_formats.yaml",
    "E0416": "needs a device that computes in fp16: tests/model/test_fidelity.py",
    "E0502": "needs a full disk: tests/test_checkpoint.py",
    "E0503": "needs a full device: tests/model/test_rewards.py",
    "E0504": "needs a broken compiler: tests/launch/test_supervise.py",
    "E0505": "needs a machine without a CUDA device, and one with it: tests/model/test_loading.py",
    "E0507": "needs a machine without TensorBoard: tests/training/test_tracking.py",
    "E0506": "needs two nodes: tests/training/test_snapshots.py",
    "E0602": "needs a second process: tests/launch/test_supervise.py",
    "E0603": "needs an interrupted run: tests/training/test_resume.py",
    "E0604": "refused as E0603 before: tests/training/test_training_state.py",
    "E0702": "needs a tracker that fails: tests/training/test_tracking.py",
    "E0701": "needs a Hub: tests/test_checkpoint.py",
    "E0801": "needs a process that dies: tests/launch/test_supervise.py",
    "E0802": "needs a run of NaN: tests/training/test_trainer.py",
    "E0803": "needs a launcher that dies: tests/launch/test_supervise.py",
    "E0805": "needs two nodes: tests/launch/test_supervise.py",
    "E7001": "a bug: tests/test_errors.py",
}


def test_every_id_is_in_one_of_the_tables() -> None:
    followed = {id for id, *_ in FOLLOWED}
    assert followed | NOT_FOLLOWED.keys() == ERRORS.keys()
    assert not followed & NOT_FOLLOWED.keys()


@pytest.fixture
def place(checkpoint: Path, causal_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("rmtool.dataset.report.draw_lengths", lambda *_: None)  # half a second; tests/cli has it
    for name, rows in ROWS.items():
        write_jsonl(tmp_path / name, rows)
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    shutil.copytree(causal_lm, tmp_path / "base")
    for name in ("model", "plain", "unsafe", "manifest", "short", "linked", "pad"):
        shutil.copytree(checkpoint, tmp_path / name)
    config = json.loads((tmp_path / "plain" / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "plain" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((tmp_path / "pad" / "config.json").read_text()) | {"pad_token_id": 10**6}
    (tmp_path / "pad" / "config.json").write_text(json.dumps(config))
    (tmp_path / "unsafe" / "model.safetensors").unlink()
    (tmp_path / "manifest" / "rmtool.json").write_text("{")
    (tmp_path / "short" / "model.safetensors").write_bytes(b"\x08\x00\x00")
    (tmp_path / "linked" / "tokenizer.json").unlink()
    (tmp_path / "linked" / "tokenizer.json").symlink_to(tmp_path / "pairs.txt")
    return tmp_path


@pytest.mark.parametrize(
    ("id", "command", "followed", "code"), FOLLOWED, ids=[f"{id} {line}" for id, line, *_ in FOLLOWED]
)
def test_the_advice_works(rmtool: Any, place: Path, id: str, command: str, followed: str, code: int) -> None:
    shown = rmtool(*arguments(command))
    assert shown.error == id, shown.err
    again = rmtool(*arguments(followed))
    assert again.code == code, again.err


def arguments(line: str) -> list[str]:
    """Split at spaces, but not within brackets."""
    return re.findall(r"(?:\[[^\]]*\]|\S)+", line)
