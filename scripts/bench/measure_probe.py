"""Error rates of the prefix sharing checks in half precision: sound models refused, and mutants accepted.

    python scripts/bench/measure_probe.py --models 500 --seed 0 --json probe.json     # --rounded: on any CPU

In: a seed. Random models of seven families, 2 to 80 layers, hidden sizes 64 to 1,024, windows, grouped heads. Each is
checked unchanged in bf16 and in fp16, and in bf16 with every mutant of `tests/mutants.py`. Out: how many sound models
were refused, how many mutants were accepted, and the margins to the tolerances.
Cost: about 20 checks per model, a second or two on one core; one process per core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tests"))
from benchlib import say
from mutants import MUTANTS
from rounding import round_forwards
from transformers import AutoModelForSequenceClassification

from rmtool.model.classifier import build_classifier, disable_dropout, init_score_head
from rmtool.model.layout_choice import choose_layout
from rmtool.model.reward_model import RewardModel
from rmtool.packing import prefix_sharing
from rmtool.packing.layers import keep_first_layers

FAMILIES = {
    "llama": hf.LlamaConfig,
    "qwen2": hf.Qwen2Config,
    "qwen3": hf.Qwen3Config,
    "mistral": hf.MistralConfig,
    "gemma3": hf.Gemma3TextConfig,
    "phi3": hf.Phi3Config,
    "olmo2": hf.Olmo2Config,
}
WINDOWED = ("mistral", "gemma3")
MAX_LENGTH = 2048


def random_config(rng: np.random.Generator) -> tuple[str, Any]:
    """Draw a family and a config; deep models are narrow, so that a thousand can be tested."""
    family = str(rng.choice(list(FAMILIES)))
    hidden = int(rng.choice([64, 128, 256, 512, 1024], p=[0.4, 0.3, 0.2, 0.07, 0.03]))
    layers = min(int(np.exp(rng.uniform(np.log(2), np.log(81)))), 80 if hidden < 256 else 6144 // hidden)
    head_size = int(rng.choice([8, 16, 32, 64]))
    heads = max(1, hidden // head_size)
    settings: dict[str, Any] = {
        "vocab_size": int(rng.choice([97, 512, 2000])),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": int(rng.choice([n for n in (1, 2, 4, 8, heads) if heads % n == 0])),
        "initializer_range": float(rng.choice([0.02, 0.05, 0.1])),
        "max_position_embeddings": MAX_LENGTH,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_labels": 1,
    }
    if family in ("llama", "qwen3", *WINDOWED):
        settings["head_dim"] = head_size
    if family in WINDOWED:
        settings["sliding_window"] = int(rng.choice([4, 8, 16, 64, 256, 1024], p=[0.2, 0.2, 0.2, 0.2, 0.15, 0.05]))
    if family == "gemma3":
        kinds = ("sliding_attention", "full_attention")
        settings |= {"layer_types": [kinds[at % 2] for at in range(layers)], "query_pre_attn_scalar": head_size}
    return family, FAMILIES[family](**settings)


def build(seed: int, pretrained: str | None = None) -> tuple[str, RewardModel]:
    """Build the random model of this seed; or take the first layers of a pretrained one, 1 to all of them."""
    torch.manual_seed(seed)
    if pretrained:
        family, classifier = "pretrained", build_classifier(Path(pretrained), dtype=torch.float32)[0]
        backbone = getattr(classifier, classifier.base_model_prefix)
        keep_first_layers(backbone, 1 + seed % backbone.config.num_hidden_layers)
    else:
        family, config = random_config(np.random.default_rng(seed))
        classifier = AutoModelForSequenceClassification.from_config(config)
    init_score_head(classifier, seed)
    disable_dropout(classifier)
    return family, RewardModel(classifier, 0).eval()


class Recorder:
    """The errors that the checks compare with their tolerances."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.seen: dict[str, float] = {}
        real_error, real_kernel = prefix_sharing.Probe.error, prefix_sharing.kernel_failure

        def error(probe: prefix_sharing.Probe, states: torch.Tensor) -> float:
            found = real_error(probe, states)
            self.seen.setdefault("states", found)  # of the packed batch; padded ones come later
            return found

        def kernel(worst: float) -> str | None:
            self.seen["kernel"] = worst
            return real_kernel(worst)

        patch.setattr(prefix_sharing.Probe, "error", error)
        patch.setattr(prefix_sharing, "kernel_failure", kernel)


