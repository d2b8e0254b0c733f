"""Training speed and memory: rmtool against TRL's RewardTrainer, on the same pairs, from the same weights.

    python scripts/bench/bench_train.py --data hh --precision fp32
    python scripts/bench/bench_train.py --data rmb --precision bf16 --json train-rmb-bf16.json

In: preference pairs (a file, or hh and rmb of ../shared) and a causal LM. Out: a table, and with --json every step.
rmtool runs its own training loop (`train_loop`), TRL its RewardTrainer: same checkpoint, same pairs in
the same order, same AdamW, no dropout, no gradient checkpointing. They run in turn, a process each, --rounds times,
TRL first with every batch size of --peer-batch, then with the one that was fastest. The first step of a process is
warm-up: it counts in "all steps" only. The loss of every step is compared: where they differ the script says so last
and exits with 1.
Cost: (1 + --steps) steps of --batch-size pairs per process; --rounds processes of rmtool, one more of TRL. TRL on two
cores without bf16 hardware takes minutes per step in fp32, and about ten in bf16.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchlib
from benchlib import BenchError, Event, Session, emit, say, show

from rmtool.model.layout_choice import choose_layout

# Largest difference of the two systems' loss. Rounding grows from step to step, since Adam divides by what it rounds.
FIRST_LOSS = {"fp32": 1e-3, "bf16": 3e-2}
LATER_LOSS = {"fp32": 2e-2, "bf16": 1e-1}
LEARNING_RATE = 1e-5
AUTO_BATCHES = 2  # tried of the whole batch, its half, its quarter, ...; more if none of these works
OURS, THEIRS = "rmtool", "trl"


@dataclass(frozen=True)
class Run:
    """One process: `batch` pairs are padded together (TRL), `steps` holds the warm-up first."""

    system: str
    batch: int
    round: int
    setup_seconds: float
    memory_before: int
    steps: list[Event]
    padded: str | None = None  # why rmtool did not share prompts

    @property
    def measured(self) -> list[Event]:
        return self.steps[1:]

    @property
    def peak(self) -> int:
        return max(int(step["memory"]) for step in self.steps)

    @property
    def pace(self) -> float:
        """Pairs per second without the warm-up."""
        return sum(step["pairs"] for step in self.measured) / sum(step["seconds"] for step in self.measured)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="hh", help="preference pairs: a file, or hh, rmb (default hh)")
    benchlib.add_common(parser)
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per optimizer step (default 16)")
    parser.add_argument("--max-length", type=int, default=1024, help="drop longer pairs (default 1024)")
    parser.add_argument(
        "--steps", type=int, default=4, help="measured steps per process, after one warm-up (default 4)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="processes of each system, in turn (default 2)")
    parser.add_argument(
        "--peer-batch", default="auto", help="pairs that TRL pads together; the rest is accumulated (default: finds it)"
    )
    parser.add_argument(
        "--liger", choices=("auto", "off"), default="auto", help="rmtool's kernels on a GPU (default auto)"
    )
    parser.add_argument("--compile", action="store_true", help="compile rmtool's layers, as in long runs on a CPU")
    benchlib.add_peers(parser)
    return parser.parse_args(arguments)


def peer_batches(text: str, batch_size: int) -> list[int]:
    """The batches to try for TRL, in this order, until enough of them have worked."""
    if text == "auto":
        return [
            batch_size >> halvings for halvings in range(batch_size.bit_length()) if batch_size % (1 << halvings) == 0
        ]
    if not text.isdecimal() or int(text) < 1 or batch_size % int(text):
        raise BenchError(f"--peer-batch {text}: a number that divides --batch-size {batch_size}, or auto")
    return [int(text)]


def main(args: argparse.Namespace) -> int:
    if min(args.steps, args.rounds, args.batch_size) < 1:
        raise BenchError("--steps, --rounds and --batch-size must be at least 1")
    batches = peer_batches(args.peer_batch, args.batch_size)
    model, data = benchlib.find_model(args.model), benchlib.find_data(args.data)
    peer = None if args.without_peers else benchlib.peer_python(args.peer_python)
    with benchlib.session(__file__, args.device, args.cores) as session:
        session.peer = peer
        saved, prepared = prepare(session, args, model, data)
        spec = work_spec(session, args)
        peaks = [session.peak(args.precision)]
        runs = take_turns(session, spec, batches if peer else [], args.rounds)
        peaks.append(session.peak(args.precision))
        result = Result(args, saved, prepared, runs, max(peaks))
        facts = benchlib.environment({name: saved[name] for name in ("torch", "gpu")})
        show(benchlib.describe(facts, session.cores))
        show(result.text())
        benchlib.write_json(args.json, {"environment": facts, **result.as_dict()})
    problems = result.problems()
    for problem in problems:
        say(f"NOT THE SAME WORK: {problem}")
    return 1 if problems else 0


def prepare(session: Session, args: argparse.Namespace, model: Path, data: Path) -> tuple[Event, Event]:
    """The checkpoint and the pairs of every system."""
    say("preparing the checkpoint and the pairs")
    checkpoint = {"model": str(model), "random_llama": args.random_llama, "seed": args.seed, "save_dtype": "fp32"}
    saved = session.run("save", {**checkpoint, "checkpoint": str(session.folder / "model")})[-1]
    pairs = (1 + args.steps) * args.batch_size
    spec = {"data": str(data), "pairs": pairs, "max_length": args.max_length, "seed": args.seed}
    return saved, session.run("pairs", {**spec, "folder": str(session.folder)})[-1]


def work_spec(session: Session, args: argparse.Namespace) -> Event:
    return {
        "folder": str(session.folder),
        **{name: getattr(args, name) for name in ("batch_size", "max_length", "precision", "seed", "tokens_per_pack")},
        "steps": 1 + args.steps,
        "liger": args.liger,
        "compile": args.compile,
    }


def take_turns(session: Session, spec: Event, batches: list[int], rounds: int) -> list[Run]:
    """rmtool, TRL, rmtool, TRL, ... In the first round TRL runs once with each of `batches`."""
    runs: list[Run] = []
    for number in range(1, rounds + 1):
        runs.append(one_run(session, spec, OURS, spec["batch_size"], number))
        tried: list[Run] = []
        for batch in batches:
            if len(tried) < AUTO_BATCHES:
                tried += try_peer(session, spec, batch, number, alone=len(batches) == 1)
        if batches and not tried:
            raise BenchError("TRL failed with every batch size; its errors are above")
        runs += tried
        batches = [max(tried, key=lambda run: run.pace).batch] if tried else []
    return runs


def try_peer(session: Session, spec: Event, batch: int, number: int, *, alone: bool) -> list[Run]:
    """A run of TRL; none if it failed (a full device) and there are other batch sizes to try."""
    try:
        return [one_run(session, spec, THEIRS, batch, number)]
    except BenchError as error:
        if alone:
            raise
        say(f"TRL with {batch} pairs at once is skipped: {error}")
        return []


def one_run(session: Session, spec: Event, system: str, batch: int, number: int) -> Run:
    label = f"round {number}, {system}" + (f" ({batch} at once)" if system == THEIRS else "")

    def told(event: Event) -> None:
        if event["event"] == "step":
            pace = event["pairs"] / event["seconds"]
            say(f"{label}: loss {event['loss']:.4f}, {event['seconds']:.2f} s, {benchlib.digits(pace)} pairs/s")

    events = session.run(system, {**spec, "batch": batch}, peer=system == THEIRS, on_event=told)
    start = next(event for event in events if event["event"] == "start")
    steps = [event for event in events if event["event"] == "step"]
    if len(steps) != spec["steps"]:
        raise BenchError(f"{system} took {len(steps)} steps instead of {spec['steps']}")
    padded = benchlib.padded_reason(events)
    return Run(system, batch, number, start["setup_seconds"], start["memory"], steps, padded)


# --------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Result:
    """What was measured, and what follows from it. TRL stands for the fastest batch size that it was tried with."""

    args: argparse.Namespace
    saved: Event
    prepared: Event
    runs: list[Run]
    peak_gflops: float

    @property
    def ours(self) -> list[Run]:
        return [run for run in self.runs if run.system == OURS]

    @property
    def theirs(self) -> list[Run]:
        """The runs of TRL's fastest batch size: the one that it was given in the last round."""
        all_of_it = [run for run in self.runs if run.system == THEIRS]
        last = max((run.round for run in all_of_it), default=0)
        best = max((run for run in all_of_it if run.round == last), key=lambda run: run.pace, default=None)
        return [run for run in all_of_it if best and run.batch == best.batch]

    def speedup(self) -> benchlib.Spread:
        """Per step and round: the same pairs."""
        return benchlib.ratio(_seconds(self.ours), _seconds(self.theirs))

    def unique_tokens(self, runs: Sequence[Run]) -> int:
        """Of all measured steps of these runs: what rmtool had to compute in the same steps."""
        return len(runs) * sum(step["tokens"] for step in self.ours[0].measured)

    def fraction_of_peak(self, runs: Sequence[Run]) -> float:
        """Forward and backward take 6 operations per weight and unique token."""
        tokens = self.unique_tokens(runs)
        seconds = sum(step["seconds"] for run in runs for step in run.measured)
        return 6 * self.saved["matrix_parameters"] * tokens / seconds / 1e9 / self.peak_gflops

    def problems(self) -> list[str]:
        """Where the two systems did not do the same work."""
        if not self.theirs:
            return []
        found = []
        for number, (ours, theirs) in enumerate(zip(self.ours[0].steps, self.theirs[0].steps, strict=True)):
            limit = (LATER_LOSS if number else FIRST_LOSS)[self.args.precision]
            if not abs(ours["loss"] - theirs["loss"]) <= limit:
                found.append(f"step {number + 1}: loss {ours['loss']:.6f} and {theirs['loss']:.6f}, allowed {limit:g}")
        packed = sum(length for row in self.prepared["lengths"] for length in row)
        read = sum(step["tokens"] for step in self.theirs[0].steps)
        if read != packed:
            found.append(f"TRL read {read:.0f} tokens, where rmtool has {packed}")
        return found

    def text(self) -> str:
        args = self.args
        model = f"random Llama {args.random_llama}" if args.random_llama else args.model.name
        title = f"Training {model}, {args.precision}, {args.batch_size} pairs per step, {args.data}"
        header = ("", "pairs/s", "all steps", "unique tok/s", "of peak", "peak memory", "before step 1", "set-up")
        groups = [(OURS, self.ours), (f"TRL, {self.theirs[0].batch} at once" if self.theirs else "", self.theirs)]
        lines = [self.row(name, runs) for name, runs in groups if runs]
        others = [run for run in self.runs if run.system == THEIRS and run not in self.theirs]
        lines += [self.row(f"TRL, {run.batch} at once", [run]) for run in others]
        return benchlib.table(title, header, lines) + "\n\n" + "\n".join(self.notes())

    def row(self, name: str, runs: Sequence[Run]) -> list[str]:
        paces = benchlib.spread([step["pairs"] / step["seconds"] for run in runs for step in run.measured])
        steps = [step for run in runs for step in run.steps]
        unique = self.unique_tokens(runs)
        return [
            name,
            str(paces),
            benchlib.digits(sum(step["pairs"] for step in steps) / sum(step["seconds"] for step in steps)),
            benchlib.digits(unique / sum(step["seconds"] for run in runs for step in run.measured)),
            f"{self.fraction_of_peak(runs):.1%}",
            f"{max(run.peak for run in runs) / 2**20:,.0f} MiB",
            f"{max(run.memory_before for run in runs) / 2**20:,.0f} MiB",
            f"{max(run.setup_seconds for run in runs):.1f} s",
        ]

    def notes(self) -> list[str]:
        batch = self.theirs[0].batch if self.theirs else self.args.batch_size
        shared_tokens = sum(step["tokens"] for step in self.ours[0].steps)
        tokens = benchlib.count_tokens(self.prepared["lengths"], shared_tokens, batch)
        padded, packed, shared = tokens.per(len(self.prepared["lengths"]))
        notes = [
            f"tokens per pair: {padded} padded {batch} at once, {packed} packed, {shared} with the prompt shared",
            f"matrix products in {self.args.precision}: {benchlib.digits(self.peak_gflops)} GFLOP/s, measured here",
            f"dropped: {self.prepared['dropped']} pairs over {self.args.max_length} tokens",
        ]
        notes[:0] = benchlib.layout_notes(self.ours[0].padded)
        if self.theirs:
            memory = max(run.peak for run in self.theirs) / max(run.peak for run in self.ours)
            gaps = [abs(a["loss"] - b["loss"]) for a, b in zip(self.ours[0].steps, self.theirs[0].steps, strict=True)]
            notes[:0] = [
                f"speed-up on the same pairs: {self.speedup()}",
                f"peak memory, TRL to rmtool: {memory:.2f}",
                f"largest difference of a step's loss: {max(gaps):.2g} (first step {gaps[0]:.2g})",
            ]
        return notes

    def as_dict(self) -> Event:
        options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self.args).items()}
        return {
            "options": options,
            "model": self.saved,
            "data": self.prepared,
            "peak_gflops": self.peak_gflops,
            "runs": [vars(run) for run in self.runs],
            "speedup": vars(self.speedup()) if self.theirs else None,
            "fraction_of_peak": {OURS: self.fraction_of_peak(self.ours)}
            | ({THEIRS: self.fraction_of_peak(self.theirs)} if self.theirs else {}),
            "problems": self.problems(),
        }


