"""What a checkpoint contains, compared with what the model reads: trained heads, labels, unread weights, limits."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers import tiny_config, write_jsonl
from safetensors.torch import load_file, save_file

from rmtool.config import Recipe
from rmtool.errors import RmtoolError
from rmtool.model.limits import trained_positions
from rmtool.model.loading import load_for_inference, training_encoder, training_model
from rmtool.model.reward_model import RewardModel
from rmtool.model.weights import merged_weights, meta_copy
from rmtool.recipe import load_recipe

Weights = dict[str, torch.Tensor]


def changed(checkpoint: Path, folder: Path, change: Callable[[Weights], object]) -> Path:
    """Copy a checkpoint, and change its weights in place."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def recipe(folder: Path, tmp_path: Path, **model: Any) -> Recipe:
    path = tmp_path / "r.yaml"
    settings = {"model": {"path": str(folder), **model}, "data": {"train": ["x"], "max_length": 512}}
    path.write_text(json.dumps(settings | {"train": {"batch_size": 4, "learning_rate": 0.001, "seed": 5}}))
    return load_recipe(str(path), ())


def to_train(folder: Path, tmp_path: Path, **model: Any) -> tuple[RewardModel, list[str]]:
    settings = recipe(folder, tmp_path, **model)
    encoder, notices = training_encoder(settings, folder)
    trained, more = training_model(settings, folder, encoder)
    return trained, notices + more


def renamed(name: str) -> Callable[[Weights], object]:
    return lambda weights: weights.update({name: weights.pop("score.weight")})


def test_training_goes_on_from_a_head_of_another_name(checkpoint: Path, tmp_path: Path) -> None:
    folder = changed(checkpoint, tmp_path / "m", renamed("value_head.weight"))
    head = load_file(checkpoint / "model.safetensors")["score.weight"]
    kept, notices = to_train(folder, tmp_path)
    assert torch.equal(kept.classifier.score.weight, head)
    assert "score head: loaded from value_head.weight (set model.head=new to reinitialize it)" in notices
    new, notices = to_train(folder, tmp_path, head="new")
    assert not torch.equal(new.classifier.score.weight, head)
    assert "score head: new (initialized with train.seed 5)" in notices
    assert "weights not read: value_head.weight" in notices
    saved = meta_copy(kept.classifier, torch.float32)
    saved.save_pretrained(tmp_path / "saved", state_dict=dict(merged_weights(kept.classifier, torch.float32)))
    assert torch.equal(load_file(tmp_path / "saved" / "model.safetensors")["score.weight"], head)


def test_a_pickled_head_is_refused_only_where_it_would_be_needed(
    checkpoint: Path, causal_lm: Path, tmp_path: Path
) -> None:
    base, trained = (shutil.copytree(each, tmp_path / each.name) for each in (causal_lm, checkpoint))
    for folder in (base, trained):
        (folder / "value_head.bin").write_bytes(b"x")
    with pytest.raises(RmtoolError) as caught:
        to_train(base, tmp_path)
    assert caught.value.id == "E0407"
    for folder, options in ((base, {"head": "new"}), (trained, {})):
        _, notices = to_train(folder, tmp_path, **options)
        assert "weights not read: value_head.bin" in notices


def test_commands_in_hints_mend_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """A head of an unknown name is renamed, a column transposed, and a bias removed."""
    head = load_file(checkpoint / "model.safetensors")["score.weight"]
    changes: list[Callable[[Weights], object]] = [
        renamed("happiness.weight"),
        lambda weights: weights.update({"score.weight": head.reshape(-1, 1)}),
        lambda weights: weights.update({"score.bias": torch.tensor([0.5])}),
    ]
    for number, change in enumerate(changes):
        folder = changed(checkpoint, tmp_path / f"it's {number}", change)
        with pytest.raises(RmtoolError) as caught:
            load_for_inference(folder)
        command = caught.value.hint.splitlines()[0].partition(": ")[2]
        subprocess.run(command, shell=True, check=True)
        assert torch.equal(load_for_inference(folder).model.classifier.score.weight, head)


