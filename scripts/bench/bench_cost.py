"""How rmtool's cost grows: a training step with its unique tokens, planning and packing with the number of records.

    python scripts/bench/bench_cost.py steps --plot cost.png     # seconds of a step from 1k to 64k unique tokens
    python scripts/bench/bench_cost.py planning                  # a million records: seconds, and memory

steps. In: hh-rlhf pairs and a model. Out: the seconds of a forward and backward (`Trainer.step`) at each
size, the straight line through them, the largest distance from it, and a plot.
planning. In: lengths drawn like hh-rlhf's. Out: seconds and growth of memory, of three ways through all records: every
training step planned and packed; every response planned over the whole file and packed, as scoring does; one plan of
training packs over all records at once. The tokens themselves are one small array that all records share, so that
what grows is the planning's own.
Cost: steps takes about 130 times --repeats the time of 1,024 tokens; planning a few minutes on one core and 1 GB.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import benchlib
import numpy as np
from benchlib import BenchError, Event, Session, emit, say, show

SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
# hh-rlhf harmless-base in SmolLM2's tokens: the system prompt, and mean and deviation of the other lengths' logarithm.
SYSTEM, PROMPT_LOG, RESPONSE_LOG = 24, (4.37, 1.04), (3.48, 0.87)
LONGEST = 1024
LIMIT = 0.15


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="part", required=True)
    steps = commands.add_parser("steps", help="seconds of a training step against its unique tokens")
    steps.add_argument("--data", default="hh", help="preference pairs: a file, or hh, rmb (default hh)")
    benchlib.add_common(steps)
    steps.add_argument("--max-length", type=int, default=1024, help="drop longer pairs (default 1024)")
    steps.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="unique tokens per step (default 1k to 64k)")
    steps.add_argument("--repeats", type=int, default=3, help="measurements of each size (default 3)")
    steps.add_argument("--plot", type=Path, help="draw the line into this file")
    planning = commands.add_parser("planning", help="planning and packing many records")
    planning.add_argument("--records", type=int, default=1_000_000, help="pairs (default 1,000,000)")
    planning.add_argument("--batch-size", type=int, default=16, help="pairs per optimizer step (default 16)")
    planning.add_argument("--tokens-per-pack", type=int, default=8192, help="default: rmtool's")
    planning.add_argument("--seed", type=int, default=0)
    planning.add_argument("--json", type=Path, help="also write everything measured to this file")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> int:
    if args.part == "steps":
        return steps_main(args)
    with benchlib.session(__file__, "cpu", 1) as session:
        return planning_main(session, args)


# ---------------------------------------------------------------------------------------- a step's unique tokens


def steps_main(args: argparse.Namespace) -> int:
    if min(args.sizes) < 1 or args.repeats < 1 or len(set(args.sizes)) < 2:
        raise BenchError("--sizes must be at least two different sizes, and --repeats at least 1")
    model, data = benchlib.find_model(args.model), benchlib.find_data(args.data)
    with benchlib.session(__file__, args.device, args.cores) as session:
        checkpoint = {"model": str(model), "random_llama": args.random_llama, "seed": args.seed, "save_dtype": "fp32"}
        saved = session.run("save", {**checkpoint, "checkpoint": str(session.folder / "model")})[-1]
        options = {name: getattr(args, name) for name in ("precision", "max_length", "tokens_per_pack", "seed")}
        spec = {**options, "data": str(data), "folder": str(session.folder), "sizes": sorted(set(args.sizes))}
        events = session.run("steps", {**spec, "repeats": args.repeats}, on_event=_told)
        facts = benchlib.environment({name: saved[name] for name in ("torch", "gpu")})
        cores = session.cores
    padded = benchlib.padded_reason(events)
    events = [event for event in events if event["event"] == "step"]
    points = median_points(events)
    line = fit_line(points)
    show(benchlib.describe(facts, cores))
    show("\n".join([steps_text(args, events, points, line), *benchlib.layout_notes(padded)]))
    benchlib.write_json(
        args.json, {"environment": facts, "padded": padded, "points": points, "line": line, "events": events}
    )
    if args.plot:
        draw(args.plot, events, line)
    return 0


def _told(event: Event) -> None:
    if event["event"] == "step":
        say(f"{event['tokens']:,} unique tokens: {event['seconds']:.2f} s")


def median_points(events: Sequence[Event]) -> list[tuple[float, float]]:
    """(unique tokens, median seconds) of each size."""
    groups: dict[int, list[Event]] = {}
    for event in events:
        groups.setdefault(event["size"], []).append(event)
    return [(group[0]["tokens"], benchlib.spread([e["seconds"] for e in group]).median) for group in groups.values()]


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(seconds at zero, seconds per token) of the line whose relative distances from the points are least squares."""
    tokens, seconds = np.array(points).T
    columns = np.stack((np.ones_like(tokens), tokens), axis=1) / seconds[:, None]
    start, slope = np.linalg.lstsq(columns, np.ones_like(seconds), rcond=None)[0]
    return float(start), float(slope)


