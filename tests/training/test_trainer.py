"""Training: the same step however it is cut, metrics as promised, a run folder that is whole, the debug recipe."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import pair_rows, tiny_config, write_jsonl
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from rmtool.checkpoint import read_manifest
from rmtool.config import Recipe
from rmtool.data.formats import preference_record
from rmtool.data.rejects import Rejects
from rmtool.data.rows import read_rows
from rmtool.dataset.batches import epoch_steps
from rmtool.dataset.split import load_split
from rmtool.errors import RmtoolError
from rmtool.evaluation.evaluate import evaluate
from rmtool.model.loading import load_for_inference, training_encoder, training_model
from rmtool.model.loss import bradley_terry
from rmtool.model.rewards import compute_rewards
from rmtool.recipe import CONFIG_FILE, dump_recipe, load_recipe
from rmtool.tokenization.tokenized_dataset import tokenize_records
from rmtool.training import worker as train
from rmtool.training.checkpoint_writer import CheckpointWriter
from rmtool.training.engine import Engine, deepspeed_config
from rmtool.training.optim import build_optimizer
from rmtool.training.step import Trainer, training_step
from rmtool.ui import SilentUi

TRAIN_NAMES = {
    "episode", "epoch", "train/rm/accuracy", "train/rm/loss", "train/rm/chosen_rewards", "train/rm/rejected_rewards",
    "train/rm/reward_margin", "train/rm/lr",
}  # fmt: skip
EVAL_NAMES = {f"eval/rm/{name}" for name in ("accuracy", "loss", "chosen_rewards", "rejected_rewards", "reward_margin")}


@pytest.fixture
def recipe(causal_lm: Path, tmp_path: Path) -> Recipe:
    return make_recipe(causal_lm, tmp_path)


def make_recipe(causal_lm: Path, tmp_path: Path) -> Recipe:
    rows = [row | {"margin": 0.5 * (index % 3)} for index, row in enumerate(pair_rows(22))]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"model: {{path: {causal_lm}}}\n"
        f"data: {{train: [{data}], holdout: 4, max_length: 256}}\n"
        "train: {batch_size: 8, learning_rate: 1e-3, epochs: 2, eval_every: 2, tokens_per_pack: 300}\n"
    )
    return load_recipe(str(path))


def run(recipe: Recipe, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(dump_recipe(recipe))
    train.run(recipe, folder, Accelerator(cpu=True), SilentUi())
    return folder


@pytest.fixture(scope="module")
def trained(causal_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the recipe as it is."""
    folder = tmp_path_factory.mktemp("trained")
    return run(make_recipe(causal_lm, folder), folder / "run")


def set_(recipe: Recipe, **settings: Any) -> Recipe:
    return replace(recipe, train=replace(recipe.train, **settings))


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_is_whole_and_its_metrics_are_those_promised(trained: Path) -> None:
    rows, folder = lines(trained), trained
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]  # 18 pairs in steps of 8, 8, 2, twice
    assert [row["episode"] for row in rows] == [8, 16, 18, 26, 34, 36]
    assert [row["epoch"] for row in rows] == pytest.approx([n / 18 for n in (8, 16, 18, 26, 34, 36)])
    assert [row["train/rm/lr"] for row in rows] == pytest.approx([1e-3 * (1 - n / 6) for n in range(6)])
    for row in rows:
        assert row.keys() >= TRAIN_NAMES
        assert (row.keys() >= EVAL_NAMES) == (row["step"] % 2 == 0)
        assert row["train/rm/reward_margin"] == pytest.approx(
            row["train/rm/chosen_rewards"] - row["train/rm/rejected_rewards"]
        )
    assert len(list(read_rows(str(folder / "held_out.jsonl")))) == 4
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in (folder / "model").iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "rmtool.json"}
    config = json.loads((folder / "model" / "config.json").read_text())
    assert (config["architectures"], config["num_labels"] if "num_labels" in config else len(config["id2label"])) == (
        ["LlamaForSequenceClassification"], 1,
    )  # fmt: skip
    assert "rmtool_packed" not in json.dumps(config)