def test_a_new_head_is_said_for_a_language_model(causal_lm: Path, tmp_path: Path) -> None:
    _, notices = to_train(causal_lm, tmp_path)
    assert notices == ["score head: new (initialized with train.seed 5)"]


def test_a_head_in_a_file_of_its_own_is_read(checkpoint: Path, causal_lm: Path, tmp_path: Path) -> None:
    """As LLaMA-Factory writes it, next to a causal LM, which has a language head."""
    head = load_file(checkpoint / "model.safetensors")["score.weight"]
    for name, bias, id in (("zero", 0.0, None), ("other", 0.25, "E0406")):
        folder = shutil.copytree(causal_lm, tmp_path / name)
        tensors = {"v_head.summary.weight": head, "v_head.summary.bias": torch.tensor([bias])}
        save_file(tensors, folder / "value_head.safetensors")
        if id is None:
            assert torch.equal(load_for_inference(folder).model.classifier.score.weight, head)
            continue
        with pytest.raises(RmtoolError) as caught:
            to_train(folder, tmp_path)
        assert (caught.value.id, "v_head.summary.bias is 0.25" in caught.value.what) == (id, True)
        assert "adds -0.25 to every reward" in caught.value.hint


@pytest.mark.parametrize("names", [("happiness.weight",), ("v_head.0.weight", "v_head.2.weight")])
def test_unread_weights_stop_training_unless_the_head_is_new(
    checkpoint: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    folder = changed(
        checkpoint, tmp_path / "m", lambda weights: weights.update({name: torch.ones(3, 3) for name in names})
    )
    with pytest.raises(RmtoolError) as caught:
        to_train(folder, tmp_path)
    assert (caught.value.id, all(name in caught.value.what for name in names)) == ("E0406", True)
    _, notices = to_train(folder, tmp_path, head="new")
    assert f"weights not read: {', '.join(names)}" in notices


@pytest.mark.parametrize("labels", [2, 5])
def test_a_new_head_may_replace_one_of_any_number_of_labels(checkpoint: Path, tmp_path: Path, labels: int) -> None:
    folder = changed(
        checkpoint, tmp_path / "m", lambda weights: weights.update({"score.weight": torch.ones(labels, 32)})
    )
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(n): f"grade {n}" for n in range(labels)}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RmtoolError) as caught:
        to_train(folder, tmp_path)
    assert caught.value.id == "E0402"
    model, _ = to_train(folder, tmp_path, head="new")
    plain, _ = to_train(checkpoint, tmp_path, head="new")
    classifier, expected = model.classifier, plain.classifier
    assert torch.equal(classifier.score.weight, expected.score.weight)
    assert torch.equal(classifier.model.layers[0].mlp.up_proj.weight, expected.model.layers[0].mlp.up_proj.weight)
    saved = meta_copy(classifier, torch.float32).config
    assert (saved.num_labels, saved.id2label) == (1, {0: "LABEL_0"})