def off_the_line(point: tuple[float, float], line: tuple[float, float]) -> float:
    """How far a point lies above the line, as a share of the line."""
    expected = line[0] + line[1] * point[0]
    return point[1] / expected - 1


def steps_text(args: argparse.Namespace, events: Sequence[Event], points: Any, line: tuple[float, float]) -> str:
    rows = []
    for point in points:
        measured = benchlib.spread([event["seconds"] for event in events if event["tokens"] == point[0]])
        rate = benchlib.digits(point[0] / measured.median)
        rows.append([f"{point[0]:,}", str(measured), rate, f"{off_the_line(point, line):+.1%}"])
    worst = max(abs(off_the_line(point, line)) for point in points)
    packing = f"{args.tokens_per_pack:,} tokens per pack"
    title = f"A training step, {args.random_llama or args.model.name}, {args.precision}, {args.data}, {packing}"
    verdict = "within" if worst <= LIMIT else "NOT within"
    return "\n".join(
        [
            benchlib.table(title, ("unique tokens", "seconds", "tokens/s", "off the line"), rows),
            "",
            f"line: {line[0]:.3f} s + {line[1] * 1000:.3f} s per 1,000 unique tokens",
            f"largest distance from it: {worst:.1%}, {verdict} {LIMIT:.0%}",
        ]
    )