def try_model(job: tuple[int, str | None, bool, Sequence[str]]) -> dict[str, Any]:
    """Run all checks of one model; returns what was refused, and the errors."""
    seed, pretrained, rounded, mutants = job
    torch.set_num_threads(1)
    family, model = build(seed, pretrained)
    config = model.backbone.config.get_text_config()
    record: dict[str, Any] = {"seed": seed, "family": family, "layers": config.num_hidden_layers,
                              "hidden": config.hidden_size, "sound": {}, "mutants": {}}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        if rounded:
            round_forwards(patch)
        for precision in ("bf16", "fp16"):
            record["sound"][precision] = _load(model, precision)
        for mutant in MUTANTS:
            if mutant.name in mutants and (not mutant.windowed or family in WINDOWED):
                with patch.context() as inner:
                    mutant.install(inner)
                    record["mutants"][mutant.name] = _load(model, "bf16")
    return record


def _load(model: RewardModel, precision: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        model.precision = precision
        reason = choose_layout(model, model, MAX_LENGTH).reason
    return {"refused": reason, **recorder.seen}


def summarize(records: list[dict[str, Any]]) -> list[str]:
    lines = []
    for precision in ("bf16", "fp16"):
        loads = [record["sound"][precision] for record in records]
        refused = sum(load["refused"] is not None for load in loads)
        states, kernel = (max(load.get(name, 0.0) for load in loads) for name in ("states", "kernel"))
        lines.append(
            f"sound, {precision}: {refused} of {len(loads)} refused (states {states:.1e}, kernel {kernel:.2f})"
        )
    found = defaultdict[str, list[dict[str, Any]]](list)
    for record in records:
        for name, load in record["mutants"].items():
            found[name].append(load)
    for name, loads in found.items():
        refused = [load for load in loads if load["refused"]]
        by = "kernel" if name.endswith("in_half_only") else "states"
        least = min(load.get(by, 0.0) for load in loads)
        lines.append(f"{name}: {len(refused)} of {len(loads)} refused (smallest {by} {least:.2g})")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--pretrained", help="Use the first layers of the model in this folder.")
    parser.add_argument("--rounded", action="store_true", help="Round every part of every half-precision product.")
    parser.add_argument("--sound-only", action="store_true", help="Skip the mutants.")
    parser.add_argument("--windowed", action="store_true", help="Only families and mutants with a window.")
    parser.add_argument("--json", type=Path, help="Write one JSON line per model to this file.")
    given = parser.parse_args()
    seeds = range(given.seed, given.seed + 10**6)
    if given.windowed:
        seeds = [
            seed for seed in seeds[: 20 * given.models] if random_config(np.random.default_rng(seed))[0] in WINDOWED
        ]
    mutants = [mutant.name for mutant in MUTANTS if not given.sound_only and (mutant.windowed or not given.windowed)]
    jobs = [(seed, given.pretrained, given.rounded, mutants) for seed in seeds[: given.models]]
    started, records = time.monotonic(), []
    with (
        multiprocessing.get_context("spawn").Pool(given.processes) as pool,
        open(given.json or os.devnull, "w") as file,
    ):
        for record in pool.imap_unordered(try_model, jobs):
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
    wrong = [record for record in records if any(load["refused"] for load in record["sound"].values())
             or any(not load["refused"] for load in record["mutants"].values())]  # fmt: skip
    for line in summarize(records):
        say(line)
    say(f"{len(records)} models in {time.monotonic() - started:.0f} s; wrong: {[record['seed'] for record in wrong]}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