def _seconds(runs: Sequence[Run]) -> dict[Any, float]:
    return {(run.round, number): step["seconds"] for run in runs for number, step in enumerate(run.measured)}


# --------------------------------------------------------------------------------------------------- workers


def write_pairs(spec: Event) -> None:
    """Worker: pairs.jsonl for rmtool, and visited.jsonl, the same pairs in the order of rmtool's first epoch."""
    import json

    from rmtool.data.formats import preference_record
    from rmtool.data.rows import read_rows
    from rmtool.dataset.batches import epoch_order
    from rmtool.tokenization.encoder import Encoder
    from rmtool.tokenization.tokenizer import load_tokenizer

    folder = Path(spec["folder"])
    records = [preference_record(row) for row in read_rows(spec["data"])]
    random.Random(spec["seed"]).shuffle(records)
    encoder = Encoder(load_tokenizer(folder / "model"), spec["max_length"], "drop", "keep")
    lines, trees, dropped = list[str](), [], 0
    for record in records:
        tree, _ = encoder.encode(record)
        dropped += tree is None
        if tree is None or (tree.responses[0].tolist() == tree.responses[1].tolist()):
            continue
        chosen, rejected = ([message.as_dict() for message in (*record.prompt, *r)] for r in record.responses)
        lines.append(json.dumps({"chosen": chosen, "rejected": rejected}, ensure_ascii=False) + "\n")
        trees.append(tree)
        if len(lines) == spec["pairs"]:
            break
    else:
        raise SystemExit(f"only {len(lines)} usable pairs, {spec['pairs']} wanted: lower --steps or --batch-size")
    order = [int(index) for index in epoch_order(spec["seed"], 0, len(lines))]
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "visited.jsonl").write_text("".join(lines[index] for index in order), encoding="utf-8")
    emit("pairs", lengths=[[len(ids) for ids in trees[index].sequences()] for index in order], dropped=dropped)


