"""Steps that go wrong: NaN and inf never reach the weights, and a device without memory gets smaller packs."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import PROGRAM, Lines, free_port, group_members, write_recipe
from step_ranks import start, state, take

from rmtool.config import TrainConfig
from rmtool.data.rejects import Rejects
from rmtool.dataset.split import load_split
from rmtool.errors import ExitCode, RmtoolError
from rmtool.model.loading import training_encoder
from rmtool.model.out_of_memory import is_out_of_memory, unless_out_of_memory
from rmtool.model.reward_model import RewardModel
from rmtool.recipe import CONFIG_FILE, dump_recipe, load_recipe
from rmtool.training import nonfinite, worker
from rmtool.training.engine import Engine
from rmtool.training.nonfinite import (
    SkippedStep,
    input_gradient_norm,
    nan_unless_finite,
    stop_or_skip,
    trace_step,
)
from rmtool.training.pack_budget import read_pack_budget, write_pack_budget
from rmtool.training.step import Trainer, training_step
from rmtool.training.tracking import read_metrics
from rmtool.training.trainer import run_eval

HERE = Path(__file__).parent


@pytest.fixture
def recipe(causal_lm: Path, tmp_path: Path) -> Path:
    return write_recipe(causal_lm, tmp_path)


# NaN and inf


@pytest.mark.parametrize("kind", ["forward", "gradient", "norm"])
@pytest.mark.parametrize("loss", ["bradley_terry", "hinge"])
@pytest.mark.parametrize("tokens", [1, 10**6])
def test_a_skipped_step_leaves_no_trace_and_names_its_row(kind: str, loss: str, tokens: int, recipe: Path) -> None:
    trainer, batches = start(str(recipe), [("train.loss", loss), ("train.tokens_per_pack", tokens)])
    other, _ = start(str(recipe), [("train.loss", loss), ("train.tokens_per_pack", tokens)])
    take(trainer, batches[0], 1, "none")
    found = take(trainer, batches[1], 2, kind)
    assert (found["same"], found["rows"]) == (True, (found["place"],))
    last = take(trainer, batches[2], 3, "none")
    take(other, batches[0], 1, "none")
    assert take(other, batches[2], 3, "none")["state"] == last["state"]
    assert not last["same"]


@pytest.mark.parametrize(
    ("rewards", "loss", "finite"),
    [
        ([1.0, 2.0], 0.5, True),
        ([math.inf, 2.0], 0.0, False),  # a hinge
        ([math.nan, 2.0], 0.0, False),
        ([1e20, 2.0], math.inf, False),  # a square of finite rewards
    ],
)
def test_a_reward_or_a_loss_alone_is_enough(rewards: list[float], loss: float, finite: bool) -> None:
    rewards_N = torch.tensor(rewards, requires_grad=True)
    term = nan_unless_finite(rewards_N, torch.tensor([loss]))
    term.backward()
    assert rewards_N.grad is not None
    assert (term.item() == 0) == finite
    assert rewards_N.grad.tolist() == [0.0, 0.0] if finite else rewards_N.grad.isnan().all()


def test_a_weight_of_inf_stops_the_run_and_moves_no_weight(recipe: Path) -> None:
    trainer, batches = start(str(recipe), [("train.on_nonfinite", "stop")])
    take(trainer, batches[0], 1, "none")
    with torch.no_grad():
        next(trainer.model.backbone.layers[0].parameters()).view(-1)[0] = torch.inf
    found = take(trainer, batches[1], 2, "none")
    assert found["same"]
    assert found["error"] == "step 2: the loss is NaN or inf"
    assert found["place"] in str(sorted({str(item.metadata.place) for item in batches[1]}))
    assert set(found["rows"]) <= {str(item.metadata.place) for item in batches[1]}


def test_a_gradient_without_a_single_cause_names_all_rows(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, batches = start(str(recipe))
    monkeypatch.setattr(trainer.engine, "update", lambda rate: float("inf"))
    result = training_step(trainer, batches[0], 1e-3, 1)
    assert result.skipped
    assert sorted(result.skipped.rows) == sorted(str(item.metadata.place) for item in batches[0])
    assert result.metrics() == {"skipped": True}


def test_ranks_trace_equally_many_rows_and_each_row_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass under ZeRO-3 needs all ranks; this one has fewer rows than another."""
    others = iter([[], 3, ["a:1"]])  # its rows of NaN, its number of rows, its rows with such a gradient
    monkeypatch.setattr(nonfinite, "gather_object", lambda values: [*values, next(others)])
    own, stand_in = (SimpleNamespace(metadata=SimpleNamespace(place=place)) for place in ("a:7", "a:0"))
    traced: list[Any] = []
    found = trace_step(4, [], [own, own], stand_in, lambda item: bool(traced.append(item)))  # type: ignore
    assert traced == [own, own, stand_in]
    assert found.rows == ("a:7 (rank 0)", "a:1 (rank 1)")