def draw(path: Path, events: Sequence[Event], line: tuple[float, float]) -> None:
    """Measurements and line; both axes logarithmic, so that small sizes are seen too."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    tokens = sorted({event["tokens"] for event in events})
    axes.plot(
        tokens, [line[0] + line[1] * count for count in tokens], color="0.6", linewidth=1.2, label="straight line"
    )
    axes.plot([e["tokens"] for e in events], [e["seconds"] for e in events], "o", color="C0", label="one step", ms=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    ticks = sorted({event["size"] for event in events})
    axes.set_xticks(ticks, [f"{tick // 1024}k" if tick >= 1024 else str(tick) for tick in ticks])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_xlabel("unique tokens in the step")
    axes.set_ylabel("seconds, forward and backward")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    say(f"written: {path}")


def time_steps(spec: Event) -> None:
    """Worker: seconds of one training step at each size, in turns, after one step of each size."""
    from rmtool.training.step import training_step

    trainer, units = make_trainer(spec)
    count = benchlib.TokenCount(trainer.model)
    trainer.model.train()
    trainer.engine.update = lambda lr: trainer.engine.clip()  # no update: every step has the same weights
    for repeat in range(spec["repeats"] + 1):
        for size in spec["sizes"]:
            taken = take_tokens(units, size)
            benchlib.synchronize(spec["device"])
            started = time.perf_counter()
            training_step(trainer, taken, 0.0, 1)
            benchlib.synchronize(spec["device"])
            seconds = time.perf_counter() - started
            trainer.engine.optimizer.zero_grad()
            tokens = min(count.take(), sum(unit.group.unique_tokens for unit in taken))
            if repeat:  # the first of each size is warm-up
                emit("step", size=size, tokens=tokens, seconds=seconds)


def take_tokens(units: Sequence[Any], size: int) -> list[Any]:
    """Units from the first on, again from the first if they are too few, of about `size` unique tokens."""
    taken: list[Any] = []
    tokens = 0
    while tokens < size:
        unit = units[len(taken) % len(units)]
        if taken and tokens + unit.group.unique_tokens / 2 > size:
            break
        taken.append(unit)
        tokens += unit.group.unique_tokens
    return taken


def make_trainer(spec: Event) -> tuple[Any, list[Any]]:
    """rmtool's Trainer, and a unit for every pair that is short enough, in a random order."""
    from accelerate import Accelerator

    from rmtool.config import DataConfig, ModelConfig, Recipe, TrainConfig
    from rmtool.data.rejects import Rejects
    from rmtool.dataset.batches import epoch_steps
    from rmtool.dataset.split import load_split
    from rmtool.model.layout_choice import choose_layout
    from rmtool.model.loading import training_encoder, training_model
    from rmtool.training.engine import Engine
    from rmtool.training.optim import build_optimizer
    from rmtool.training.step import Trainer
    from rmtool.ui import SilentUi

    folder = Path(spec["folder"]) / "model"
    data = DataConfig(
        (spec["data"],),
        max_length=spec["max_length"],
        on_long="drop",
        on_empty="keep",
        on_identical="drop",
        cache=False,
    )
    names = ("seed", "precision", "tokens_per_pack")
    train = TrainConfig(batch_size=2**30, learning_rate=1e-5, **{name: spec[name] for name in names})
    recipe = Recipe("bench", ModelConfig(str(folder)), data, train)
    accelerator = Accelerator(cpu=spec["device"] == "cpu")
    encoder, _ = training_encoder(recipe, folder)
    pairs = load_split(recipe, encoder, Rejects(), SilentUi()).train
    model, _ = training_model(recipe, folder, encoder)
    engine = Engine.prepare(accelerator, model, build_optimizer(model, train), train.max_grad_norm)
    if reason := choose_layout(model, engine.wrapped, encoder.max_length).reason:
        emit("padded", reason=reason)
    units = next(epoch_steps(pairs.metadata, pairs.groups, train.seed, 0, train.batch_size))
    return Trainer(recipe, engine, SilentUi(), folder, train.tokens_per_pack), units


# ----------------------------------------------------------------------------------------- planning and packing


def planning_main(session: Session, args: argparse.Namespace) -> int:
    options = {name: getattr(args, name) for name in ("records", "batch_size", "tokens_per_pack", "seed")}
    found: list[Event] = []
    for way in WAYS:
        found += session.run("planning", {**options, "way": way})
        say(f"{way}: {found[-1]['seconds']:.1f} s")
    facts = benchlib.environment({"torch": found[-1]["torch"], "gpu": None})
    rows = [
        [
            event["way"],
            f"{event['seconds']:.1f} s",
            f"{event['growth'] / 2**20:,.0f} MiB",
            f"{event['growth'] / args.records:,.0f}",
            f"{event['packs']:,}",
        ]
        for event in found
    ]
    show(benchlib.describe(facts, session.cores))
    header = ("", "time", "memory grows by", "bytes per record", "packs")
    show(
        benchlib.table(
            f"Planning and packing {args.records:,} pairs, {args.tokens_per_pack:,} tokens a pack", header, rows
        )
    )
    benchlib.write_json(args.json, {"environment": facts, "ways": found})
    return 0


