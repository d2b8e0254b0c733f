"""What a plan says of memory, work and time, by the numbers that it is made of."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import pair_rows, write_jsonl
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForSequenceClassification

from rmtool.config import Recipe
from rmtool.data.rejects import Rejects
from rmtool.dataset.batches import epoch_steps
from rmtool.dataset.split import load_split
from rmtool.model.loading import training_encoder
from rmtool.planning import memory as memories
from rmtool.planning.estimate import estimate_resources
from rmtool.planning.memory import Memory, plan_memory
from rmtool.planning.plan import make_plan
from rmtool.recipe import load_recipe
from rmtool.training.engine import LIVE_PARAMETERS, PERSISTENT_PARAMETERS, REDUCE_BUCKET
from rmtool.ui import SilentUi

LLAMA_8B = {"vocab_size": 128_264, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
WEIGHTS = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336 + 2 * 4096) + 128_264 * 4096 + 2 * 4096
NON_WEIGHT_FILES = 65 * 4096 + 4096  # norms and the score head


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, causal_lm: Path) -> Path:
    """The folder of Llama 3.1 8B, but for its weights."""
    folder = tmp_path_factory.mktemp("llama") / "llama"
    folder.mkdir()
    config = json.loads((causal_lm / "config.json").read_text()) | LLAMA_8B
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def recipe(*settings: str) -> Recipe:
    return named("tulu3-8b", *settings)


def named(name: str, *settings: str) -> Recipe:
    parts = (setting.partition("=") for setting in settings)
    return load_recipe(name, [(key, yaml.safe_load(value)) for key, _, value in parts])


@pytest.fixture(scope="module")
def sharded(llama: Path) -> Memory:
    return plan_memory(recipe("launch.engine=zero3"), llama, 8192)


def test_zero3_shares_weights_gradients_and_optimizer_out(sharded: Memory) -> None:
    memory = sharded
    assert memory.parameters == memory.trainable == WEIGHTS
    assert memory.weights == WEIGHTS * 4 // 64 + 4 * NON_WEIGHT_FILES
    assert memory.gradients == WEIGHTS * 4 // 64
    assert memory.optimizer == WEIGHTS * 8 // 64 + WEIGHTS * 4 // 64  # two moments, and the weights that are stepped
    gathered = 4 * max(LIVE_PARAMETERS, 128_264 * 4096)
    assert memory.buffers == gathered + 6 * REDUCE_BUCKET
    assert memory.host == 0
    assert PERSISTENT_PARAMETERS < 4096 * 1024  # no matrix stays whole


@pytest.mark.slow
def test_fsdp2_shares_them_out_too(llama: Path) -> None:
    memory, matrices = plan_memory(recipe("launch.engine=fsdp2"), llama, 8192), WEIGHTS - 65 * 4096
    assert memory.weights == 4 * 65 * 4096 + matrices * 4 // 64
    assert memory.gradients + memory.optimizer == pytest.approx(WEIGHTS * 12 // 64)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336
    # Three layers' worth in bf16, and gradients of one in bf16 and fp32; or the embedding, received and copied.
    assert memory.buffers == max(12 * layer, 8 * 128_264 * 4096 - memory.activations)
    wide = plan_memory(recipe("launch.engine=fsdp2", "train.precision=fp32"), llama, 8192)
    assert wide.buffers == max(20 * layer, 8 * 128_264 * 4096 - wide.activations)


def test_ddp_holds_gradients_twice_where_it_holds_nothing_else(llama: Path) -> None:
    one = ("launch.engine=ddp", "launch.nodes=1", "launch.gpus_per_node=8")
    memory = plan_memory(recipe(*one), llama, 512)
    assert memory.buffers == memory.gradients - memory.activations > 0


def test_offloaded_states_wait_in_the_host(llama: Path, sharded: Memory) -> None:
    here = sharded
    away = plan_memory(recipe("launch.engine=zero3", "launch.offload_optimizer=true"), llama, 8192)
    assert away.host == here.gradients + here.optimizer
    assert away.total == here.total - away.host


def test_one_process_holds_everything(llama: Path) -> None:
    memory = plan_memory(recipe("launch.engine=single", "launch.nodes=1", "launch.gpus_per_node=1"), llama, 8192)
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * WEIGHTS, 4 * WEIGHTS, 8 * WEIGHTS)
    assert memory.buffers == 0


@pytest.mark.slow
def test_adapters_and_4_bits_take_less(llama: Path) -> None:
    one = ("launch.engine=ddp", "launch.nodes=1", "launch.gpus_per_node=8", "lora.rank=16")
    adapters = plan_memory(recipe(*one), llama, 8192)
    matrices = 32 * (2 * 16 * 8192 + 2 * 16 * (4096 + 1024) + 3 * 16 * (4096 + 14_336))
    assert adapters.trainable == matrices + 4096
    assert adapters.weights == 4 * (WEIGHTS + matrices)
    quantized = plan_memory(recipe(*one, "lora.quantize=4bit"), llama, 8192)
    linear = WEIGHTS - 128_264 * 4096 - NON_WEIGHT_FILES
    assert quantized.weights == pytest.approx(4 * (WEIGHTS - linear + matrices) + 0.516 * linear, rel=1e-3)


def test_a_frozen_backbone_keeps_no_activations(llama: Path, sharded: Memory) -> None:
    frozen = plan_memory(recipe("launch.engine=zero3", "train.freeze=backbone"), llama, 8192)
    assert frozen.trainable == 4096
    assert frozen.activations < sharded.activations / 2


@pytest.mark.parametrize("setting", ["true", "false"])
def test_few_layers_tell_of_all(llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str) -> None:
    shutil.copytree(llama, tmp_path / "ten")
    config = json.loads((llama / "config.json").read_text()) | {"num_hidden_layers": 10}
    (tmp_path / "ten" / "config.json").write_text(json.dumps(config))
    settings = (f"train.gradient_checkpointing={setting}", "launch.engine=zero2")
    few = plan_memory(recipe(*settings), tmp_path / "ten", 2048)
    monkeypatch.setattr(memories, "TRIED_LAYERS", (3, 10))
    assert few.activations == pytest.approx(plan_memory(recipe(*settings), tmp_path / "ten", 2048).activations, 0.01)


def test_what_is_alive_is_counted_and_what_died_is_not() -> None:
    with FakeTensorMode(), memories.LiveTensorTracker([]) as alive:
        first = torch.empty(100)
        view = first[50:]
        second = first * 2
        assert alive.now == alive.most == 800
        del first
        assert alive.now == 800  # the view holds it
        del view, second
        assert alive.now == 0
        assert alive.most == 800


def test_work_is_that_of_the_steps(causal_lm: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(64))
    made = named(
        "smollm2-135m",
        f"model.path={causal_lm}",
        f"data.train=[{tmp_path / 'pairs.jsonl'}]",
        "data.holdout=0",
        "train.batch_size=32",
        "train.tokens_per_pack=100",
        "launch.gpus_per_node=4",
        "launch.engine=ddp",
        "launch.peak_tflops=2e-6",
        "launch.expected_mfu=0.5",
    )
    encoder, _ = training_encoder(made, causal_lm)
    data = load_split(made, encoder, Rejects(), SilentUi()).train
    seen = estimate_resources(made, causal_lm, data, 10)
    assert seen.work is not None
    steps = list(epoch_steps(data.metadata, data.groups, made.train.seed, 0, 32))
    tokens = [sum(unit.group.unique_tokens for unit in units) for units in steps]
    assert seen.work.tokens == sum(tokens) / 2
    assert seen.work.cost > seen.work.tokens  # attention
    assert seen.work.packs >= max(tokens) / 100 / 4
    assert max(unit.group.unique_tokens for units in steps for unit in units) <= seen.work.largest <= 100
    assert 1 <= seen.work.imbalance < 1.5
    config = json.loads((causal_lm / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    head = config["head_dim"]
    weights = layers * (2 * hidden * head * (config["num_attention_heads"] + config["num_key_value_heads"])
                        + 3 * hidden * config["intermediate_size"])  # fmt: skip
    # 4 processes at half of 2 million flops a second
    assert seen.step_seconds == pytest.approx(6 * weights * seen.work.cost * seen.work.imbalance / 4e6)


def test_the_largest_pack_counts_what_its_rows_share_once(causal_lm: Path, tmp_path: Path) -> None:
    """Every row begins with the same words: a pack never passes train.tokens_per_pack for them."""
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(16))
    made = named("smollm2-135m", f"data.train=[{tmp_path / 'pairs.jsonl'}]", "data.holdout=0", "train.batch_size=16",
                 "train.tokens_per_pack=100000")  # fmt: skip
    encoder, _ = training_encoder(made, causal_lm)
    data = load_split(made, encoder, Rejects(), SilentUi()).train
    seen = estimate_resources(made, causal_lm, data, 10).work
    sequences = [ids.tolist() for group in data.groups for ids in group.sequences()]
    prefixes = {tuple(ids[: at + 1]) for ids in sequences for at in range(len(ids))}
    assert seen is not None
    assert seen.largest == len(prefixes) < seen.tokens


def test_a_dry_run_shows_the_resource_estimate(rmtool: Any, llama: Path, tmp_path: Path) -> None:
    """Without the data: memory is known, time is not; and nothing is written."""
    command = ("train", "--recipe", "tulu3-8b", "--model", llama, "--dry-run", "--output", "run")
    shown = rmtool(*command)
    assert shown.code == 0, shown.err
    assert "7,504,961,536 (7,504,961,536 trainable)" in shown.out
    assert "memory per device" in shown.out
    assert "unknown until the dataset is loaded" in shown.out
    assert not (tmp_path / "run").exists()
    told = json.loads(rmtool(*command, "--json").out)
    parts = ("weights", "gradients", "optimizer", "activations", "buffers")
    memory = told["resources"]["memory"]
    assert memory["total"] == sum(memory[part] for part in parts)
    assert told["resources"]["work"] is told["report"] is None
    assert "a Hub dataset" in told["not_estimated"]


def test_the_hash_is_that_of_what_is_learned() -> None:
    from rmtool.recipe import recipe_hash

    assert recipe_hash(recipe()) == recipe_hash(recipe("launch.nodes=1", "track.wandb=false", "train.save_every=3"))
    changed = dataclasses.replace(recipe(), train=dataclasses.replace(recipe().train, seed=9))
    assert recipe_hash(recipe()) != recipe_hash(changed)


NEMOTRON = {"vocab_size": 1300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
           "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip


def test_a_model_that_runs_padded_is_foreseen_so(causal_lm: Path, tmp_path: Path) -> None:
    """That no layout is passed shows when attention is called; then a prompt counts for each of its responses."""
    from transformers import NemotronConfig

    shutil.copytree(causal_lm, tmp_path / "nemotron")
    NemotronConfig(**NEMOTRON, pad_token_id=0).save_pretrained(tmp_path / "nemotron")
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(16))
    made = named("smollm2-135m", f"data.train=[{tmp_path / 'pairs.jsonl'}]", "data.holdout=0", "train.batch_size=16",
                 "train.tokens_per_pack=100000")  # fmt: skip
    encoder, _ = training_encoder(made, causal_lm)
    data = load_split(made, encoder, Rejects(), SilentUi()).train
    seen = estimate_resources(made, tmp_path / "nemotron", data, 10)
    assert seen.work is not None
    [units] = epoch_steps(data.metadata, data.groups, made.train.seed, 0, 16)
    rows = [len(ids) for unit in units for ids in unit.group.sequences()]
    assert seen.work.tokens == seen.work.largest == len(rows) * max(rows)  # one pack
    assert dict(seen.rows())["tokens per step (with padding)"].startswith(f"{len(rows) * max(rows):,}")
    assert seen.memory.tokens == seen.work.largest
    assert seen.memory.activations > 0


def test_of_the_experts_those_count_that_a_token_meets() -> None:
    from transformers import MixtralConfig

    from rmtool.model.reward_model import RewardModel

    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 8,
             "num_experts_per_tok": 2}  # fmt: skip
    model = RewardModel(AutoModelForSequenceClassification.from_config(MixtralConfig(**sizes, pad_token_id=0)), 0)
    attention, router, expert = 32 * (32 + 16 + 16 + 32), 8 * 32, 3 * 32 * 48
    assert model.active_matmul_params == attention + router + 2 * expert


@pytest.mark.parametrize(
    ("settings", "row", "value"),
    [
        ("", "loss", "bradley_terry"),
        (
            "train.loss=hinge train.center_rewards_coefficient=0.01",
            "loss",
            "hinge, centering 0.01 * (r_chosen + r_rejected)^2",
        ),
        ("train.label_smoothing=0.1", "loss", "bradley_terry, label smoothing 0.1"),
        ("train.freeze=backbone", "trainable parameters", "score head only"),
        ("lora.rank=8", "trainable parameters", "LoRA rank 8 and score head"),
        ("", "trainable parameters", "all"),
        ("train.keep=best train.metric_for_best=loss", "checkpoint", "run/model (best eval loss, fp32)"),
        ("train.keep=best train.early_stopping_patience=3", "early stopping",
         "after 3 evaluations without improvement"),
        ("", "checkpoint", "run/model (last step, fp32)"),
        ("train.max_grad_norm=null", "gradient clipping", "off"),
        ("", "gradient clipping", "max norm 1"),
        ("train.gradient_checkpointing=true", "gradient checkpointing", "on"),
        ("", "gradient checkpointing", "off"),
        ("", "evaluation", "every 5 steps and at the end"),
        ("data.holdout=0 train.eval_every=null", "evaluation", "off"),
        ("data.holdout=0 train.eval_every=null", "eval data", "none"),
        ("", "eval data", "200 pairs held out from the training data"),
        ("launch.gpus_per_node=2", "processes", "2 (1 node x 2 processes)"),
        ("launch.gpus_per_node=2", "engine", "ddp"),
        ("launch.gpus_per_node=2", "global batch size", "32 pairs (16 per process)"),
        ("train.max_steps=30", "optimizer steps", "30 (epochs: 2, max_steps: 30)"),
    ],
)  # fmt: skip
def test_a_plan_shows_how_the_model_is_trained(settings: str, row: str, value: str) -> None:
    made = named("debug", "train.eval_every=5", *settings.split())
    assert dict(make_plan(made, Path("run")).rows())[row] == value
