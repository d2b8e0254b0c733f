"""A pretrained model and real preference pairs of ../shared, which random weights and generated rows cannot replace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHARED, read_pairs
from random_batches import Draw, Pool, alone, check

from rmtool.data.record import Message
from rmtool.model.classifier import build_classifier, init_score_head
from rmtool.model.layout_choice import choose_layout
from rmtool.model.loading import load_for_inference
from rmtool.model.rewards import compute_rewards
from rmtool.model.stored_weights import HeadOrigin
from rmtool.tokenization.encoder import Encoder
from rmtool.tokenization.tokenized_dataset import tokenize_records
from rmtool.tokenization.tokenizer import load_tokenizer
from rmtool.ui import SilentUi

HH = SHARED / "data" / "hh-rlhf-harmless-base.test.jsonl.gz"
RMB = SHARED / "data" / "train" / "rmb-preferences.jsonl.gz"
MAKER = SHARED / "models" / "make_smollm2.py"

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not MAKER.is_file(), reason="../shared not found"),
]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, built once from the package that contains it, in the user's cache."""
    folder = Path.home() / ".cache" / "rmtool" / "SmolLM2-135M-Instruct"
    subprocess.run([sys.executable, MAKER, folder], check=True, capture_output=True)
    return folder


def test_every_real_row_is_parsed_and_tokenized(smollm2: Path) -> None:
    encoder = Encoder(load_tokenizer(smollm2), 2**15, on_empty="keep")
    hh = read_pairs(HH)
    assert len(hh) == 2312
    encoded = tokenize_records(encoder, hh, "error", lambda: None)
    whole = sum(len(ids) for group in encoded.groups for ids in group.sequences())
    assert sum(group.unique_tokens for group in encoded.groups) < 0.65 * whole
    rmb = read_pairs(RMB)
    assert len(rmb) == 6975
    assert {record.subset is not None for record in rmb} == {True}
    tokenize_records(encoder, rmb[:300], "error", lambda: None)


def test_the_real_model_shares_prompts_exactly_on_real_pairs(smollm2: Path) -> None:
    from rmtool.model.reward_model import RewardModel

    classifier, head = build_classifier(smollm2, dtype=torch.float32)
    assert head == HeadOrigin()
    init_score_head(classifier, 0)
    model = RewardModel(classifier, pad_id=0).eval()
    assert choose_layout(model, model, 2048).shared
    encoder = Encoder(load_tokenizer(smollm2), 2048, on_empty="keep")
    groups = tokenize_records(encoder, read_pairs(HH)[:6], "error", lambda: None).groups
    shared = compute_rewards(model, groups, 2048, SilentUi())
    model.share_prompts(False)
    alone = [
        [classifier(torch.tensor(ids[None]).long()).logits.item() for ids in group.sequences()] for group in groups
    ]
    torch.testing.assert_close(torch.tensor(shared), torch.tensor(alone), atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("rounded")
def test_the_real_model_shares_prompts_in_bf16(smollm2: Path) -> None:
    """Its bf16 rewards are as close to fp32 rewards as those of padded batches are."""
    from rmtool.model.reward_model import RewardModel

    classifier, _ = build_classifier(smollm2, dtype=torch.float32)
    init_score_head(classifier, 0)
    model = RewardModel(classifier, pad_id=0, precision="bf16").eval()
    assert choose_layout(model, model, 2048).shared
    encoder = Encoder(load_tokenizer(smollm2), 2048, on_empty="keep")
    groups = tokenize_records(encoder, read_pairs(HH)[:60], "error", lambda: None).groups
    groups = sorted(groups, key=lambda group: group.longest)[:24]
    rewards = {}
    for precision, shares in (("fp32", True), ("bf16", True), ("bf16", False)):
        model.precision = precision
        model.share_prompts(shares)
        rewards[precision, shares] = np.array(compute_rewards(model, groups, 2048, SilentUi()))
    shared, padded = (np.std(rewards["bf16", shares] - rewards["fp32", True]) for shares in (True, False))
    assert shared < 1.5 * padded


def test_the_real_model_gives_one_reward_in_any_batch(smollm2: Path) -> None:
    """Random batches of short real pairs, packed and padded; fp32, within 1e-5 of the largest reward.

    That is ten times the tolerance of the tiny models: rounding errors accumulate over 30 layers instead of 2.
    """
    from rmtool.model.reward_model import RewardModel

    classifier, _ = build_classifier(smollm2, dtype=torch.float32)
    init_score_head(classifier.eval(), 0)
    encoder = Encoder(load_tokenizer(smollm2), 2048, on_empty="keep")
    groups = tokenize_records(encoder, read_pairs(HH), "error", lambda: None).groups
    shortest = sorted(groups, key=lambda group: group.longest)[:8]
    prompts = tuple(tuple(group.sequences()) for group in shortest)
    classifier.score.weight.data /= max(abs(alone(classifier, ids)) for responses in prompts for ids in responses)
    rewards = {ids.tobytes(): alone(classifier, ids) for responses in prompts for ids in responses}
    model = RewardModel(classifier, pad_id=0)
    rng = np.random.default_rng(0)
    for max_tokens, shared in ((150, True), (400, True), (4096, True), (150, False), (4096, False)):
        order = rng.permutation(np.r_[np.arange(len(prompts)), 0])
        check(Pool(model, prompts, rewards), Draw(tuple(prompts[item] for item in order), max_tokens, shared), 1e-5)


def test_the_smollm2_recipe_trains_saves_and_scores(smollm2: Path, tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "rmtool"
    sets = ["train.max_steps=3", "train.batch_size=4", "data.holdout=12", "data.on_long=drop", "data.max_length=512"]
    flags = [part for text in sets for part in ("--set", text)]
    command = [program, "train", "--recipe", "smollm2-135m", "--model", smollm2, "--data", HH, *flags]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "pad token: added <|pad|> (id 49152) instead of <|im_end|>, which also ends responses" in shown.stderr
    run = tmp_path / "runs" / "smollm2-135m"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    result = subprocess.run([program, "eval", run, "--json"], capture_output=True, text=True, check=True)
    report = json.loads(result.stdout)
    for name in (name for name in last if name.startswith("eval/rm/")):
        assert report[name] == pytest.approx(last[name], abs=1e-5)
    loaded = load_for_inference(run / "model")
    tokenizer = loaded.encoder.tokenizer
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    # The same number from plain transformers, alone and right-padded beside a longer one.
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(run / "model", dtype=torch.float32)
    chats = [[Message("user", "Hi"), Message("assistant", text)] for text in ("Hello!", "Go away, I am busy now.")]
    ids = [loaded.encoder.ids(chat) for chat in chats]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    from rmtool.tokenization.response_group import build_group

    mine = compute_rewards(loaded.model, [build_group(ids)], 2048, SilentUi())[0]
    assert plain(**batch).logits[:, 0].tolist() == pytest.approx(mine, abs=1e-4)