class StepClock:
    """Emits an event per optimizer step: all that passed since the step before, data and logging included."""

    def __init__(self, spec: Event):
        self.device = spec["device"]
        self.pairs = spec["batch_size"]
        self.created = self.last = time.perf_counter()

    def start(self) -> None:
        benchlib.reset_memory_peak(self.device)
        benchlib.synchronize(self.device)
        self.last = time.perf_counter()
        emit("start", setup_seconds=self.last - self.created, memory=benchlib.memory(self.device)[0])

    def step(self, loss: float, tokens: float) -> None:
        benchlib.synchronize(self.device)
        seconds = time.perf_counter() - self.last
        peak = benchlib.memory(self.device)[1]
        emit("step", seconds=seconds, pairs=self.pairs, loss=loss, tokens=tokens, memory=peak)
        self.last = time.perf_counter()


class Tracker:
    """Is told every step by rmtool's training loop, as its own tracker is."""

    def __init__(self, clock: StepClock, model: Any):
        self.clock = clock
        self.count = benchlib.TokenCount(model)
        self.past = list[Event]()

    def log(self, numbers: Event) -> None:
        # A batch may be filled up with tokens that do not count.
        self.clock.step(numbers["train/rm/loss"], min(self.count.take(), numbers["unique_tokens"]))


