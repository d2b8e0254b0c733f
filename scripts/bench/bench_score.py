"""Scoring speed: rmtool against transformers' pipeline and a careful length-sorted loop, on the same rows and weights.

    python scripts/bench/bench_score.py                            # two responses to a prompt, hh-rlhf
    python scripts/bench/bench_score.py --responses 16             # RMB, the rest paired in from other prompts
    python scripts/bench/bench_score.py --responses 16 --min-prompt 512

In: preference rows (a file, hh or rmb of ../shared), or RMB's folder; for more than two responses the answers to one
prompt are grouped, and filled up with responses to other prompts. Out: a table, and with --json every measurement.
Each system is timed from the JSONL file to the last reward: reading, template, tokenizing and batching included, the
loading of the model and a short warm-up not (both are shown). They run in turn, a process each, --rounds times:
  rmtool    `rmtool.scoring.score.score_file`, what `rmtool score --fidelity 0` runs
  pipeline  text-classification, at the batch size that was fastest on a sample
  sorted    all texts tokenized, sorted by length, right-padded batches of at most as many tokens as were fastest
All rewards are compared: where they differ the script says so last and exits with 1.
Cost: (3 * --rounds) forwards of all rows, and two of the sample for each size tried (a single one is not).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchlib
from benchlib import BenchError, Event, Session, emit, say, show

# The largest difference of two systems' rewards. bf16 keeps 8 bits: what is added up in another order differs.
AGREEMENT = {"fp32": 1e-3, "bf16": 0.25}
CANDIDATES = {"pipeline": "1,4,8,16,32", "sorted": "512,1024,2048,8192"}
UNITS = {"pipeline": "responses at once", "sorted": "padded tokens at once"}
OURS = "rmtool"
PERCENTILES = (0, 10, 50, 90, 100)

Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class Run:
    """One process: seconds from file to rewards, and the rewards in the order of the file."""

    system: str
    round: int
    load_seconds: float
    warmup_seconds: float
    seconds: float
    memory: int
    tokens: int  # that were computed
    rewards: list[float]
    padded: str | None = None  # why rmtool did not share prompts


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--data", help="preference rows: a file, hh, rmb, rmb-bon (default: hh; with more than two responses rmb-bon)"
    )
    benchlib.add_common(parser)
    parser.add_argument("--responses", type=int, default=2, help="responses to a prompt (default 2: pairs as they are)")
    parser.add_argument("--count", type=int, default=256, help="responses to score (default 256)")
    parser.add_argument("--min-prompt", type=int, default=0, help="tokens of the shortest prompt taken (default 0)")
    parser.add_argument("--max-length", type=int, default=4096, help="drop rows with longer ones (default 4096)")
    parser.add_argument("--sample", type=int, default=32, help="responses to choose a batch size on (default 32)")
    for system, sizes in CANDIDATES.items():
        parser.add_argument(
            f"--{system}-sizes", default=sizes, type=positive, help=f"{UNITS[system]}, tried on the sample ({sizes})"
        )
    parser.add_argument("--rounds", type=int, default=3, help="processes of each system, in turn (default 3)")
    parser.add_argument("--compile", action="store_true", help="compile rmtool's layers, as for long files on a CPU")
    benchlib.add_peers(parser)
    return parser.parse_args(arguments)


def positive(text: str) -> list[int]:
    """Numbers above zero, with commas between them."""
    sizes = [int(part) for part in text.split(",")]
    if min(sizes) < 1:
        raise ValueError
    return sizes


def main(args: argparse.Namespace) -> int:
    if min(args.responses, args.count, args.rounds, args.sample) < 1 or args.count < args.responses:
        raise BenchError("--responses, --count, --sample and --rounds must be at least 1, and --count a whole row")
    args.data = args.data or ("hh" if args.responses <= 2 else "rmb-bon")
    model, data = benchlib.find_model(args.model), benchlib.find_data(args.data)
    peer = None if args.without_peers else benchlib.peer_python(args.peer_python)
    with benchlib.session(__file__, args.device, args.cores) as session:
        session.peer = peer
        saved, prepared = prepare(session, args, model, data)
        peaks = [session.peak(args.precision)]
        best, tuned = tune(session, args) if peer else ({}, {})
        runs = take_turns(session, args, best)
        peaks.append(session.peak(args.precision))
        result = Result(args, saved, prepared, tuned, best, runs, max(peaks))
        facts = benchlib.environment({name: saved[name] for name in ("torch", "gpu")})
        show(benchlib.describe(facts, session.cores))
        show(result.text())
        benchlib.write_json(args.json, {"environment": facts, **result.as_dict()})
    problems = result.problems()
    for problem in problems:
        say(f"NOT THE SAME REWARDS: {problem}")
    return 1 if problems else 0


def prepare(session: Session, args: argparse.Namespace, model: Path, data: Path) -> tuple[Event, Event]:
    """The checkpoint and the rows of every system."""
    say("preparing the checkpoint and the rows")
    save_dtype = args.precision if args.device == "cuda" else "fp32"
    checkpoint = {"model": str(model), "random_llama": args.random_llama, "seed": args.seed, "save_dtype": save_dtype}
    saved = session.run("save", {**checkpoint, "checkpoint": str(session.folder / "model")})[-1]
    names = ("responses", "count", "min_prompt", "max_length", "sample", "seed")
    options = {name: getattr(args, name) for name in names}
    return saved, session.run("rows", {**options, "data": str(data), "folder": str(session.folder)})[-1]


def tune(session: Session, args: argparse.Namespace) -> tuple[dict[str, int], dict[str, dict[str, float]]]:
    """For each peer its fastest batch on the sample, and the responses per second of all that it tried."""
    best, tuned = dict[str, int](), dict[str, dict[str, float]]()
    for system in CANDIDATES:
        candidates = getattr(args, f"{system}_sizes")
        if len(candidates) == 1:
            best[system] = candidates[0]
            continue
        events = session.run(f"tune-{system}", {**work_spec(session, args), "candidates": candidates}, peer=True)
        rates = {int(event["candidate"]): float(event["rate"]) for event in events}
        if not rates:
            raise BenchError(f"{system} failed with every batch size")
        best[system] = max(rates, key=lambda candidate: rates[candidate])
        tuned[system] = {str(candidate): rate for candidate, rate in rates.items()}
        tried = ", ".join(f"{candidate}: {benchlib.digits(rate)}" for candidate, rate in rates.items())
        say(f"{system}, responses/s on the sample by {UNITS[system]}: {tried}")
    return best, tuned


def work_spec(session: Session, args: argparse.Namespace) -> Event:
    names = ("precision", "max_length", "tokens_per_pack", "compile")
    return {"folder": str(session.folder), **{name: getattr(args, name) for name in names}}


def take_turns(session: Session, args: argparse.Namespace, best: dict[str, int]) -> list[Run]:
    """rmtool, pipeline, sorted, rmtool, pipeline, ..."""
    runs = []
    for number in range(1, args.rounds + 1):
        for system in (OURS, *best):
            spec = {**work_spec(session, args), "size": best.get(system)}
            events = session.run(system, spec, peer=system != OURS)
            event = events[-1]
            measured = {name: event[name] for name in Run.__dataclass_fields__ if name in event}
            runs.append(Run(system, number, **measured, padded=benchlib.padded_reason(events)))
            rate = benchlib.digits(len(event["rewards"]) / event["seconds"])
            say(f"round {number}, {system}: {event['seconds']:.1f} s, {rate} responses/s")
    return runs


# --------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Result:
    """What was measured, and what follows from it."""

    args: argparse.Namespace
    saved: Event
    prepared: Event
    tuned: dict[str, dict[str, float]]
    best: dict[str, int]
    runs: list[Run]
    peak_gflops: float

    def of(self, system: str) -> list[Run]:
        return [run for run in self.runs if run.system == system]

    @property
    def responses(self) -> int:
        return sum(len(row) for row in self.prepared["lengths"])

    @property
    def unique_tokens(self) -> int:
        """What rmtool computed; without what only fills a batch up, where it does that."""
        rows = zip(self.prepared["lengths"], self.prepared["prompts"], strict=True)
        trees = sum(sum(row) - (len(row) - 1) * prompt for row, prompt in rows)
        return min(self.of(OURS)[0].tokens, trees)

    def speedup(self, system: str) -> benchlib.Spread:
        """Of rmtool over `system`, by rounds."""
        seconds = {name: {run.round: run.seconds for run in self.of(name)} for name in (OURS, system)}
        return benchlib.ratio(seconds[OURS], seconds[system])

    def gap(self, system: str) -> float:
        """The largest difference of a reward from rmtool's, over all rounds."""
        mine = self.of(OURS)[0].rewards
        pairs = [(a, b) for run in self.of(system) for a, b in zip(mine, run.rewards, strict=True)]
        return max(abs(a - b) if a == a and b == b else float("inf") for a, b in pairs)

    def fraction_of_peak(self, system: str) -> float:
        """A forward takes 2 operations per weight and unique token."""
        seconds = benchlib.spread([run.seconds for run in self.of(system)]).median
        return 2 * self.saved["matrix_parameters"] * self.unique_tokens / seconds / 1e9 / self.peak_gflops

    def problems(self) -> list[str]:
        limit = AGREEMENT[self.args.precision]
        gaps = {system: self.gap(system) for system in (OURS, *self.best)}
        return [
            f"{system} differs from rmtool by up to {gap:.3g}, allowed {limit:g}"
            for system, gap in gaps.items()
            if not gap <= limit
        ]

    def text(self) -> str:
        args = self.args
        model = f"random Llama {args.random_llama}" if args.random_llama else args.model.name
        rows = len(self.prepared["lengths"])
        title = f"Scoring with {model}, {args.precision}, {args.data}: {self.responses} responses to {rows} prompts"
        header = (
            "",
            "responses/s",
            "rmtool is faster by",
            "of peak",
            "reward differs",
            "peak memory",
            "load",
            "warm-up",
        )
        return "\n".join(
            [benchlib.table(title, header, [self.row(name) for name in (OURS, *self.best)]), "", *self.notes()]
        )

    def row(self, system: str) -> list[str]:
        runs = self.of(system)
        return [
            f"{system}, {self.best[system]:,} {UNITS[system]}" if system in self.best else system,
            str(benchlib.spread([self.responses / run.seconds for run in runs])),
            str(self.speedup(system)) if system != OURS else "",
            f"{self.fraction_of_peak(system):.1%}",
            f"{self.gap(system):.2g}",
            f"{max(run.memory for run in runs) / 2**20:,.0f} MiB",
            f"{max(run.load_seconds for run in runs):.1f} s",
            f"{max(run.warmup_seconds for run in runs):.1f} s",
        ]

    def notes(self) -> list[str]:
        prepared = self.prepared
        flat = [[length] for row in prepared["lengths"] for length in row]
        batch = self.best.get("pipeline", 1)
        each = benchlib.count_tokens(flat, self.unique_tokens, batch).per(len(flat))
        return [
            *benchlib.layout_notes(self.of(OURS)[0].padded),
            f"tokens per response: {each[0]} padded {batch} at once, {each[1]} packed, {each[2]} with shared prompts",
            f"tokens of a prompt: {percentiles(prepared['prompts'])}",
            f"tokens of prompt and response: {percentiles([row[0] for row in flat])}",
            f"responses paired in from other prompts: {prepared['paired']} of {len(flat)}",
            f"rewards: standard deviation {deviation(self.of(OURS)[0].rewards):.3g}",
            f"matrix products in {self.args.precision}: {benchlib.digits(self.peak_gflops)} GFLOP/s, measured here",
            f"dropped: {prepared['dropped']} rows (over {self.args.max_length} tokens, or a prompt that is too short)",
        ]

    def as_dict(self) -> Event:
        options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self.args).items()}
        return {
            "options": options,
            "model": self.saved,
            "data": self.prepared,
            "tuned": self.tuned,
            "peak_gflops": self.peak_gflops,
            "runs": [{name: value for name, value in vars(run).items() if name != "rewards"} for run in self.runs],
            "speedup": {system: vars(self.speedup(system)) for system in self.best},
            "largest_difference": {system: self.gap(system) for system in self.best},
            "fraction_of_peak": {system: self.fraction_of_peak(system) for system in (OURS, *self.best)},
            "problems": self.problems(),
        }


