"""Helpers of several test files: rows, tiny models of several families, and the installed program."""

from __future__ import annotations

import copy
import inspect
import json
import re
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers as hf
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rmtool.data.formats import preference_record
from rmtool.data.record import Record
from rmtool.data.rows import Row, read_rows
from rmtool.errors import Place
from rmtool.model.classifier import disable_dropout, init_score_head
from rmtool.model.reward_model import RewardModel
from rmtool.tokenization.response_group import ResponseGroup, build_group
from rmtool.training.worker_status import LAUNCHER
from rmtool.ui import SilentUi

ROOT = Path(__file__).parent.parent
DEBUG_MODEL = ROOT / "recipes" / "debug" / "model"
SHARED = ROOT.parent / "shared"


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_pairs(path: Path) -> list[Any]:
    """Return the records of a file with preferences; the first invalid row raises."""
    return [preference_record(row) for row in read_rows(str(path))]


def pair_rows(count: int) -> list[dict[str, Any]]:
    """Return small preference rows of different lengths, each with a different prompt."""
    words = ["red", "green", "blue", "apple", "pear", "plum", "river", "stone", "cloud", "lamp"]
    return [
        {
            "prompt": f"Question {index}: tell me about {words[index % 10]} and {words[index * 3 % 10]}.",
            "chosen": " ".join(words[: 2 + index % 5]) + " indeed.",
            "rejected": " ".join(words[5 : 7 + index % 4]),
            "subset": "even" if index % 2 == 0 else "odd",
        }
        for index in range(count)
    ]


def save_reward_model(folder: Path, config_class: Any, tokenizer: Any, seed: int) -> Path:
    """Save a tiny model of a family with random weights, as transformers does."""
    torch.manual_seed(seed)
    config = config_class(**tiny_config(len(tokenizer)), num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    init_score_head(model, 0)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_config(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@dataclass(frozen=True)
class Shown:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str | None:
        found = re.search(r"error\[(E\d{4})\]", self.err)
        return found and found.group(1)


def scored(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


PROGRAM = Path(sys.executable).parent / "rmtool"


def group_members(session: int) -> list[int]:
    """Return the living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def until(holds: Callable[[], bool], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


VOCABULARY = 97
WINDOW = 8


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in names}


TINY = tiny_config(VOCABULARY) | {"num_labels": 1}


FAMILIES = {
    "llama": hf.LlamaConfig(**TINY),
    "qwen3": hf.Qwen3Config(**TINY),
    "mistral_window": hf.MistralConfig(**TINY, sliding_window=WINDOW),
    "gemma3": hf.Gemma3TextConfig(
        **TINY, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
    ),
    "olmo2": hf.Olmo2Config(**without(TINY, "head_dim")),
    "gpt_neox": hf.GPTNeoXConfig(**without(TINY, "head_dim", "num_key_value_heads")),
    "qwen2": hf.Qwen2Config(**without(TINY, "head_dim")),
    "phi3": hf.Phi3Config(**without(TINY, "head_dim")),
    # A soft cap and sinks that change rewards.
    "gemma2": hf.Gemma2Config(**TINY, sliding_window=WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=0.5),
    "gpt_oss": hf.GptOssConfig(**TINY, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2),
}


def build(config: Any) -> RewardModel:
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(copy.deepcopy(config))
    init_score_head(classifier, 0)
    disable_dropout(classifier)
    return RewardModel(classifier, pad_id=0).eval()


def random_groups(
    seed: int, shapes: tuple[tuple[int, tuple[int, ...]], ...], last: int = VOCABULARY
) -> list[ResponseGroup]:
    rng = np.random.default_rng(seed)
    groups = []
    for prompt_length, responses in shapes:
        prompt = rng.integers(3, last, prompt_length)
        groups.append(build_group([np.concatenate((prompt, rng.integers(3, last, n))) for n in responses]))
    return groups


GROUPS = random_groups(3, ((25, (7, 12)), (3, (1, 30, 5)), (0, (11,)), (40, (2, 2, 9, 1))))


def alone(model: RewardModel, groups: list[ResponseGroup]) -> torch.Tensor:
    """Return the reward of each response alone, from the unchanged transformers model."""
    model.share_prompts(False)
    rewards = []
    for group in groups:
        for ids in group.sequences():
            rewards.append(model.classifier(input_ids=torch.tensor(ids[None].astype(np.int64))).logits[0, 0])
    return torch.stack(rewards)


def gradients(model: RewardModel, rewards: torch.Tensor) -> dict[str, torch.Tensor]:
    # A linear read-out with fixed weights: a norm of the outputs would have almost no gradient and hide errors.
    weights = torch.linspace(-1.0, 2.0, len(rewards))
    model.zero_grad()
    (rewards * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-12))


def numbered_records(count: int) -> list[Record]:
    return [preference_record(Row(Place("x", n), row)) for n, row in enumerate(pair_rows(count), 1)]


# Before, text with control tokens is an error (test_control_tokens.py).
sanitizing = pytest.mark.skipif(
    "sanitize_control_tokens" not in inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    reason="requires transformers 5.23",
)


class Lines(SilentUi):
    """What is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def started_by(launcher: int) -> list[psutil.Process]:
    """Every living process that the rmtool command with this process id started, directly or not."""
    found = psutil.process_iter(["environ"])
    return [each for each in found if (each.info["environ"] or {}).get(LAUNCHER) == str(launcher)]


def logged_steps(run: Path) -> int:
    """The lines of metrics.jsonl in a run folder."""
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_recipe(causal_lm: Path, folder: Path, engine: str = "single", processes: int = 1, more: str = "") -> Path:
    """Write a recipe for small pairs: steps of 8, in packs of at most 240 tokens, in fp32; skips steps of NaN."""
    write_jsonl(folder / "pairs.jsonl", pair_rows(32))
    path = folder / "tiny.yaml"
    path.write_text(
        f"model: {{path: {causal_lm}}}\n"
        f"data: {{train: [{folder / 'pairs.jsonl'}], max_length: 256, cache: false}}\n"
        "train: {batch_size: 8, learning_rate: 1e-3, tokens_per_pack: 240, precision: fp32, "
        f"on_nonfinite: skip, max_skips: 3, liger: off{more}}}\n"
        f"launch: {{engine: {engine}, gpus_per_node: {processes}}}\n"
    )
    return path