def train_with_rmtool(spec: Event) -> None:
    """Worker: rmtool's own training loop, with a clock in place of its tracker."""
    clock = StepClock(spec)
    from accelerate import Accelerator

    from rmtool.config import DataConfig, ModelConfig, Recipe, TrainConfig
    from rmtool.data.rejects import Rejects
    from rmtool.dataset.split import Split, load_split
    from rmtool.model.compiling import choose_compiled
    from rmtool.model.loading import training_encoder, training_model
    from rmtool.tokenization.tokenized_dataset import TokenizedDataset
    from rmtool.training.engine import Engine
    from rmtool.training.optim import build_optimizer
    from rmtool.training.step import Trainer
    from rmtool.training.trainer import train_loop
    from rmtool.ui import SilentUi

    folder = Path(spec["folder"])
    recipe = Recipe(
        "bench",
        ModelConfig(str(folder / "model")),
        DataConfig((str(folder / "pairs.jsonl"),), max_length=spec["max_length"], on_empty="keep", cache=False),
        TrainConfig(
            batch_size=spec["batch_size"],
            learning_rate=LEARNING_RATE,
            schedule="constant",
            max_steps=spec["steps"],
            seed=spec["seed"],
            precision=spec["precision"],
            tokens_per_pack=spec["tokens_per_pack"],
            liger=spec["liger"],
            compile=spec["compile"],
        ),
    )
    accelerator = Accelerator(cpu=spec["device"] == "cpu")
    encoder, _ = training_encoder(recipe, folder / "model")
    split = load_split(recipe, encoder, Rejects(), SilentUi())
    model, _ = training_model(recipe, folder / "model", encoder)
    engine = Engine.prepare(accelerator, model, build_optimizer(model, recipe.train), recipe.train.max_grad_norm)
    if reason := choose_layout(model, engine.wrapped, encoder.max_length).reason:
        emit("padded", reason=reason)
    choose_compiled(model, recipe.train.compile, 0, encoder.max_length, engine.dist)
    trainer = Trainer.start(recipe, engine, SilentUi(), folder)
    tracker: Any = Tracker(clock, model)
    clock.start()
    train_loop(trainer, Split(split.train, TokenizedDataset()), tracker, SilentUi())