def test_weights_in_shards_are_compared_as_well(checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights["value_head.weight"] = weights.pop("score.weight")
    folder = shutil.copytree(checkpoint, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    names, places = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    head = load_for_inference(folder).model.classifier.score.weight
    assert torch.equal(head, weights["value_head.weight"])
    for index in ({"weight_map": places}, {"metadata": {}, "weight_map": {"a": 1}}):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(RmtoolError, match=r"index\.json is corrupted"):
            load_for_inference(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(RmtoolError) as caught:
        load_for_inference(folder)
    assert (caught.value.id, "model-00002-of-00002" in caught.value.what) == ("E0404", True)


def test_a_merged_adapter_scores_as_the_hint_says(checkpoint: Path, tmp_path: Path, rmtool: Any) -> None:
    """Follow the advice of E0413: its snippet runs, and its output has the rewards of the adapter in peft."""
    from peft import LoraConfig, get_peft_model

    base = hf.AutoModelForSequenceClassification.from_pretrained(checkpoint)
    adapted = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"])).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "score" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    adapted.peft_config["default"].base_model_name_or_path = str(checkpoint)
    adapted.save_pretrained("lora")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Hello", "response": "Hi!"}])
    shown = rmtool("score", rows, "--model", "lora")
    assert shown.error == "E0413"
    snippet = shown.err.partition("merge it: ")[2].partition(", then")[0].replace("\n", "")
    exec("import peft; " + snippet)
    for path in [*Path(checkpoint).glob("tokenizer*"), checkpoint / "chat_template.jinja"]:
        shutil.copy(path, "merged")
    loaded = load_for_inference(Path("merged"))
    loaded.model.share_prompts(False)
    ids = torch.arange(3, 20)[None]
    assert loaded.model.classifier(ids).logits.item() == pytest.approx(adapted(ids).logits.item(), abs=1e-5)


# --------------------------------------------------------------------------------------------------- limits


def with_tokens(checkpoint: Path, folder: Path, special: bool, template: str = "") -> Path:
    """Copy a checkpoint, and add a token to its tokenizer that its embedding has no row for."""
    shutil.copytree(checkpoint, folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"], special_tokens=special)
    tokenizer.chat_template = template + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("special", "template", "id"),
    [
        (True, "", None),  # as an added pad token
        (False, "", "E0415"),  # occurs in text
        (True, "<new>", "E0415"),
        (True, "{% if messages[0]['role'] == 'system' %}<new>{% endif %}", "E0415"),
    ],
)
def test_only_tokens_that_can_occur_need_an_embedding(
    checkpoint: Path, tmp_path: Path, special: bool, template: str, id: str | None
) -> None:
    folder = with_tokens(checkpoint, tmp_path / "m", special, template)
    rows = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    if id is None:
        load_for_inference(folder)
        model, _ = to_train(folder, tmp_path)
        assert model.classifier.get_input_embeddings().num_embeddings == rows
        return
    for load in (load_for_inference, lambda folder: to_train(folder, tmp_path)):
        with pytest.raises(RmtoolError) as caught:
            load(folder)
        assert (caught.value.id, f"'<new>' with id {rows}" in caught.value.what) == (id, True)


def test_a_negative_pad_token_is_none(checkpoint: Path, tmp_path: Path) -> None:
    """As in configs of the first Llama: as an index it would be the last row, without a gradient, or an error."""
    folder = shutil.copytree(checkpoint, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": -1}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_for_inference(folder).model
    assert (loaded.pad_id, loaded.classifier.config.pad_token_id) == (0, None)
    assert loaded.classifier.get_input_embeddings().padding_idx is None


def test_a_token_that_few_rows_have_is_found_before_the_first_forward(
    checkpoint: Path, tmp_path: Path, rmtool: Any
) -> None:
    template = "{% if messages | length > 4 %}<new>{% endif %}"
    folder = with_tokens(checkpoint, tmp_path / "m", True, template)
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}, {"messages": turns * 3}])
    shown = rmtool("score", rows, "--model", folder)
    assert (shown.code, shown.error) == (3, "E0307")
    assert "token '<new>' has id" in shown.err
    assert "rows.jsonl:2" in shown.err
    assert not list(tmp_path.glob("*.scored.jsonl"))


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (hf.LlamaConfig(max_position_embeddings=512), 512),
        (
            hf.LlamaConfig(
                max_position_embeddings=131072,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            ),
            131072,
        ),
        (hf.LlamaConfig(max_position_embeddings=4096, rope_parameters={"rope_type": "linear", "factor": 4.0}), 16384),
        (hf.GPT2Config(n_positions=64), 64),
        (hf.BloomConfig(), None),
    ],
)
def test_the_positions_that_a_model_was_trained_with(config: Any, positions: int | None) -> None:
    assert trained_positions(config) == positions


def test_training_says_that_the_max_length_exceeds_the_positions(causal_lm: Path, tmp_path: Path) -> None:
    settings = recipe(causal_lm, tmp_path)
    for length, count in ((512, 0), (513, 1)):
        path = tmp_path / "r.yaml"
        longer = load_recipe(str(path), (("data.max_length", length),))
        _, notices = training_encoder(longer, causal_lm)
        assert len([notice for notice in notices if "positions" in notice]) == count
    assert settings.data.max_length == 512
    assert tiny_config(9)["max_position_embeddings"] == 512
