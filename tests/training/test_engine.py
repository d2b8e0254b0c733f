"""The same step on every engine: one process, DDP, FSDP2, ZeRO-2 and ZeRO-3, several nodes; and ranks that fail.

Complete runs on CPU, over gloo, as a user types them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import PROGRAM, ROOT, free_port, group_members, pair_rows, until, write_jsonl
from safetensors.torch import load_file, save_file

from rmtool.launch import supervise as launch
from rmtool.recipe import load_recipe
from rmtool.training.engine import eval_precision
from rmtool.training.worker_status import process_state

ROWS = 49  # 9 are held out: on two ranks one has five, on four one has three


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, causal_lm: Path) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    shutil.copytree(causal_lm, folder / "lm")
    write_jsonl(folder / "pairs.jsonl", pair_rows(ROWS))
    return folder


def command(output: str, engine: str, processes: int, *more: str) -> list[str | Path]:
    settings = ("data.holdout=9", "train.batch_size=8", "train.max_steps=20", "train.epochs=10", "train.precision=fp32",
                "train.learning_rate=1e-3", "train.eval_every=10", "train.weight_decay=0.01",
                f"launch.engine={engine}")  # fmt: skip
    flags = [word for setting in settings for word in ("--set", setting)]
    return [PROGRAM, "train", "--recipe", "smollm2-135m", "--model", "lm", "--data", "pairs.jsonl", *flags,
            "--gpus-per-node", str(processes), "--output", output, *more]  # fmt: skip


def train(place: Path, output: str, engine: str, processes: int, *more: str) -> Path:
    shown = subprocess.run(command(output, engine, processes, *more), cwd=place, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    return place / output


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    return train(place, "alone", "single", 1)


def steps(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(folder: Path, other: Path, tolerance: float = 1.0) -> None:
    """Losses, metrics and eval to 1e-5, final fp32 weights to 1e-4, each tensor as a whole."""
    mine, theirs = steps(folder), steps(other)
    assert len(mine) == len(theirs) == 20
    for one, two in zip(mine, theirs, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"step_seconds", "peak_memory"}:
            assert one[name] == pytest.approx(two[name], rel=2e-5 * tolerance, abs=1e-5 * tolerance), name
    weights, expected = (load_file(path / "model" / "model.safetensors") for path in (folder, other))
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert weights[name].dtype == value.dtype
        assert (weights[name] - value).norm() <= 1e-4 * tolerance * value.norm(), name


@pytest.mark.parametrize(
    ("engine", "processes", "more"),
    [
        ("ddp", 2, ()),
        slow("ddp", 4, ("--set", "train.tokens_per_pack=60")),
        slow("fsdp2", 2, ("--set", "train.tokens_per_pack=60")),
        slow("fsdp2", 3, ("--set", "train.tokens_per_pack=60", "--set", "train.gradient_checkpointing=true")),
        slow("zero2", 2, ("--set", "train.tokens_per_pack=60")),
        slow("zero2", 4, ("--set", "launch.offload_optimizer=true")),
        slow("zero3", 4, ("--set", "train.tokens_per_pack=60", "--set", "train.gradient_checkpointing=true")),
    ],
)
def test_every_engine_takes_the_same_steps(
    place: Path, alone: Path, engine: str, processes: int, more: tuple[str, ...]
) -> None:
    name = "-".join((engine, str(processes), *(word.partition("=")[0] for word in more[1::2])))
    folder = train(place, name, engine, processes, *more)
    assert_same(folder, alone)
    log = (folder / "rank-1.log").read_text()  # it has one: there was a second process
    assert "Traceback" not in log
    for file in ("config.json", "tokenizer.json", "rmtool.json"):
        assert (folder / "model" / file).is_file()


@pytest.mark.slow
def test_fsdp2_rounds_what_autocast_rounds_and_nothing_else(place: Path) -> None:
    """Weights of norms, embedding and score head stay fp32, and gradients are averaged in fp32: in bf16, too, the first
    steps are those of one process. A rounded norm shows in the second one.
    """
    half = ("--set", "train.precision=bf16", "--set", "train.max_steps=4", "--set", "train.tokens_per_pack=60")
    one, two = (train(place, f"bf16-{engine}", engine, count, *half) for engine, count in (("single", 1), ("fsdp2", 2)))
    for mine, theirs in zip(steps(two), steps(one), strict=True):
        assert mine["train/rm/loss"] == pytest.approx(theirs["train/rm/loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_two_launchers_are_two_nodes(place: Path, alone: Path) -> None:
    port = free_port()
    nodes = ("--nodes", "2", "--main-address", "127.0.0.1", "--main-port", str(port))
    running = [
        subprocess.Popen(command("nodes", "zero3", 1, *nodes, "--node-rank", rank), cwd=place, stderr=subprocess.PIPE)
        for rank in "01"
    ]
    shown = [process.communicate(timeout=200)[1].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0], shown
    assert_same(place / "nodes", alone)
    assert "node 1 is done" in shown[1]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_adapters_of_sharded_weights_are_merged_and_the_head_is_saved(place: Path, engine: str) -> None:
    lora = ("--set", "lora.rank=4")
    one, two = (
        place / name if (place / name).exists() else train(place, name, *world, *lora)
        for name, world in (("lora-1", ("single", 1)), (f"lora-{engine}", (engine, 2)))
    )
    assert_same(two, one)
    start, saved = load_file(place / "lm" / "model.safetensors"), load_file(two / "model" / "model.safetensors")
    assert not (start["model.layers.0.mlp.up_proj.weight"] == saved["model.layers.0.mlp.up_proj.weight"]).all()
    assert saved["score.weight"].norm() > 0


@pytest.mark.slow
def test_a_new_head_has_the_papers_std_under_zero3(place: Path, tmp_path: Path) -> None:
    """Before any step: a learning rate that moves nothing."""
    rate = ("--set", "train.learning_rate=1e-30", "--set", "train.max_steps=1", "--set", "train.weight_decay=0")
    heads = [
        load_file(train(place, f"head-{engine}", engine, count, *rate) / "model" / "model.safetensors")["score.weight"]
        for engine, count in (("single", 1), ("zero3", 2))
    ]
    assert (heads[0] == heads[1]).all()
    assert heads[1].std().item() == pytest.approx(33**-0.5, rel=0.3)  # 32 draws


@pytest.mark.slow
def test_a_head_of_another_name_or_of_several_labels_is_read_or_replaced_under_zero3(place: Path) -> None:
    rate = ("--set", "train.learning_rate=1e-30", "--set", "train.max_steps=1", "--set", "train.weight_decay=0")
    weights, head = load_file(place / "lm" / "model.safetensors"), torch.linspace(-1, 1, 32)[None]
    for name, more in (("value_head", {"value_head.weight": head}), ("labels", {"score.weight": head.repeat(3, 1)})):
        save_file(weights | more, shutil.copytree(place / "lm", place / name) / "model.safetensors", {"format": "pt"})
    kept = train(place, "kept", "zero3", 2, *rate, "--model", "value_head")
    assert (load_file(kept / "model" / "model.safetensors")["score.weight"] == head).all()
    new = [
        train(place, f"labels-{engine}", engine, count, *rate, "--model", "labels", "--set", "model.head=new")
        for engine, count in (("single", 1), ("zero3", 2))
    ]
    one, two = (load_file(folder / "model" / "model.safetensors")["score.weight"] for folder in new)
    assert one.shape == (1, 32)
    assert (one == two).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "engine", "more"),
    [
        ("data", "ddp", ()),
        ("model", "zero3", ()),
        ("engine", "zero3", ()),
        ("recipe", "ddp", ("--set", "lora.rank=4")),
    ],
)
def test_nodes_that_differ_do_not_train(
    place: Path, tmp_path: Path, what: str, engine: str, more: tuple[str, ...]
) -> None:
    """Some of these ranks would wait for each other forever, once engines communicate."""
    other = tmp_path / "other"
    shutil.copytree(place / "lm", other / "lm")
    write_jsonl(other / "pairs.jsonl", pair_rows(ROWS)[:: -1 if what == "data" else 1])
    if what == "model":
        config = json.loads((other / "lm" / "config.json").read_text())
        (other / "lm" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    nodes = ("--nodes", "2", "--main-address", "127.0.0.1", "--main-port", str(free_port()))
    first = command("n", "zero2" if what == "engine" else engine, 1, *nodes, "--node-rank", "0")
    second = command("n", engine, 1, *nodes, "--node-rank", "1", *more)
    running = [
        subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE)
        for words, folder in ((first, place), (second, other))
    ]
    shown = [process.communicate(timeout=200)[1].decode() for process in running]
    assert [process.returncode for process in running] == [2, 2], shown
    assert all("E0208" in text and f"rank 1 and rank 0 have different {what}" in text for text in shown)


def ranks(folder: Path) -> dict[int, int]:
    """Process ids of the running ranks."""
    found = [json.loads(path.read_text()) for path in folder.glob("rank-*.json")]
    return {status["rank"]: status["pid"] for status in found if status["exit"] is None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "number", "words"),
    [(1, signal.SIGKILL, "rank 1 of 2 was killed by the system (SIGKILL), often out of memory"),
     (0, signal.SIGKILL, "rank 0 of 2 was killed by the system (SIGKILL), often out of memory"),
     (1, signal.SIGSTOP, "rank 1 of 2 is stopped (SIGSTOP)"),
     (1, signal.SIGSEGV, "rank 1 of 2 crashed (SIGSEGV)"), (1, signal.SIGABRT, "rank 1 of 2 crashed (SIGABRT)")],
)  # fmt: skip
def test_all_ranks_are_gone_soon_after_one(place: Path, tmp_path: Path, rank: int, number: int, words: str) -> None:
    output = tmp_path / "run"
    long = ("--set", "train.max_steps=null", "--set", "train.epochs=10000")
    running = subprocess.Popen(
        command(str(output), "ddp", 2, *long), cwd=place, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    until(lambda: (output / "metrics.jsonl").exists() and len(steps(output)) > 3)
    found = ranks(output)
    assert set(found) == {0, 1}
    os.kill(found[rank], number)
    # README's ten seconds, without the time that a loaded machine takes to end processes.
    assert launch.PATIENCE_S + launch.GRACE_S <= 10
    shown = running.communicate(timeout=60)[1].decode()
    assert running.returncode == 8
    assert words in shown
    assert ("train.tokens_per_pack" in shown) == (number == signal.SIGKILL)
    if number in (signal.SIGSEGV, signal.SIGABRT):
        assert "Fatal Python error" in (output / f"rank-{rank}.log").read_text()
    assert f"rank-{rank}.log" in shown
    assert not any(group_members(pid) for pid in found.values())
    if number == signal.SIGKILL:  # the other rank reports a lost connection
        assert json.loads((output / f"rank-{1 - rank}.json").read_text())["error"]["code"] == "E0805"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_of_several_processes_leaves_none(place: Path, tmp_path: Path, number: int, code: int) -> None:
    output = tmp_path / "run"
    long = ("--set", "train.max_steps=null", "--set", "train.epochs=10000")
    running = subprocess.Popen(
        command(str(output), "zero3", 2, *long), cwd=place, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    until(lambda: (output / "metrics.jsonl").exists() and len(steps(output)) > 1)
    found = ranks(output)
    assert len(found) == 2
    running.send_signal(number)
    assert running.wait(60) == code  # it saves a snapshot first
    until(lambda: not any(group_members(pid) for pid in found.values()), 10)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["single", "ddp"])
def test_a_process_that_hangs_before_it_starts_is_ended_too(place: Path, tmp_path: Path, engine: str) -> None:
    """One that is stopped is a failure; one that sleeps ends with Ctrl-C."""
    hangs = "os.kill(os.getpid(), 19)" if engine == "ddp" else "time.sleep(600)"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "words = sys.orig_argv\n"
        "worker = 'rmtool.training.worker' in words and 'accelerate.commands.launch' not in words\n"
        "if worker and os.environ.get('RANK', '1') == '1':\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        f"    {hangs}\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    running = subprocess.Popen(
        command(str(tmp_path / "run"), engine, 1 if engine == "single" else 2), cwd=place, env=environment,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(2, signal.SIG_DFL),
    )  # fmt: skip
    until(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()))
    if engine == "single":
        running.send_signal(signal.SIGINT)
    shown = running.communicate(timeout=60)[1].decode()
    assert running.returncode == (8 if engine == "ddp" else 130), shown
    assert ("a process that was still starting up is stopped (SIGSTOP)" in shown) == (engine == "ddp")
    assert process_state(int((tmp_path / "pid").read_text())) in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


@pytest.mark.slow
def test_a_rank_that_fails_alone_is_named_with_its_last_lines(place: Path, tmp_path: Path) -> None:
    """Rank 1 raises an exception; rank 0 only loses the connection."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1' and 'rmtool.training.worker' in ' '.join(sys.orig_argv):\n"
        "    import accelerate.utils\n"
        "    def broken(*_): print('my own words'); raise ValueError('only on one rank')\n"
        "    accelerate.utils.gather_object = broken\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    shown = subprocess.run(
        command(str(tmp_path / "run"), "ddp", 2), cwd=place, env=environment, capture_output=True, text=True
    )
    assert shown.returncode == 70
    assert "internal error in rank 1 of 2" in shown.stderr
    assert "only on one rank" in shown.stderr


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ([], "fp16"),
        ([("lora.rank", 4)], "fp16"),
        ([("train.compile", True)], "bf16"),
        ([("launch.engine", "zero3")], "bf16"),
        ([("launch.engine", "fsdp2"), ("launch.gpus_per_node", 2)], "bf16"),
    ],
)
def test_evaluations_are_in_auto_where_overflows_can_be_found(
    settings: list[tuple[str, object]], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmtool.model.precision.default_device", lambda: torch.device("cuda"))
    assert (
        eval_precision(
            load_recipe(str(ROOT / "recipes" / "smollm2-135m.yaml"), [("train.precision", "bf16"), *settings])
        )
        == precision
    )
