"""Tokenizer, head, dropout, adapters and checkpoints: what is built, what is saved, what is refused."""

from __future__ import annotations

import copy
import ctypes
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_config
from transformers import AutoModelForSequenceClassification, GPT2Config, NemotronConfig

from rmtool.config import LoraConfig, Recipe
from rmtool.data.record import Message
from rmtool.errors import RmtoolError
from rmtool.model.classifier import build_classifier, disable_dropout, init_score_head
from rmtool.model.layout_choice import choose_layout
from rmtool.model.loading import add_adapters, load_for_inference, training_encoder, training_model
from rmtool.model.reward_model import RewardModel
from rmtool.model.rewards import compute_rewards
from rmtool.model.weights import merged_weights, meta_copy
from rmtool.packing import prefix_sharing
from rmtool.recipe import load_recipe
from rmtool.tokenization.response_group import build_group
from rmtool.tokenization.tokenizer import ensure_pad_token, load_tokenizer
from rmtool.ui import SilentUi


def recipe(folder: Path, tmp_path: Path, *settings: tuple[str, Any]) -> Recipe:
    path = tmp_path / "r.yaml"
    data = "data: {train: [x], max_length: 512}"
    path.write_text(f"model: {{path: {folder}}}\n{data}\ntrain: {{batch_size: 4, learning_rate: 1e-3}}\n")
    return load_recipe(str(path), settings)


def test_a_pad_token_that_is_eos_is_replaced(causal_lm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(causal_lm, tmp_path / "m")
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_token = tokenizer.eos_token
    # As in a tokenizer without a pad token: the reserved one is renamed.
    text = (folder / "tokenizer.json").read_text().replace("<|pad|>", "<|unused|>")
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(text)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": "<|im_end|>"}
    config.pop("extra_special_tokens", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    settings = recipe(folder, tmp_path)
    encoder, notices = training_encoder(settings, folder)
    model, _ = training_model(settings, folder, encoder)
    assert encoder.tokenizer.pad_token == "<|pad|>"
    assert encoder.tokenizer.pad_token_id != encoder.tokenizer.eos_token_id
    assert model.classifier.config.pad_token_id == encoder.tokenizer.pad_token_id == model.pad_id
    assert model.classifier.get_input_embeddings().num_embeddings > encoder.tokenizer.pad_token_id
    before = "instead of <|im_end|>, which also ends responses"
    assert notices == [f"pad token: added <|pad|> (id {encoder.tokenizer.pad_token_id}) {before}"]


def test_a_reserved_pad_token_is_taken(tokenizer: Any) -> None:
    mine = copy.deepcopy(tokenizer)
    mine.pad_token = mine.eos_token
    size = len(mine)
    assert "using" in (ensure_pad_token(mine, last_id=7) or "")
    assert (mine.pad_token, len(mine)) == ("<|pad|>", size)
    assert ensure_pad_token(mine, last_id=7) is None
    assert "added" in (ensure_pad_token(mine, last_id=mine.pad_token_id) or "")


@pytest.mark.parametrize("hidden", [32, 256])
def test_the_head_is_initialized_with_the_papers_deviation(hidden: int) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(**(tiny_config(50) | {"hidden_size": hidden, "num_labels": 1}))
    model = LlamaForSequenceClassification(config)
    draws = []
    for seed in range(40):
        init_score_head(model, seed)
        draws.append(model.score.weight.detach().clone())
    assert torch.stack(draws).std().item() == pytest.approx(1 / math.sqrt(hidden + 1), rel=0.06)
    with torch.device("meta"):  # a default device does not change what is drawn
        init_score_head(model, 3)
    assert torch.equal(model.score.weight, draws[3])


def test_dropout_is_off_in_the_whole_model_while_training(tokenizer: Any) -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

    llama = LlamaForSequenceClassification(LlamaConfig(**tiny_config(50), attention_dropout=0.5, num_labels=1))
    gpt2 = GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=50, n_embd=32, n_layer=2, n_head=2, num_labels=1, pad_token_id=0, resid_pdrop=0.5, attn_pdrop=0.5
        )
    )
    ids = torch.arange(3, 20)[None]
    for model in (llama, gpt2):
        assert not torch.equal(*(model.train()(ids).logits for _ in range(2)))  # it was on
        disable_dropout(model)
        assert torch.equal(*(model.train()(ids).logits for _ in range(2)))