def test_the_input_gradient_needs_no_trainable_embedding_and_leaves_no_hook() -> None:
    embedding = torch.nn.Embedding(3, 2).requires_grad_(False)
    norm = input_gradient_norm(embedding, lambda: 3 * embedding(torch.tensor([1])).sum())
    assert norm == pytest.approx(3 * math.sqrt(2))
    assert not embedding(torch.tensor([1])).requires_grad


def test_more_skips_than_allowed_stop_the_run() -> None:
    train = TrainConfig(8, 1e-3, on_nonfinite="skip", max_skips=2)
    skipped = [SkippedStep(step, "loss", (f"a:{step}",)) for step in (3, 5, 9)]
    stop_or_skip(train, skipped[:2])
    with pytest.raises(RmtoolError) as caught:
        stop_or_skip(train, skipped)
    assert (caught.value.id, caught.value.exit_code, caught.value.rows) == ("E0802", ExitCode.TRAINING, ("a:9",))
    assert "step 9: the loss is NaN or inf, and 2 steps before it were skipped" in caught.value.what
    with pytest.raises(RmtoolError):
        stop_or_skip(TrainConfig(8, 1e-3), skipped[:1])


def test_a_run_reports_the_steps_that_it_skipped(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = RewardModel.forward, list[bool]()

    def forward(self: RewardModel, batch: Any) -> torch.Tensor:
        calls.append(self.training and torch.is_grad_enabled() and batch.input_ids.numel() > 1)
        return plain(self, batch) * (float("nan") if sum(calls) == 2 and calls[-1] else 1.0)

    monkeypatch.setattr(RewardModel, "forward", forward)
    monkeypatch.setattr("rmtool.training.worker.choose_layout", lambda model, *_: shared(model))
    (tmp_path / CONFIG_FILE).write_text(dump_recipe(load_recipe(str(recipe), [("train.tokens_per_pack", 10**6)])))
    worker.run(load_recipe(str(tmp_path / CONFIG_FILE)), tmp_path, Accelerator(cpu=True), said := Lines())
    rows = read_metrics(tmp_path)
    assert [row.get("skipped", False) for row in rows] == [False, True, False, False]
    assert not [name for name in rows[1] if name.startswith("train/rm/") and name != "train/rm/lr"]
    assert "grad_norm" not in rows[1]
    (skipped,) = json.loads((tmp_path / "report.json").read_text())["skipped_steps"]
    assert (skipped["step"], skipped["what"], len(skipped["rows"])) == (2, "loss", 8)
    assert [line for line in said.lines if line.startswith("skipped step 2: the loss is NaN or inf in ")]


def shared(model: RewardModel) -> Any:
    model.share_prompts(True)
    return SimpleNamespace(reason=None)


def on_ranks(recipe: Path, count: int, *faults: str) -> list[list[dict[str, Any]]]:
    """What each rank reports of each step."""
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}  # fmt: skip
    if "zero" not in recipe.read_text():
        common["ACCELERATE_USE_CPU"] = "true"
    running = [
        subprocess.Popen(
            [sys.executable, str(HERE / "step_ranks.py"), str(recipe), *faults],
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in map(str, range(count))
    ]  # fmt: skip
    try:
        shown = [process.communicate(timeout=200) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * count, shown
    return [[json.loads(line) for line in out.splitlines() if line.startswith('{"kind"')] for out, _ in shown]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "more"),
    [("ddp", ""), ("fsdp2", ""), ("zero2", ""), ("zero3", ""), ("zero2", ", offload"),
     ("zero2", ", max_grad_norm: null"),
     ("zero3", ", max_grad_norm: null, gradient_checkpointing: true")],
)  # fmt: skip
def test_two_ranks_skip_and_stop_together(engine: str, more: str, causal_lm: Path, tmp_path: Path) -> None:
    """Goes red if DeepSpeed no longer keeps a gradient of NaN or inf from weights and moments."""
    recipe = write_recipe(causal_lm, tmp_path, engine, 2, more.replace(", offload", ""))
    recipe.write_text(recipe.read_text().replace("240", "120"))  # several packs per rank
    if "offload" in more:
        recipe.write_text(recipe.read_text().replace("gpus_per_node: 2", "gpus_per_node: 2, offload_optimizer: true"))
    # ZeRO-3 sums the norm of its partitions in fp64: finite gradients have a finite norm.
    kinds = ("none", "forward", "gradient", "gradient" if engine == "zero3" else "norm", "none", "stop")
    ranks, plain = on_ranks(recipe, 2, *kinds), on_ranks(recipe, 2, "none", "none")
    assert [[step["kind"] for step in steps] for steps in ranks] == [list(kinds)] * 2
    for one, two in zip(*ranks, strict=True):
        assert one["rows"] == two["rows"]
        assert one["same"] == two["same"] == (one["kind"] != "none")
        if one["kind"] != "none":
            assert len(one["rows"]) == 1
            assert re.fullmatch(re.escape(one["place"]) + r" \(rank [01]\)", one["rows"][0])
        assert bool(one["error"]) == bool(two["error"]) == (one["kind"] == "stop")
    for steps, expected in zip(ranks, plain, strict=True):
        assert steps[4]["state"] == expected[1]["state"]
        assert len(steps[0]["storages"]) > 1
        if engine == "ddp":  # the gradients of all packs are in its one bucket: they are held once
            assert {count for step in steps for count in step["storages"]} == {1}