def train_with_trl(spec: Event) -> None:
    """Worker: TRL's RewardTrainer on the pairs in the order in which rmtool takes them."""
    clock = StepClock(spec)
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    class Clock(TrainerCallback):
        tokens = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_log(self, *_: Any, logs: Event, **__: Any) -> None:
            if "loss" in logs:
                clock.step(logs["loss"], logs["num_tokens"] - self.tokens)
                self.tokens = logs["num_tokens"]

    folder = Path(spec["folder"])
    config = RewardConfig(
        output_dir=str(Path(spec["scratch"]) / "trl"),
        per_device_train_batch_size=spec["batch"],
        gradient_accumulation_steps=spec["batch_size"] // spec["batch"],
        max_length=spec["max_length"],
        max_steps=spec["steps"],
        train_sampling_strategy="sequential",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        adam_epsilon=1e-5,
        max_grad_norm=1.0,
        bf16=spec["precision"] == "bf16",
        gradient_checkpointing=False,
        disable_dropout=True,
        use_cpu=spec["device"] == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=spec["seed"],
    )
    trainer = RewardTrainer(
        model=str(folder / "model"),
        args=config,
        train_dataset=Dataset.from_list(benchlib.read_jsonl(folder / "visited.jsonl")),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Clock()],
    )
    trainer.train()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(benchlib.serve({"pairs": write_pairs, OURS: train_with_rmtool, THEIRS: train_with_trl}))
    sys.exit(benchlib.guarded(lambda: main(parse())))