def test_what_is_trained_has_no_dropout_left(causal_lm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(causal_lm, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"attention_dropout": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    settings = recipe(folder, tmp_path)
    model, _ = training_model(settings, folder, training_encoder(settings, folder)[0])
    ids = torch.arange(3, 20)[None]
    assert torch.equal(*(model.train().classifier(ids).logits for _ in range(2)))


def test_a_causal_lm_has_no_head_to_score_with(causal_lm: Path) -> None:
    with pytest.raises(RmtoolError) as caught:
        load_for_inference(causal_lm)
    assert (caught.value.id, caught.value.exit_code) == ("E0401", 4)


def test_two_labels_are_no_reward(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = shutil.copytree(checkpoint, tmp_path / "m")
    LlamaForSequenceClassification(LlamaConfig(**tiny_config(1300), num_labels=2)).save_pretrained(folder)
    with pytest.raises(RmtoolError) as caught:
        load_for_inference(folder)
    assert caught.value.id == "E0402"


def test_an_encoder_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    folder = shutil.copytree(checkpoint, tmp_path / "m")
    config = BertConfig(
        vocab_size=1300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    with pytest.raises(RmtoolError) as caught:
        load_for_inference(folder)
    assert caught.value.id == "E0406"


@pytest.mark.parametrize(
    ("damage", "id"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "E0404"),
        (lambda folder: (folder / "model.safetensors").unlink(), "E0407"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "E0404"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "E0404"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "E0405"),
        (lambda folder: (folder / "rmtool.json").write_text("{"), "E0408"),
    ],
)
def test_a_damaged_checkpoint_is_an_error_of_ours(checkpoint: Path, tmp_path: Path, damage: Any, id: str) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "m")
    damage(folder)
    with pytest.raises(RmtoolError) as caught:
        load_for_inference(folder)
    assert (caught.value.id, caught.value.exit_code) == (id, 4)


def test_a_weight_that_is_missing_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(checkpoint, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RmtoolError) as caught:
        load_for_inference(folder)
    assert caught.value.id == "E0404"
    assert "up_proj" in caught.value.what


def test_rewards_are_those_of_plain_transformers(checkpoint: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    loaded = load_for_inference(checkpoint)
    conversation = [Message("user", "Hello there"), Message("assistant", "Hi!")]
    ids = loaded.encoder.ids(conversation)
    plain = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32)
    expected = plain(torch.tensor([ids])).logits[0, 0].item()
    [[reward]] = compute_rewards(loaded.model, [build_group([ids])], 100, SilentUi())
    assert reward == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("config_pad", "tokenizer_pad"), [(2, 2), (2, 0), (None, 2), (0, 0)])
def test_rewards_with_a_pad_token_that_ends_responses_are_those_of_transformers(
    checkpoint: Path, tmp_path: Path, config_pad: int | None, tokenizer_pad: int
) -> None:
    """transformers pools at the last token that is not the config's pad, whatever the tokenizer calls its pad."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = shutil.copytree(checkpoint, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token_id = tokenizer_pad
    # Every rendered conversation ends in <|im_end|>, id 2, as Llama 3's do in <|eot_id|>.
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\\n", "<|im_end|>")
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": config_pad}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_for_inference(folder)
    assert any("pad token" in notice for notice in loaded.notices) == (config_pad == 2)
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    full = tokenizer.apply_chat_template(chat, return_dict=False)
    assert full[-1] == 2
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    ids = loaded.encoder.ids([Message(**message) for message in chat])
    [[reward]] = compute_rewards(loaded.model, [build_group([ids])], 100, SilentUi())
    assert reward == pytest.approx(plain(torch.tensor([full])).logits[0, 0].item(), abs=1e-6)


def test_a_head_with_a_bias_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(checkpoint, tmp_path / "m")
    weights = load_file(folder / "model.safetensors") | {"score.bias": torch.tensor([5.0])}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RmtoolError) as caught:
        load_for_inference(folder)
    assert (caught.value.id, "score.bias" in caught.value.what) == ("E0406", True)


def test_learned_positions_bound_the_length(tmp_path: Path, checkpoint: Path) -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    folder = shutil.copytree(checkpoint, tmp_path / "m")
    GPT2ForSequenceClassification(
        GPT2Config(vocab_size=1300, n_embd=32, n_layer=1, n_head=2, n_positions=64, num_labels=1, pad_token_id=0)
    ).save_pretrained(folder)
    assert load_for_inference(folder, max_length=64).model.shares_prompts
    with pytest.raises(RmtoolError) as caught:
        load_for_inference(folder, max_length=65)
    assert caught.value.id == "E0411"


def test_a_template_with_the_date_gives_the_same_ids_every_day(checkpoint: Path, tmp_path: Path) -> None:
    from rmtool.tokenization.encoder import Encoder

    folder = shutil.copytree(checkpoint, tmp_path / "m")
    template = (folder / "chat_template.jinja").read_text()
    clock = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{{ strftime_now(\"%f\") }}{% endif %}"
    (folder / "chat_template.jinja").write_text(clock + template)
    dated = load_tokenizer(folder)
    assert Encoder(dated, 99).fingerprint() == Encoder(load_tokenizer(folder), 99).fingerprint()
    ids = Encoder(dated, 99).ids([Message("user", "x"), Message("assistant", "y")])
    assert dated.decode(ids).startswith("26 Jul 2024000000")


@pytest.mark.parametrize(
    ("clock", "written"),
    [
        ("{# strftime_now(f) is not asked for #}{% if strftime_now is not defined %}no{% endif %}", ""),
        ("{{ strftime_now ('%H o\"clock') }}", '00 o"clock'),
        ("{% set f = '%H:%M:%S' %}{{ strftime_now(f) }}", None),
        ("{% set now = strftime_now %}{{ now('%S') }}", None),
        ("{{ strftime_now(format='%S') }}", None),
        ("{{ strftime_now('%H' ~ ':%S') }}", None),
        ("{{ strftime_now('%H' if messages else '%S') }}", None),
        ("{{ strftime_now('%H\\'%S') }}", None),
    ],
)
def test_a_template_with_an_unsupported_clock_is_refused(
    checkpoint: Path, tmp_path: Path, clock: str, written: str | None
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "m")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(clock + template)
    if written is None:
        with pytest.raises(RmtoolError) as caught:
            load_tokenizer(folder)
        assert (caught.value.id, "model.chat_template=" in caught.value.hint) == ("E0405", True)
        return
    chat = [{"role": "user", "content": "x"}]
    plain = load_tokenizer(checkpoint).apply_chat_template(chat, tokenize=False)
    assert load_tokenizer(folder).apply_chat_template(chat, tokenize=False) == written + plain


# ------------------------------------------------------------------------------------------------- LoRA


def test_adapters_train_the_head_and_merge_into_an_ordinary_model(checkpoint: Path, tmp_path: Path) -> None:
    classifier, _ = build_classifier(checkpoint, dtype=torch.float32)
    names = set(classifier.state_dict())
    add_adapters(classifier, LoraConfig(rank=4, alpha=8))
    trainable = {name for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    assert "score.weight" in trainable
    assert all("lora_" in name or name == "score.weight" for name in trainable)
    assert any("q_proj" in name for name in trainable)
    generator = torch.Generator().manual_seed(0)
    for parameter in classifier.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    ids = torch.arange(3, 20)[None]
    before, head = classifier(ids).logits.detach(), classifier.score.weight.detach().clone()
    saved = tmp_path / "saved"
    weights = dict(merged_weights(classifier, torch.float32))
    assert not list(merged_weights(classifier, torch.float32, keep=False))  # as on all ranks but one
    meta_copy(classifier, torch.float32).save_pretrained(saved, state_dict=weights)
    again, origin = build_classifier(saved, dtype=torch.float32)
    assert origin.name == "score.weight"
    assert set(again.state_dict()) == names
    torch.testing.assert_close(again(ids).logits.detach(), before, atol=1e-5, rtol=1e-5)
    assert torch.equal(again.score.weight, head)
    assert torch.equal(classifier(ids).logits.detach(), before)  # what trains on has not been touched


def test_unknown_adapter_targets_are_refused(checkpoint: Path) -> None:
    classifier, _ = build_classifier(checkpoint, dtype=torch.float32)
    with pytest.raises(RmtoolError) as caught:
        add_adapters(classifier, LoraConfig(rank=4, targets=("nothing",)))
    assert caught.value.exit_code == 2


def test_a_trained_head_is_loaded_or_reinitialized(checkpoint: Path, tmp_path: Path) -> None:
    settings = recipe(checkpoint, tmp_path)
    encoder, _ = training_encoder(settings, checkpoint)
    trained, _ = build_classifier(checkpoint, dtype=torch.float32)
    kept, notices = training_model(settings, checkpoint, encoder)
    assert torch.equal(kept.classifier.score.weight, trained.score.weight)
    assert any("loaded from the checkpoint" in notice for notice in notices)
    settings = replace(settings, model=replace(settings.model, head="new"), train=replace(settings.train, seed=5))
    drawn, _ = training_model(settings, checkpoint, encoder)
    assert not torch.equal(drawn.classifier.score.weight, trained.score.weight)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc only")
def test_large_blocks_are_reused() -> None:
    """In a separate process: 64 MB that were freed cost no page faults again, unless the user sets MALLOC_
    variables. A small block that happens to lie behind a large one moves the next large one on, so the first rounds do
    not count. Without huge pages, which some systems use by default: 64 MB of them are only 32 faults."""
    code = """if True:
        import ctypes, os, resource, torch
        from rmtool.model.process_settings import tune_malloc
        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
        def faults():
            for _ in range(20):
                torch.ones(2**24)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(2**24)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        os.environ["MALLOC_MMAP_MAX_"] = "65536"
        tune_malloc()
        print(faults())
        del os.environ["MALLOC_MMAP_MAX_"]
        tune_malloc()
        print(faults())
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    given_back, kept = map(int, shown.split())
    pages = 2**26 // resource.getpagesize()
    assert kept < pages / 16
    assert given_back >= pages


@pytest.mark.parametrize("positions", [8, 32, 48])
def test_the_probe_is_no_longer_than_what_the_model_is_given(positions: int) -> None:
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=positions, num_labels=1)
    classifier = AutoModelForSequenceClassification.from_config(config)
    model = RewardModel(classifier, pad_id=0).eval()
    assert choose_layout(model, model, positions).shared


def test_padding_is_probed_without_the_rounding_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 the probe would have to allow so much that a model which padding changes passes."""
    config = NemotronConfig(**tiny_config(97), num_labels=1)
    model = RewardModel(AutoModelForSequenceClassification.from_config(config), pad_id=0, precision="bf16").eval()
    probed: list[Any] = []
    monkeypatch.setattr(
        prefix_sharing, "require_padding", lambda probe: probed.append((probe.padding_error, model.precision))
    )
    assert not choose_layout(model, model, 512).shared
    [(error, precision)] = probed
    assert error < 1e-5
    assert (precision, model.precision) == ("fp32", "bf16")