# out of memory


class FakeMemory:
    """A device that is full in the forward or backward of some packs, and what is left of them then."""

    def __init__(self, trainer: Trainer, full: Any, where: str = "forward"):
        self.full, self.where, self.left = full, where, list[Any]()
        self.sizes = list[int]()
        trainer.model.register_forward_hook(self.run)
        trainer.model.backbone.layers[0].register_forward_hook(lambda *args: self.left.append(weakref.ref(args[2])))
        discard = trainer.engine.discard_gradients

        def check() -> None:
            discard()
            assert all(parameter.grad is None for parameter in trainer.model.parameters())
            assert not [each for each in self.left if each() is not None], "activations of the failed pack are held"

        trainer.engine.discard_gradients = check  # type: ignore[method-assign]

    def run(self, module: Any, args: Any, rewards: torch.Tensor) -> None:
        self.sizes.append(args[0].input_ids.numel())
        if self.full(self.sizes):
            if self.where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            if rewards.requires_grad:
                rewards.register_hook(self.fail)

    def fail(self, gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_out_of_memory_is_taken_again_with_smaller_packs(where: str, recipe: Path) -> None:
    """Bit-identical to a run whose budget was halved at that step; the second pack fails, after the first one."""
    trainer, batches = start(str(recipe))
    trainer.ui = said = Lines()
    take(trainer, batches[0], 1, "none")
    memory = FakeMemory(trainer, lambda sizes: len(sizes) == 2, where)
    found = [training_step(trainer, batch, 1e-3, step) for step, batch in enumerate(batches[1:3], 2)]
    assert trainer.tokens_per_pack == 120
    assert said.lines == ["out of memory at 240 tokens per pack: continuing with 120 (the steps stay the same)"]
    assert max(memory.sizes[2:]) <= 120 < max(memory.sizes[:2])

    other, _ = start(str(recipe))
    take(other, batches[0], 1, "none")
    other.tokens_per_pack = 120
    assert [training_step(other, batch, 1e-3, step) for step, batch in enumerate(batches[1:3], 2)] == found
    assert state(other.engine) == state(trainer.engine)


def test_a_small_device_halves_until_the_packs_fit(recipe: Path) -> None:
    trainer, batches = start(str(recipe), [("train.tokens_per_pack", 10**6)])
    trainer.ui = said = Lines()
    FakeMemory(trainer, lambda sizes: sizes[-1] > 100)
    training_step(trainer, batches[0], 1e-3, 1)
    tokens = sum(item.group.unique_tokens for item in batches[0])
    assert len(said.lines) <= 3  # a budget that makes no other packs is not tried
    assert trainer.tokens_per_pack < tokens


def test_a_row_that_alone_is_too_much_is_named(recipe: Path) -> None:
    trainer, batches = start(str(recipe))
    longest = max(batches[0], key=lambda item: item.group.unique_tokens)
    limit = longest.group.unique_tokens - 1
    FakeMemory(trainer, lambda sizes: sizes[-1] > limit)
    before = state(trainer.engine)
    with pytest.raises(RmtoolError) as caught:
        training_step(trainer, batches[0], 1e-3, 1)
    error = caught.value
    assert (error.id, error.exit_code) == ("E0503", ExitCode.MACHINE)
    places = {str(item.metadata.place): item.group.unique_tokens for item in batches[0]}
    assert error.what == f"out of memory in a row of {places[str(error.place)]:,} tokens"
    assert places[str(error.place)] > limit
    assert state(trainer.engine) == before


def test_an_evaluation_out_of_memory_is_run_again_with_smaller_packs(recipe: Path) -> None:
    trainer, _ = start(str(recipe))
    trainer.ui = said = Lines()
    data = load_split(
        trainer.recipe, training_encoder(trainer.recipe, Path(trainer.recipe.model.path))[0], Rejects(), said
    )
    plain = run_eval(trainer, data.train, said)
    assert trainer.engine.wrapped.training  # else gradient checkpointing would be off in the next step
    said.lines.clear()
    memory = FakeMemory(trainer, lambda sizes: sizes[-1] > 120)
    assert run_eval(trainer, data.train, said) == pytest.approx(plain, abs=1e-6)
    assert said.lines == ["out of memory at 240 tokens per pack: continuing with 120 (the steps stay the same)"]
    memory.full = lambda sizes: True
    with pytest.raises(RmtoolError) as caught:
        run_eval(trainer, data.train, said)
    assert caught.value.id == "E0503"
    assert "pairs.jsonl:" in str(caught.value.place)
    assert "out of memory in a row of" in caught.value.what


def test_steps_do_not_depend_on_overflows_of_evaluations(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers that are scaled for fp16 compute as before in the next step, which bf16 autocast would tell."""
    monkeypatch.setattr("rmtool.model.precision.lacks_bf16", lambda: False)
    monkeypatch.setattr("rmtool.training.step.eval_precision", lambda _: "fp16")
    states = []
    for evaluates in (False, True):
        trainer, batches = start(str(recipe), [("train.precision", "bf16")])
        trainer.model.backbone.get_submodule("layers.0.mlp.up_proj").weight.data *= 3e5
        if evaluates:
            data = load_split(
                trainer.recipe, training_encoder(trainer.recipe, Path(trainer.recipe.model.path))[0], Rejects(), Lines()
            )
            run_eval(trainer, data.train, Lines())
            assert trainer.model.overflow_guard.repeated
        assert trainer.model.precision == "bf16"
        take(trainer, batches[0], 1, "none")
        states.append(state(trainer.engine))
    assert states[0] == states[1]


def test_a_bug_is_not_taken_for_a_full_device() -> None:
    def fail() -> None:
        raise RuntimeError("The size of tensor a must match")

    with pytest.raises(RuntimeError, match="must match"):
        unless_out_of_memory(fail)


def test_what_torch_raises_without_memory() -> None:
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(10**14)
    assert is_out_of_memory(cpu.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("a DefaultCPUAllocator: can't allocate memory in a sentence"))
    assert not is_out_of_memory(ValueError(str(cpu.value)))


NCCL = "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error, NCCL version 2.27.5\nLast error:\n"


@pytest.mark.parametrize(
    ("kind", "message", "expected"),
    [
        (torch.AcceleratorError, "CUDA error: out of memory\nCUDA kernel errors might be reported later", True),
        (torch.AcceleratorError, "CUDA error: an illegal memory access was encountered", False),
        (torch.distributed.DistBackendError, NCCL + "Cuda failure 2 'out of memory'", True),
        (torch.distributed.DistBackendError, NCCL + "Cuda failure 'out of memory'", True),
        (torch.distributed.DistBackendError, NCCL + "socketProgress: Connection closed by remote peer", False),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`", False),
    ],
)
def test_what_cuda_raises_without_memory(kind: type[RuntimeError], message: str, expected: bool) -> None:
    assert is_out_of_memory(kind(message)) == expected


def test_a_smaller_budget_is_for_the_same_recipe(tmp_path: Path) -> None:
    assert read_pack_budget(tmp_path, 8192) == 8192
    write_pack_budget(tmp_path, 8192, 4096)
    assert (read_pack_budget(tmp_path, 8192), read_pack_budget(tmp_path, 6000)) == (4096, 6000)
    assert [path.name for path in tmp_path.iterdir()] == ["pack-budget.json"]


def test_all_ranks_start_with_the_smallest_budget_of_them(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes may not share the folder in which one was out of memory."""
    monkeypatch.setattr("rmtool.training.step.gather_object", lambda values: [*values, 60])
    trainer, _ = start(str(recipe))
    assert trainer.tokens_per_pack == 60


@pytest.mark.parametrize("full", [False, True])
def test_a_rank_that_others_wait_for_leaves_its_budget_and_ends(full: bool, recipe: Path) -> None:
    trainer, batches = start(str(recipe))
    FakeMemory(trainer, lambda sizes: len(sizes) == 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "can_retry", False)
        if full:
            patch.setattr(trainer, "folder", trainer.folder / "gone")
        with pytest.raises(RmtoolError) as caught:
            training_step(trainer, batches[0], 1e-3, 1)
    assert (caught.value.id, caught.value.what) == ("E0503", "out of memory at 240 tokens per pack")
    hint = "set train.tokens_per_pack=120" if full else "continues from the last snapshot with 120 tokens per pack"
    assert hint in caught.value.hint
    assert read_pack_budget(recipe.parent, 240) == (240 if full else 120)


@pytest.mark.parametrize("applied", [False, True])
def test_a_gradient_of_nan_that_deepspeed_has_used_is_a_bug(applied: bool) -> None:
    """It decides by a flag of its own; a run whose weights are NaN must not go on."""
    wrapped = SimpleNamespace(
        set_gradient_accumulation_boundary=None,
        step=lambda: None,
        get_global_grad_norm=lambda: float("nan"),
        was_step_applied=lambda: applied,
    )
    engine = Engine(Accelerator(cpu=True), None, wrapped, SimpleNamespace(param_groups=[]), None)  # type: ignore[arg-type]
    assert not engine.can_retry
    with pytest.raises(AssertionError, match="NaN") if applied else nullcontext():
        assert math.isnan(engine.update(1e-3))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_a_rank_out_of_memory_starts_all_again_with_smaller_packs(engine: str, causal_lm: Path, tmp_path: Path) -> None:
    """In its second step: the snapshot of the first one is resumed, and the metrics are those of a run without it."""
    recipe = write_recipe(causal_lm, tmp_path, engine, 2, ", max_steps: 3, save_every: 1")
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1' and 'rmtool.training.worker' in ' '.join(sys.orig_argv):\n"
        "    import torch\n"
        "    from rmtool.model.reward_model import RewardModel\n"
        "    plain, large = RewardModel.forward, []\n"
        "    def forward(self, batch):\n"
        "        if batch.input_ids.numel() > 120 and self.training and torch.is_grad_enabled():\n"
        "            large.append(batch)\n"
        "        if len(large) > int(os.environ['FULL_AFTER']):\n"
        "            raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "        return plain(self, batch)\n"
        "    RewardModel.forward = forward\n"
    )
    shown, metrics = {}, {}
    for name, full_after in (("full", "1"), ("plain", "99")):
        paths = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
        environment = {**os.environ, "PYTHONPATH": paths, "FULL_AFTER": full_after}
        words = [PROGRAM, "train", "--recipe", str(recipe), "--output", str(tmp_path / name)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        shown[name], metrics[name] = done.stderr, read_metrics(tmp_path / name)
        statuses = [json.loads(path.read_text()) for path in (tmp_path / name).glob("rank-*.json")]
        assert len(statuses) == 2
        assert not any(group_members(status["pid"]) for status in statuses)
    assert "out of memory at 240 tokens per pack: starting the processes again with 120" in shown["full"]
    assert "an earlier run was out of memory: 120 tokens per pack instead of 240" in shown["full"]
    assert "resuming from step 1 of 3" in shown["full"]
    assert "out of memory" not in shown["plain"]
    assert [row["step"] for row in metrics["full"]] == [1, 2, 3]
    losses = [[row["train/rm/loss"] for row in metrics[name]] for name in ("full", "plain")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