def percentiles(values: Sequence[int]) -> str:
    """The distribution, in one line."""
    ordered = sorted(values)
    shown = [f"{ordered[round(share / 100 * (len(ordered) - 1))]:,} ({share}%)" for share in PERCENTILES]
    return ", ".join(shown)


def deviation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5


# -------------------------------------------------------------------------------------------------- the rows


def group_answers(rows: Iterable[tuple[Any, Sequence[Any]]]) -> dict[Any, list[Any]]:
    """Each prompt's different answers, in the order in which they are met."""
    groups: dict[Any, dict[Any, None]] = {}
    for prompt, answers in rows:
        groups.setdefault(prompt, {}).update(dict.fromkeys(answers))
    return {prompt: list(answers) for prompt, answers in groups.items()}


def fill_up(groups: dict[Any, list[Any]], count: int, rng: random.Random) -> Iterator[tuple[Any, list[Any], int]]:
    """(prompt, `count` answers, how many of them answer another prompt), in a random order."""
    pool = [answer for answers in groups.values() for answer in answers]
    prompts = list(groups)
    rng.shuffle(prompts)
    for prompt in prompts:
        own = groups[prompt][:count]
        strangers = dict.fromkeys(answer for answer in rng.sample(pool, min(len(pool), 2 * count)) if answer not in own)
        taken = list(strangers)[: count - len(own)]
        if len(own) + len(taken) == count:
            yield prompt, [*own, *taken], len(taken)