def test_the_saved_checkpoint_gives_the_rewards_of_the_last_evaluation(trained: Path) -> None:
    folder = trained
    loaded = load_for_inference(folder / "model")
    assert loaded.notices == ()
    records = [preference_record(row) for row in read_rows(str(folder / "held_out.jsonl"))]
    encoded = tokenize_records(loaded.encoder, records, "error", lambda: None)
    report = evaluate(
        encoded.metadata, lambda: (compute_rewards(loaded.model, encoded.groups, 300, SilentUi()), None)
    ).total.report("eval/rm")
    assert report == pytest.approx({name: lines(folder)[-1][name] for name in EVAL_NAMES}, abs=1e-6)
    assert loaded.manifest is not None
    assert loaded.manifest.metrics == pytest.approx(report, abs=1e-6)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_run_repeats_bit_for_bit_and_a_seed_changes_it(recipe: Recipe, trained: Path, tmp_path: Path) -> None:
    first, again = weights(trained), weights(run(recipe, tmp_path / "again"))
    other = weights(run(set_(recipe, seed=1), tmp_path / "other"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["score.weight"], other["score.weight"])


@pytest.mark.parametrize(
    "settings", [{"tokens_per_pack": 1}, {"tokens_per_pack": 10**6}, {"gradient_checkpointing": True}]
)
def test_the_cut_into_packs_changes_no_step(
    recipe: Recipe, trained: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    first, other = weights(trained), weights(run(set_(recipe, **settings), tmp_path / "run"))
    for name in first:
        # Adam divides by the root of squared gradients: rounding in a tiny gradient is magnified there.
        torch.testing.assert_close(other[name], first[name], atol=2e-5, rtol=1e-4)


def trainer(recipe: Recipe, source: Path) -> tuple[Trainer, Any]:
    encoder, _ = training_encoder(recipe, source)
    split = load_split(recipe, encoder, Rejects(), SilentUi())
    model, _ = training_model(recipe, source, encoder)
    model.share_prompts(True)
    optimizer = build_optimizer(model, recipe.train)
    engine = Engine.prepare(Accelerator(cpu=True), model, optimizer, recipe.train.max_grad_norm)
    return Trainer.start(recipe, engine, SilentUi(), source), split


def backward(mine: Trainer, units: Any) -> tuple[Any, float]:
    """A step without its update: the sums, and the norm of the gradients, which are left clipped."""
    mine.engine.update = lambda lr: mine.engine.clip()  # type: ignore[method-assign]
    result = training_step(mine, units, 0.0, 1)
    return result.sums, result.grad_norm


class HalfProducts(TorchDispatchMode):
    """How many products reach torch in bf16, and in fp32, while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.seen[args[0].dtype] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_bf16_instructions_a_step_is_that_of_fp32(
    checkpointing: bool, recipe: Recipe, causal_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for lacks, precision in ((False, "bf16"), (True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("rmtool.model.precision.lacks_bf16", lambda lacks=lacks: lacks)
        mine, split = trainer(set_(recipe, precision=precision, gradient_checkpointing=checkpointing), causal_lm)
        units = next(epoch_steps(split.train.metadata, split.train.groups, 0, 0, 8))
        with HalfProducts() as products:
            sums, norm = backward(mine, units)
        assert (products.seen[torch.bfloat16] > 0) == (precision == "bf16" and not lacks)
        results.append((sums.loss, norm))
    assert results[0] == pytest.approx(results[2], rel=2**-6)
    assert results[1] == results[2]


def test_a_pair_of_weight_two_counts_like_two_pairs(recipe: Recipe, causal_lm: Path, tmp_path: Path) -> None:
    rows = pair_rows(3)
    once = write_jsonl(tmp_path / "once.jsonl", [rows[0] | {"weight": 2}, rows[1], rows[2] | {"weight": 0}])
    twice = write_jsonl(tmp_path / "twice.jsonl", [rows[0], rows[0], rows[1]])
    found = []
    for data in (once, twice):
        changed = replace(recipe, data=replace(recipe.data, train=(str(data),), holdout=0))
        mine, split = trainer(set_(changed, max_grad_norm=None), causal_lm)
        sums, norm = backward(mine, next(epoch_steps(split.train.metadata, split.train.groups, 0, 0, 3)))
        found.append((sums.loss, norm))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("lacks", [False, True])
def test_deepspeed_sends_what_is_computed_in(lacks: bool, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights arrive in bf16 where forwards are in bf16."""
    monkeypatch.setattr("rmtool.model.precision.lacks_bf16", lambda: lacks)
    zero = replace(set_(recipe, precision="bf16"), launch=replace(recipe.launch, engine="zero3"))
    assert deepspeed_config(zero)["torch_autocast"]["enabled"] == (not lacks)


def test_a_step_equals_the_obvious_slow_one(recipe: Recipe, causal_lm: Path) -> None:
    """Each response alone through transformers, the mean loss over the step's pairs, one backward."""
    mine, split = trainer(set_(recipe, max_grad_norm=None), causal_lm)
    units = next(epoch_steps(split.train.metadata, split.train.groups, 0, 0, 8))
    sums, norm = backward(mine, units)
    gradients = {name: p.grad.clone() for name, p in mine.model.named_parameters() if p.grad is not None}
    mine.model.zero_grad()
    mine.model.share_prompts(False)
    losses = []
    for unit in units:
        rewards = [mine.model.classifier(torch.tensor(ids[None]).long()).logits[0] for ids in unit.group.sequences()]
        for winner, loser, margin in unit.preferences:
            losses.append(bradley_terry(rewards[winner], rewards[loser], torch.tensor([margin]))[0])
    assert any(margin for unit in units for _, _, margin in unit.preferences)
    loss = torch.stack(losses).mean()
    loss.backward()
    assert sums.report("x")["x/loss"] == pytest.approx(loss.item(), rel=1e-5)
    total = torch.stack([p.grad.norm() for p in mine.model.parameters() if p.grad is not None]).norm()
    assert norm == pytest.approx(total.item(), rel=1e-4)
    for name, parameter in mine.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_margins_change_the_loss_and_can_be_left_out(recipe: Recipe, causal_lm: Path) -> None:
    losses = {}
    for use in (True, False):
        mine, split = trainer(set_(recipe, use_margins=use), causal_lm)
        sums, _ = backward(mine, next(epoch_steps(split.train.metadata, split.train.groups, 0, 0, 8)))
        losses[use] = sums.loss
    assert losses[True] > losses[False]


@pytest.mark.parametrize(
    ("settings", "slow"),
    [
        ({"loss": "hinge"}, lambda d, total: max(0.0, 1 - d)),
        ({"label_smoothing": 0.2}, lambda d, total: 0.8 * softplus(-d) + 0.2 * softplus(d)),
        ({"center_rewards_coefficient": 0.5}, lambda d, total: softplus(-d) + 0.5 * total**2),
        ({"loss": "hinge", "center_rewards_coefficient": 2.0}, lambda d, total: max(0.0, 1 - d) + 2 * total**2),
    ],
)
def test_each_loss_is_its_formula_and_moves_the_weights(
    settings: dict[str, Any], slow: Any, recipe: Recipe, causal_lm: Path
) -> None:
    mine, split = trainer(set_(recipe, **settings), causal_lm)
    plain, _ = trainer(recipe, causal_lm)
    units = next(epoch_steps(split.train.metadata, split.train.groups, 0, 0, 8))
    sums, _ = backward(mine, units)
    backward(plain, units)
    expected = 0.0
    for unit in units:
        with torch.no_grad():
            rewards = mine.model(mine.model.collate([unit.group])).tolist()
        for winner, loser, margin in unit.preferences:
            expected += slow(rewards[winner] - rewards[loser] - margin, rewards[winner] + rewards[loser])
    assert sums.loss == pytest.approx(expected, rel=1e-5)
    assert not torch.allclose(
        mine.model.classifier.score.weight.grad, plain.model.classifier.score.weight.grad, rtol=1e-3
    )


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def test_a_frozen_backbone_stays_as_it_was(recipe: Recipe, causal_lm: Path, tmp_path: Path) -> None:
    folder = run(set_(recipe, freeze="backbone", learning_rate=0.05, epochs=20), tmp_path / "run")
    start, saved = load_file(causal_lm / "model.safetensors"), weights(folder)
    backbone = [name for name in saved if not name.startswith("score.")]
    assert backbone
    assert all(torch.equal(saved[name], start[name]) for name in backbone)
    found = lines(folder)
    assert found[-1]["train/rm/loss"] < found[0]["train/rm/loss"]


def fake_evals(monkeypatch: pytest.MonkeyPatch, accuracies: list[float]) -> None:
    """Evaluations that say what they are told, in turn."""
    told = iter(accuracies)

    def run_eval(mine: Trainer, held_out: Any, ui: Any, stopping: Any, log_samples: Any) -> dict[str, float]:
        return {name: (value := next(told)) if name.endswith("accuracy") else 1 - value for name in sorted(EVAL_NAMES)}

    monkeypatch.setattr("rmtool.training.trainer.run_eval", run_eval)


@pytest.mark.parametrize("metric_for_best", ["accuracy", "loss"])
def test_the_best_checkpoint_is_kept(
    metric_for_best: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = weights(run(set_(recipe, max_steps=2, epochs=4, schedule="constant"), tmp_path / "two"))
    fake_evals(monkeypatch, [0.7, 0.9, 0.9, 0.8])
    told = set_(
        recipe, keep="best", metric_for_best=metric_for_best, eval_every=1, epochs=4, max_steps=4, schedule="constant"
    )
    folder = run(told, tmp_path / "run")
    for name, value in weights(folder).items():
        assert torch.equal(value, wanted[name])
    manifest = read_manifest(folder / "model")
    assert manifest
    assert manifest.metrics["eval/rm/accuracy"] == 0.9
    assert len(lines(folder)) == 4
    assert not list(folder.glob("best-*"))


def test_patience_ends_a_run(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = list[int]()  # nothing, where the last checkpoint is kept
    monkeypatch.setattr(CheckpointWriter, "save_best", lambda self, best: written.append(best.step))
    fake_evals(monkeypatch, [0.7, 0.8, 0.8, 0.7, 1.0])
    folder = run(set_(recipe, early_stopping_patience=2, eval_every=1, epochs=4), tmp_path / "run")
    assert len(lines(folder)) == 4
    fake_evals(monkeypatch, [0.7, 0.8, 0.8, 0.9, 1.0] + [1.0] * 9)
    assert len(lines(run(set_(recipe, early_stopping_patience=2, eval_every=1, epochs=4), tmp_path / "longer"))) == 7
    assert written == []


def test_four_bits_need_a_gpu(recipe: Recipe, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RmtoolError) as caught:
        run(replace(recipe, lora=replace(recipe.lora, rank=4, quantize="4bit")), tmp_path / "run")
    assert (caught.value.id, caught.value.exit_code) == ("E0505", 5)
    assert "lora.quantize=none" in caught.value.hint


def test_four_bit_weights_are_saved_as_they_were_trained(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes computes on a CPU too, slowly: the same code as on a GPU, if it does not repack the weights for CPUs
    with AVX-512 bf16 instructions, in blocks that a tiny model cannot fill.
    """
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    monkeypatch.setattr("rmtool.model.loading.require_4bit", lambda: None)
    four = replace(recipe, lora=replace(recipe.lora, rank=4, quantize="4bit"))
    folder = run(set_(four, max_steps=3), tmp_path / "run")
    config = json.loads((folder / "model" / "config.json").read_text())
    assert "quantization_config" not in config
    assert not [name for name in weights(folder) if "lora" in name or "absmax" in name or "base_layer" in name]
    loaded = load_for_inference(folder / "model")
    manifest = read_manifest(folder / "model")
    assert manifest
    encoded = tokenize_records(
        loaded.encoder, (preference_record(row) for row in read_rows(str(folder / "held_out.jsonl"))), "keep", int
    )
    again = evaluate(
        encoded.metadata, lambda: (compute_rewards(loaded.model, encoded.groups, 300, SilentUi()), None)
    ).total.report("eval/rm")
    assert again == pytest.approx(manifest.metrics, abs=0.02)  # products in bfloat16 there, in fp32 here


def test_clipping_bounds_the_gradient(recipe: Recipe, causal_lm: Path) -> None:
    mine, split = trainer(set_(recipe, max_grad_norm=1e-3), causal_lm)
    _, norm = backward(mine, next(epoch_steps(split.train.metadata, split.train.groups, 0, 0, 8)))
    left = torch.stack([p.grad.norm() for p in mine.model.parameters() if p.grad is not None]).norm()
    assert norm > 1e-3
    assert left.item() == pytest.approx(1e-3, rel=1e-2)


def test_lora_trains_few_weights_and_saves_an_ordinary_checkpoint(
    recipe: Recipe, causal_lm: Path, tmp_path: Path
) -> None:
    folder = run(replace(recipe, lora=replace(recipe.lora, rank=4)), tmp_path / "run")
    loaded = load_for_inference(folder / "model")
    assert loaded.manifest is not None
    assert not [name for name in weights(folder) if "lora" in name or "base_layer" in name]
    fresh, _ = training_model(recipe, causal_lm, training_encoder(recipe, causal_lm)[0])
    saved = weights(folder)
    assert not torch.equal(saved["score.weight"], fresh.classifier.score.weight)
    assert not torch.equal(
        saved["model.layers.0.self_attn.q_proj.weight"], fresh.backbone.layers[0].self_attn.q_proj.weight
    )
    assert torch.equal(saved["model.embed_tokens.weight"], fresh.backbone.embed_tokens.weight)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_rows(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RmtoolError) as caught:
        run(set_(recipe, learning_rate=1e30, max_grad_norm=None), folder)
    error = caught.value
    assert (error.id, error.exit_code) == ("E0802", 8)
    assert "pairs.jsonl:" in error.rows[0]
    assert "step " in error.what
    assert not (folder / "model").exists()


def test_rows_that_cannot_be_used_stop_the_run_unless_told_otherwise(recipe: Recipe, tmp_path: Path) -> None:
    path = Path(recipe.data.train[0])
    row = {"prompt": "p", "chosen": "same", "rejected": "same"}
    path.write_text(path.read_text() + json.dumps(row) + "\n" + json.dumps(row | {"rejected": "word " * 400}) + "\n")
    with pytest.raises(RmtoolError) as caught:
        run(recipe, tmp_path / "a")
    assert (caught.value.id, caught.value.place.line) in (("E0304", 23), ("E0305", 24))
    told = replace(recipe, data=replace(recipe.data, on_identical="drop", on_long="drop"))
    run(told, tmp_path / "b")
    assert lines(tmp_path / "b")[-1]["epoch"] == 2.0


@pytest.mark.parametrize("lacks", [False, True])
def test_bf16_trains_too(lacks: bool, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest has the precision of training, the weights the dtype of the recipe; inference takes neither."""
    monkeypatch.setattr("rmtool.model.precision.lacks_bf16", lambda: lacks)
    folder = run(set_(recipe, precision="bf16", save_dtype="bf16"), tmp_path / "run")
    assert weights(folder)["score.weight"].dtype == torch.bfloat16
    loaded = load_for_inference(folder / "model")
    assert loaded.manifest
    assert loaded.manifest.settings["precision"] == "bf16"
    assert loaded.manifest.precision == ("fp32" if lacks else "bf16")
    assert loaded.model.precision == "fp32"
    assert next(loaded.model.classifier.score.parameters()).dtype == torch.float32


def test_the_manifest_says_how_prompts_were_read(recipe: Recipe, tmp_path: Path, tokenizer: Any) -> None:
    """A fallback is recorded with its reason, not only said once."""
    from transformers import NemotronConfig, NemotronForCausalLM

    folder = tmp_path / "nemotron"
    NemotronForCausalLM(NemotronConfig(**tiny_config(len(tokenizer)))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    nemotron = replace(set_(recipe, max_steps=1), model=replace(recipe.model, path=str(folder)))
    shared = read_manifest(run(set_(recipe, max_steps=1), tmp_path / "a") / "model")
    padded = read_manifest(run(nemotron, tmp_path / "b") / "model")
    assert shared
    assert padded
    assert shared.padded_reason is None
    assert (padded.padded_reason or "").startswith("the model does not pass")
