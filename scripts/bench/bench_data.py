"""Reading and tokenizing: rmtool's way from a file to token ids, and the tokenizer alone on prepared text.

    python scripts/bench/bench_data.py --data hh                      # a file of pairs
    python scripts/bench/bench_data.py --made 1000000                 # a million rows of 1 KB of hh's text

In: a file of preference pairs and a model's tokenizer. Out: seconds and growth of memory of `load_split` (from the
file to ids in the cache), of a second run that finds the cache, and of the tokenizer on the rendered texts: called as
its users do, and its Rust core. All on the same cores, in turns, each in its own process.
Cost: tokenizes the file three times per round.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import benchlib
from benchlib import BenchError, Event, Session, emit, say, show

ROW = 1024  # bytes of a row that is made
BATCH = 1024  # texts that the tokenizer gets at once
CALLED, CORE, FIRST, AGAIN = "the tokenizer, called", "its Rust core", "rmtool", "rmtool, from the cache"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="hh", help="preference pairs: a file, or hh, rmb (default hh)")
    parser.add_argument("--made", type=int, help="rows of 1 KB made from the text of --data, in its place")
    parser.add_argument("--model", type=Path, default=benchlib.MODEL, help="folder with a tokenizer and its template")
    parser.add_argument("--rounds", type=int, default=3, help="turns of all (default 3)")
    parser.add_argument("--cores", type=int, default=2, help="CPU cores for every system (default 2)")
    parser.add_argument("--without-tokenizer", action="store_true", help="run rmtool alone (the texts take memory)")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> int:
    if args.rounds < 1 or (args.made is not None and args.made < 1):
        raise BenchError("--rounds and --made must be at least 1")
    model, data = benchlib.find_model(args.model), benchlib.find_data(args.data)
    with benchlib.session(__file__, "cpu", args.cores) as session:
        if args.made:
            data = make_rows(data, args.made, session.folder / "made.jsonl")
        size = data.stat().st_size
        spec = {"data": str(data), "model": str(model)}
        events = [event for number in range(args.rounds) for event in one_round(session, spec, number, args)]
        facts, cores = benchlib.environment({"torch": events[0]["torch"], "gpu": None}), session.cores
    show(benchlib.describe(facts, cores))
    show(report(events, size))
    benchlib.write_json(args.json, {"environment": facts, "events": events})
    return 0


def one_round(session: Session, spec: Event, number: int, args: argparse.Namespace) -> Iterator[Event]:
    for worker in ("rmtool",) if args.without_tokenizer else ("rmtool", "tokenizer"):
        for event in session.run(worker, spec):
            say(f"{event['what']}: {event['seconds']:.2f} s")
            yield {**event, "round": number}


def make_rows(source: Path, count: int, path: Path) -> Path:
    """Pairs whose prompt, chosen and rejected are stretches of the source's text; ROW bytes a row, JSON and all."""
    opened: Any = gzip.open if source.name.endswith(".gz") else open
    with opened(source, "rt", encoding="utf-8") as file:
        text = " ".join(str(json.loads(line).get("chosen", "")) for line in file)
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            start, share = rng.randrange(len(text) - ROW), rng.uniform(0.2, 0.6)
            part = text[start : start + ROW - 60]
            prompt, rest = part[: int(share * len(part))], part[int(share * len(part)) :]
            row = {"prompt": prompt, "chosen": rest[: len(rest) // 2], "rejected": rest[len(rest) // 2 :]}
            file.write(json.dumps(row, ensure_ascii=False)[: 2 * ROW] + "\n")
    return path


def report(events: Sequence[Event], size: int) -> str:
    seconds: dict[str, dict[int, float]] = {}
    for event in events:
        seconds.setdefault(event["what"], {})[event["round"]] = event["seconds"]
    rows = []
    for what, times in seconds.items():
        ratio = str(benchlib.ratio(seconds[FIRST], times)) if what != FIRST else ""
        peak = max(event["growth"] for event in events if event["what"] == what)
        rows.append([what, str(benchlib.spread(list(times.values()))), ratio, f"{peak / 2**20:,.0f} MiB"])
    conversations = max(event["conversations"] for event in events)
    title = f"{conversations:,} conversations from a file of {size / 1e6:,.1f} MB"
    return benchlib.table(title, ("", "seconds", "rmtool's speed, in parts of its", "memory grows by"), rows)


# ----------------------------------------------------------------------------------------------------- workers


def _timed(what: str, work: Callable[[], int]) -> None:
    import gc

    import torch

    gc.collect()
    benchlib.reset_memory_peak("cpu")
    before, started = benchlib.memory("cpu")[0], time.perf_counter()
    conversations = work()
    seconds = time.perf_counter() - started
    growth = benchlib.memory("cpu")[1] - before
    emit("time", what=what, seconds=seconds, growth=growth, conversations=conversations, torch=str(torch.__version__))


def _encoder(spec: Event) -> Any:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # all cores, for both
    from rmtool.tokenization.encoder import FINGERPRINT_CONVERSATIONS, Encoder
    from rmtool.tokenization.tokenizer import load_tokenizer

    encoder = Encoder(load_tokenizer(Path(spec["model"])), 2**20, on_empty="keep")
    encoder.ids(FINGERPRINT_CONVERSATIONS[0])
    return encoder


def run_rmtool(spec: Event) -> None:
    """Worker: from the file to ids in the cache; then once more."""
    os.environ["RMTOOL_CACHE"] = str(Path(spec["scratch"]) / "cache")
    encoder = _encoder(spec)
    from rmtool.config import Source
    from rmtool.data.record import PLAIN
    from rmtool.data.rejects import Rejects
    from rmtool.dataset.split import read_sources, tokenize_subset
    from rmtool.ui import SilentUi

    ui, rejects = SilentUi(), Rejects()

    def work() -> int:
        selection = read_sources([Source(spec["data"])], PLAIN, 0, rejects, ui)
        encoded = tokenize_subset(
            encoder, selection, on_identical="keep", use_cache=True, label="all", rejects=rejects, ui=ui
        )
        rejects.raise_if_any()
        return 2 * len(encoded.metadata)

    _timed(FIRST, work)
    _timed(AGAIN, work)


def run_tokenizer(spec: Event) -> None:
    """Worker: the tokenizer on the texts, held in memory."""
    encoder = _encoder(spec)
    from rmtool.data.formats import preference_record
    from rmtool.data.rows import read_rows

    tokenizer, texts = encoder.tokenizer, list[str]()
    for row in read_rows(spec["data"]):
        record = preference_record(row)
        for response in record.responses:
            chat = [message.as_dict() for message in (*record.prompt, *response)]
            texts.append(tokenizer.apply_chat_template(chat, tokenize=False))

    def called() -> int:
        for start in range(0, len(texts), BATCH):
            tokenizer(texts[start : start + BATCH], add_special_tokens=False)
        return len(texts)

    def core() -> int:
        for start in range(0, len(texts), BATCH):
            found = tokenizer.backend_tokenizer.encode_batch_fast(
                texts[start : start + BATCH], add_special_tokens=False
            )
            assert all(item.ids for item in found)
        return len(texts)

    _timed(CALLED, called)
    _timed(CORE, core)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(benchlib.serve({"rmtool": run_rmtool, "tokenizer": run_tokenizer}))
    sys.exit(benchlib.guarded(lambda: main(parse())))