def read_answers(source: Path) -> Iterator[tuple[Any, list[Any]]]:
    """(prompt, answers) of preference rows, or of all files of RMB's folder, both as messages."""
    from rmtool.data.formats import preference_record
    from rmtool.data.record import Message
    from rmtool.data.rows import read_rows

    if not source.is_dir():
        for row in read_rows(str(source)):
            record = preference_record(row)
            yield record.prompt, list(record.responses)
        return
    for path in sorted(source.rglob("*.json")):
        for item in json.loads(path.read_text(encoding="utf-8")):
            prompt = tuple(Message(turn["role"], turn["content"]) for turn in item["conversation_input"])
            answers = [item[name] for name in ("bon_best", "chosen", "reject") if name in item] + item.get(
                "loser_list", []
            )
            yield prompt, [(Message("assistant", answer["answer"]),) for answer in answers if answer["answer"].strip()]


def write_rows(spec: Event) -> None:
    """Worker: rows.jsonl and its beginning, sample.jsonl, as `rmtool score` reads them."""
    from rmtool.data.responses import score_record
    from rmtool.data.rows import Row
    from rmtool.errors import Place
    from rmtool.tokenization.encoder import Encoder
    from rmtool.tokenization.tokenizer import load_tokenizer

    folder, rng = Path(spec["folder"]), random.Random(spec["seed"])
    encoder = Encoder(load_tokenizer(folder / "model"), spec["max_length"], "drop", "keep")
    lines, trees, prompts, paired, dropped = list[str](), [], list[int](), 0, 0
    for prompt, answers, strangers in candidates(spec, rng):
        row = as_row(prompt, answers)
        tree, _ = encoder.encode(score_record(Row(Place("rows.jsonl", len(lines) + 1), row)))
        if tree is None or len(tree.prompt) < spec["min_prompt"] or not reads_alike(encoder, row, tree):
            dropped += 1
            continue
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        trees.append(tree)
        prompts.append(len(tree.prompt))
        paired += strangers
        if len(lines) * spec["responses"] >= spec["count"]:
            break
    if not lines:
        raise SystemExit("no row is left: lower --min-prompt, or raise --max-length")
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "sample.jsonl").write_text("".join(lines[: -(-spec["sample"] // spec["responses"])]), encoding="utf-8")
    lengths = [[len(ids) for ids in tree.sequences()] for tree in trees]
    emit("rows", lengths=lengths, prompts=prompts, paired=paired, dropped=dropped)


def candidates(spec: Event, rng: random.Random) -> Iterator[tuple[Any, list[Any], int]]:
    """Rows in a random order: pairs as they are, or prompts with all the responses that are wanted."""
    rows = list(read_answers(Path(spec["data"])))
    if spec["responses"] > 2:
        return fill_up(group_answers(rows), spec["responses"], rng)
    rng.shuffle(rows)
    return ((prompt, answers[: spec["responses"]], 0) for prompt, answers in rows)


def as_row(prompt: Any, answers: Sequence[Any]) -> dict[str, Any]:
    """A row to score; whole conversations where what follows the prompt does not start with the assistant."""
    messages = [[message.as_dict() for message in answer] for answer in answers]
    start = [message.as_dict() for message in prompt]
    if start and all(answer[0]["role"] == "assistant" for answer in messages):
        return {"prompt": start, "responses": messages}
    return {"responses": [start + answer for answer in messages]}


def conversations(row: dict[str, Any]) -> list[Conversation]:
    return [row.get("prompt", []) + response for response in row["responses"]]


def reads_alike(encoder: Any, row: dict[str, Any], tree: Any) -> bool:
    """Whether the peers' way, rendering and then tokenizing, gives the same ids: texts may spell special tokens."""
    texts = [encoder.tokenizer.apply_chat_template(chat, tokenize=False) for chat in conversations(row)]
    read = encoder.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return all(ids == sequence.tolist() for ids, sequence in zip(read, tree.sequences(), strict=True))


# --------------------------------------------------------------------------------------------------- workers


Score = Callable[[Path], tuple[list[float], int]]  # a file's rewards, and the tokens computed for them


def measure(spec: Event, load: Callable[[], Score]) -> None:
    """Load, warm up on the sample, then time the whole file; emits one event."""
    folder, device = Path(spec["folder"]), spec["device"]
    started = time.perf_counter()
    score = load()
    loaded = time.perf_counter()
    score(folder / "sample.jsonl")
    benchlib.synchronize(device)
    warm = time.perf_counter()
    benchlib.reset_memory_peak(device)
    begun = time.perf_counter()
    rewards, tokens = score(folder / "rows.jsonl")
    benchlib.synchronize(device)
    seconds = time.perf_counter() - begun
    emit(
        "scored",
        load_seconds=loaded - started,
        warmup_seconds=warm - loaded,
        seconds=seconds,
        memory=benchlib.memory(device)[1],
        tokens=tokens,
        rewards=rewards,
    )


def try_sizes(spec: Event, load: Callable[[int], Score]) -> None:
    """One event per size that works: responses per second on the sample, at its second run."""
    sample = Path(spec["folder"]) / "sample.jsonl"
    for candidate in spec["candidates"]:
        try:
            score = load(candidate)
            score(sample)
            started = time.perf_counter()
            count = len(score(sample)[0])
            benchlib.synchronize(spec["device"])
        except RuntimeError as error:  # a full device
            sys.stderr.write(f"{candidate}: {error}\n")
            continue
        emit("tuned", candidate=candidate, rate=count / (time.perf_counter() - started))


def load_rmtool(spec: Event) -> Score:
    from rmtool.data.rejects import Rejects
    from rmtool.model import compiling
    from rmtool.model.loading import load_for_inference
    from rmtool.scoring.score import score_file
    from rmtool.ui import SilentUi

    checkpoint = Path(spec["folder"]) / "model"
    loaded = load_for_inference(
        checkpoint, precision=spec["precision"], max_length=spec["max_length"], on_long="error", on_empty="keep"
    )
    if loaded.padded_reason:
        emit("padded", reason=loaded.padded_reason)
    count = benchlib.TokenCount(loaded.model)

    if spec["compile"]:
        compiling.LEAST_INFERENCE = 0.0

    def score(source: Path) -> tuple[list[float], int]:
        output = Path(spec["scratch"]) / "scored.jsonl"
        # Without the sample in fp32, which the others do not compute.
        score_file(source, output, loaded, spec["tokens_per_pack"], Rejects(), SilentUi(), sample=0)
        rewards = [reward for row in benchlib.read_jsonl(output) for reward in row["rewards"]]
        return [float("nan") if reward is None else reward for reward in rewards], count.take()

    return score


def render(source: Path, tokenizer: Any) -> list[str]:
    """The text of every response of a file, in its order."""
    chats = [chat for row in benchlib.read_jsonl(source) for chat in conversations(row)]
    return [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]


def peer_dtype(spec: Event) -> Any:
    import torch

    return torch.float32 if spec["precision"] == "fp32" else torch.bfloat16


def load_pipeline(spec: Event) -> Callable[[int], Score]:
    """The pipeline, loaded once; then a function that scores with a batch size."""
    from transformers import pipeline

    device = 0 if spec["device"] == "cuda" else -1
    pipe = pipeline(
        "text-classification", model=str(Path(spec["folder"]) / "model"), dtype=peer_dtype(spec), device=device
    )

    def with_batch(size: int) -> Score:
        def score(source: Path) -> tuple[list[float], int]:
            texts = render(source, pipe.tokenizer)
            outputs = pipe(texts, batch_size=size, function_to_apply="none", add_special_tokens=False)
            return [float(output["score"]) for output in outputs], 0

        return score

    return with_batch


def load_sorted(spec: Event) -> Callable[[int], Score]:
    """Model and tokenizer, loaded once; then a function that scores with a budget of padded tokens."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = Path(spec["folder"]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=peer_dtype(spec)).to(spec["device"]).eval()

    def with_budget(max_tokens: int) -> Score:
        @torch.inference_mode()
        def score(source: Path) -> tuple[list[float], int]:
            ids = tokenizer(render(source, tokenizer), add_special_tokens=False)["input_ids"]
            rewards, tokens = [0.0] * len(ids), 0
            for items in sorted_batches([len(one) for one in ids], max_tokens):
                batch = tokenizer.pad({"input_ids": [ids[item] for item in items]}, return_tensors="pt")
                tokens += batch["input_ids"].numel()
                logits = model(**batch.to(spec["device"]), use_cache=False).logits[:, 0].float().tolist()
                for item, reward in zip(items, logits, strict=True):
                    rewards[item] = reward
            return rewards, tokens

        return score

    return with_budget


def sorted_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices, longest first, in batches of at most `max_tokens` tokens with their padding."""
    batch: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


WORKERS: dict[str, benchlib.Worker] = {
    "rows": write_rows,
    OURS: lambda spec: measure(spec, lambda: load_rmtool(spec)),
    "pipeline": lambda spec: measure(spec, lambda: load_pipeline(spec)(spec["size"])),
    "sorted": lambda spec: measure(spec, lambda: load_sorted(spec)(spec["size"])),
    "tune-pipeline": lambda spec: try_sizes(spec, load_pipeline(spec)),
    "tune-sorted": lambda spec: try_sizes(spec, load_sorted(spec)),
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(benchlib.serve(WORKERS))
    sys.exit(benchlib.guarded(lambda: main(parse())))
