#!/usr/bin/env python3
"""Predict how a training step scales to thousands of GPUs: what ranks wait for each other, and for the network.

In: measured step times (`bench_cost.py steps --json FILE`, on any machine), preference pairs for their lengths, a
model's config.json, and the speeds of links. Out: a table per rule of batch size.
rmtool's own planner packs every simulated step. Nothing is trained. What is assumed stands under the table.
Cost: some minutes; most goes into planning the steps of 4,096 ranks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchlib
import numpy as np
from benchlib import BenchError, digits, say, show, table

PASSES = 3  # of the weights over the network and round: gathered for the forward, for the backward; gradients back
HEADER = ("GPUs", "pairs per step", "packs per rank", "slowest over mean", "heaviest pair over mean", "compute s",
          "network s", "step s", "pairs/s a GPU")  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """peak: flops a second and GPU; nvlink, nic: bytes a second and GPU within a node and out of it; hop: seconds."""

    peak: float
    utilization: float
    nvlink: float
    nic: float
    hop_within: float
    hop_between: float
    per_node: int = 8

    def collective(self, bytes_: float, calls: int, world: int) -> float:
        """Seconds of a ring over all ranks: every byte passes the slowest link, and each call goes round once."""
        nodes = -(-world // self.per_node)
        # A ring leaves a node once; the node's GPUs run a ring each.
        speed = self.nvlink if nodes == 1 else min(self.nvlink, self.nic * self.per_node)
        round_trip = (world - nodes) * self.hop_within + (nodes if nodes > 1 else 0) * self.hop_between
        return bytes_ * (world - 1) / world / speed + calls * round_trip


@dataclass(frozen=True)
class Model:
    """weights: all; multiplied: those in matrices; key_cost: as in `RewardModel`; layers: gathered one by one."""

    weights: int
    multiplied: int
    key_cost: float
    layers: int


@dataclass(frozen=True)
class Measured:
    """Of steps on a real machine: the time of no token in tokens, and the median of each size over the fitted line."""

    fixed_tokens: float
    residuals: tuple[float, ...]


@dataclass(frozen=True)
class Step:
    """Seconds, but for the shares."""

    packs: int
    slowest: float  # the rank with most work over the mean
    one_pair: float  # the heaviest pair alone over the mean: no plan can be better
    compute: float
    network: float

    @property
    def seconds(self) -> float:
        """Of the longer of both: the other runs beneath it."""
        return max(self.compute, self.network)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measured", type=Path, required=True, help="what `bench_cost.py steps --json` wrote")
    parser.add_argument("--data", default="hh", help="preference pairs: a file, or hh, rmb (default hh)")
    parser.add_argument("--tokenizer", type=Path, default=benchlib.MODEL, help="folder of a tokenizer")
    parser.add_argument("--config", type=Path, help="folder with a config.json (default: Llama 3.1 8B's shape)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--pairs-per-gpu", type=int, nargs="*", default=[4, 16], help="batches that grow with the GPUs")
    parser.add_argument("--pairs-per-step", type=int, nargs="*", default=[256], help="batches that stay the same")
    parser.add_argument("--steps", type=int, default=5, help="simulated steps of each kind (default 5)")
    parser.add_argument("--tokens-per-pack", type=int, default=8192)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of one GPU (default: H100, bf16)")
    parser.add_argument("--utilization", type=float, default=0.4, help="of it, while a GPU computes (default 0.4)")
    parser.add_argument("--nvlink", type=float, default=450.0, help="GB/s and GPU within a node (default 450)")
    parser.add_argument("--nic", type=float, default=50.0, help="GB/s and GPU between nodes (default 50: 400 Gbit/s)")
    parser.add_argument("--hops", type=float, nargs=2, default=[1.0, 5.0], help="microseconds within and between nodes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> int:
    machine = Machine(args.peak_tflops * 1e12, args.utilization, args.nvlink * 1e9, args.nic * 1e9,
                      args.hops[0] / 1e6, args.hops[1] / 1e6)  # fmt: skip
    measured, model = read_measured(args.measured), describe_model(args.config)
    lengths = read_lengths(benchlib.find_data(args.data), benchlib.find_model(args.tokenizer), args.max_length)
    found: dict[str, Any] = {}
    rules = [(f"{n:,} pairs per step", n, 0) for n in args.pairs_per_step]
    rules += [(f"{n:,} pairs a GPU", 0, n) for n in args.pairs_per_gpu]
    for title, fixed, each in rules:
        rows = []
        for world in args.gpus:
            pairs = fixed or each * world
            say(f"{title}: {world:,} GPUs")
            draw = np.random.default_rng([args.seed, world, pairs])
            steps = [
                simulate(lengths, pairs, world, args.tokens_per_pack, model, machine, measured, draw)
                for _ in range(args.steps)
            ]
            rows.append(row(world, pairs, steps))
            found[f"{title}, {world} GPUs"] = [vars(step) | {"seconds": step.seconds} for step in steps]
        show(table(f"{args.data}, {title} (median of {args.steps} steps)", HEADER, rows))
        show("")
    show(assumptions(args, model, measured, len(lengths)))
    benchlib.write_json(args.json, found)
    return 0


def row(world: int, pairs: int, steps: Sequence[Step]) -> list[str]:
    def middle(name: str) -> float:
        return statistics.median(getattr(step, name) for step in steps)

    seconds = middle("seconds")
    return [f"{world:,}", f"{pairs:,}", f"{middle('packs'):.0f}", f"{middle('slowest'):.3f}",
            f"{middle('one_pair'):.3f}", digits(middle("compute")), digits(middle("network")),
            digits(seconds), digits(pairs / seconds / world)]  # fmt: skip


def assumptions(args: argparse.Namespace, model: Model, measured: Measured, records: int) -> str:
    off = max(abs(value - 1) for value in measured.residuals)
    return "\n".join([
        f"lengths: drawn with repetition from {records:,} records of {args.data}, at most {args.max_length:,} tokens;",
        "  prompts are taken to be shared within a record only",
        f"compute: {model.multiplied / 1e9:.2f} billion weights, 6 flops each and token, attention counted, at "
        f"{args.utilization:.0%} of {args.peak_tflops:g} TFLOP/s",
        f"measured: a pack costs {measured.fixed_tokens:,.0f} tokens more than it has; a rank's time is off the line",
        f"  as the median of one of {len(measured.residuals)} measured sizes was, at most by {off:.1%}",
        f"network: ZeRO-3 in bf16 over one ring per GPU of a node; {args.nvlink:g} GB/s within a node,",
        f"  {args.nic:g} GB/s a GPU between nodes, {args.hops[0]:g} and {args.hops[1]:g} microseconds a hop; each",
        "  layer is gathered twice and its gradients scattered once per round of packs, wholly beneath compute",
        "slowest over mean: of the predicted work; where one pair alone is above it, no plan can do better;",
        "  step s has the measured jitter in it too",
    ])  # fmt: skip


def simulate(
    lengths: Sequence[tuple[int, tuple[int, ...]]], pairs: int, world: int, max_tokens: int, model: Model,
    machine: Machine, measured: Measured, draw: np.random.Generator,
) -> Step:  # fmt: skip
    """One step of `pairs` records on `world` ranks. Under ZeRO-3 ranks gather every layer together: each round of
    packs takes as long as its slowest.
    """
    from rmtool.tokenization.pack_plan import key_count, plan_packs

    drawn = draw.integers(len(lengths), size=pairs)
    groups = [group_of(*lengths[index], number) for number, index in enumerate(drawn)]
    costs = np.array([group.unique_tokens + model.key_cost * key_count(group) for group in groups])
    packs = plan_packs(groups, max_tokens, world, key_cost=model.key_cost)
    work = np.array([costs[items].sum() for items in packs]).reshape(-1, world)
    jitter = draw.choice(np.array(measured.residuals), size=work.shape)
    times = (work + measured.fixed_tokens) * jitter * 6 * model.multiplied / (machine.peak * machine.utilization)
    rounds = len(work)
    ranks = work.sum(axis=0)
    network = rounds * machine.collective(PASSES * 2 * model.weights, PASSES * model.layers, world)
    return Step(
        packs=rounds,
        slowest=float(ranks.max() / ranks.mean()),
        one_pair=float(costs.max() / ranks.mean()),
        compute=float(times.max(axis=1).sum()),
        network=network if world > 1 else 0.0,
    )


def group_of(prompt: int, responses: Sequence[int], number: int) -> Any:
    """A response group with these lengths whose tokens no other one begins with."""
    from rmtool.tokenization.response_group import build_group

    start = [number] * prompt
    return build_group([start + [2**30 + number * 64 + place] * length for place, length in enumerate(responses)])


def read_lengths(data: Path, folder: Path, max_length: int) -> list[tuple[int, tuple[int, ...]]]:
    """(tokens of the prompt, of each response) of every record."""
    from rmtool.config import DataConfig, ModelConfig, Recipe, TrainConfig
    from rmtool.data.rejects import Rejects
    from rmtool.dataset.split import load_split
    from rmtool.model.loading import training_encoder
    from rmtool.ui import SilentUi

    config = DataConfig((str(data),), max_length=max_length, on_long="drop", on_empty="keep", on_identical="drop")
    recipe = Recipe("simulated", ModelConfig(str(folder)), config, TrainConfig(batch_size=1, learning_rate=1.0))
    encoder, _ = training_encoder(recipe, folder)
    groups = load_split(recipe, encoder, Rejects(), SilentUi()).train.groups
    return [(len(group.prompt), tuple(len(response) for response in group.responses)) for group in groups]


def describe_model(folder: Path | None) -> Model:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaConfig

    from rmtool.model.reward_model import RewardModel

    llama = LlamaConfig(vocab_size=128_264, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
                        num_attention_heads=32, num_key_value_heads=8, pad_token_id=0)  # fmt: skip
    config = AutoConfig.from_pretrained(folder) if folder else llama
    config.num_labels = 1
    with torch.device("meta"):
        model = RewardModel(AutoModelForSequenceClassification.from_config(config), 0)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return Model(weights, model.active_matmul_params, model.key_cost, config.get_text_config().num_hidden_layers)


def read_measured(path: Path) -> Measured:
    """Of `bench_cost.py steps`: its line through the points, and how far each measurement was from it."""
    if not path.is_file():
        raise BenchError(f"file not found: {path}; write it with: scripts/bench/bench_cost.py steps --json {path}")
    content = json.loads(path.read_text(encoding="utf-8"))
    start, slope = content["line"]
    residuals = tuple(seconds / (start + slope * tokens) for tokens, seconds in content["points"])
    return Measured(max(0.0, start / slope), residuals)


if __name__ == "__main__":
    arguments = parse()
    sys.exit(benchlib.guarded(lambda: main(arguments)))