class SharedTokens(Sequence[Any]):
    """Trees of given lengths, made when they are asked for: a system prompt, then windows on one array."""

    def __init__(self, records: int, seed: int):
        rng = np.random.default_rng(seed)

        def draw_lengths(log: tuple[float, float], columns: int) -> Any:
            drawn = np.exp(rng.normal(*log, (records, columns)))
            return np.clip(drawn, 1, LONGEST // 2).astype(np.int32)

        self.lengths = np.concatenate((draw_lengths(PROMPT_LOG, 1), draw_lengths(RESPONSE_LOG, 2)), axis=1)
        self.starts = rng.integers(0, 2**20 - LONGEST, (records, 3), dtype=np.int32)
        self.tokens = rng.integers(0, 49152, 2**20, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        from rmtool.tokenization.response_group import ResponseGroup

        if index >= len(self):
            raise IndexError(index)
        places = zip(self.starts[index].tolist(), self.lengths[index].tolist(), strict=True)
        prompt, *responses = [self.tokens[start : start + length] for start, length in places]
        return ResponseGroup(np.concatenate((self.tokens[:SYSTEM], prompt)), tuple(responses))


def train_order(trees: SharedTokens, spec: Event) -> int:
    """An epoch: its order, then each step planned and packed."""
    from rmtool.data.record import Record
    from rmtool.dataset.batches import epoch_steps
    from rmtool.errors import Place
    from rmtool.packing.packs import pack
    from rmtool.tokenization.pack_plan import plan_packs

    labels = Record(Place("synthetic", 1), (), ((), ()), ((0, 1),), (None,)).metadata()
    packs = 0
    for units in epoch_steps([labels] * len(trees), trees, spec["seed"], 0, spec["batch_size"]):
        step = [unit.group for unit in units]
        for items in plan_packs(step, spec["tokens_per_pack"]):
            pack([step[item] for item in items])
            packs += 1
    return packs


def score_order(trees: SharedTokens, spec: Event) -> int:
    """A file to score: its trees kept on disk as `score_file` does, then `compute_rewards` itself, with a model that
    packs and gives every response the reward 0.
    """
    import torch

    from rmtool.model.reward_model import RewardModel
    from rmtool.model.rewards import compute_rewards
    from rmtool.packing.packs import pack
    from rmtool.tokenization.token_store import TokenStore
    from rmtool.ui import SilentUi

    class Packs(RewardModel):
        made = 0

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.shares_prompts, self.precision = True, "fp32"

        device = torch.device("cpu")

        def build_batch(self, trees: Any) -> Any:
            return pack(trees)

        def forward(self, batch: Any) -> torch.Tensor:
            self.made += 1
            return torch.zeros(len(batch.reward_index))

    model = Packs()
    with TokenStore(Path(spec["scratch"])) as spool:
        for tree in trees:
            spool.append(tree)
        compute_rewards(model, spool, spec["tokens_per_pack"], SilentUi())
    return model.made


def all_at_once(trees: SharedTokens, spec: Event) -> int:
    """One plan over all records: more than any training step asks for."""
    from rmtool.tokenization.pack_plan import plan_packs

    return len(plan_packs(trees, spec["tokens_per_pack"]))


def trees_alone(trees: SharedTokens, spec: Event) -> int:
    """What making the synthetic trees costs, once each: to be taken off the others."""
    for index in range(len(trees)):
        trees[index]
    return 0


WAYS: dict[str, Callable[[SharedTokens, Event], int]] = {
    "making the trees": trees_alone,
    "training, step by step": train_order,
    "scoring": score_order,
    "one plan of all": all_at_once,
}


def plan_records(spec: Event) -> None:
    """Worker: seconds and memory of one way through all records."""
    import torch

    trees = SharedTokens(spec["records"], spec["seed"])
    WAYS[spec["way"]](SharedTokens(64, 1), spec)
    gc.collect()
    benchlib.reset_memory_peak("cpu")
    before = benchlib.memory("cpu")[0]
    started = time.perf_counter()
    packs = WAYS[spec["way"]](trees, spec)
    seconds = time.perf_counter() - started
    growth = benchlib.memory("cpu")[1] - before
    emit("way", way=spec["way"], seconds=seconds, growth=growth, packs=packs, torch=torch.__version__)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(benchlib.serve({"steps": time_steps, "planning": plan_records}))
    sys.exit(benchlib.guarded(lambda: main(parse())))
