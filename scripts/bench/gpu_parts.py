"""The parts of gpu.sh: checks of the CUDA path, then speed and memory (`gpu_steps.py`), a process and a JSON file each.

In: the command line of gpu.sh. Out: OUT_FOLDER/PART.json per part: `status` (ok, failed, skipped), `why`, the
`environment`, and the `results` in the order in which the part reported them, also those before it failed or was
stopped. A result with `ok` false makes its part fail.
Cost: at most `LIMIT` seconds per part on a card like an H100, some 40 minutes in all; 3 minutes with --device cpu.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import benchlib
import gpu_steps
from benchlib import BenchError, Event, Session, emit, say

from rmtool.packages import version_of

LIMIT = 460.0  # seconds of a part: eight minutes with its start and end
CHECKS = ("kernel", "precision", "processes", "step", "step-liger", "commands")
SIZES = ("train-1b", "train-1b-liger", "train-1b-compile", "train-1b-liger-compile", "score-1b",
         "train-8b", "train-8b-liger", "train-8b-compile", "train-8b-lora", "score-8b")  # fmt: skip
GIVEN = ("train-model", "train-model-liger", "score-model")  # with --model
PACKAGES = ("torch", "transformers", "accelerate", "peft", "psutil", "pytest", "deepspeed", "liger-kernel")
REQUIRED = ("torch", "transformers", "accelerate")
DEBUG = benchlib.ROOT / "recipes" / "debug"
DEEP, DEEP_BOUND = 16, 2.0  # layers; errors of prefix sharing over those of padding, of ten rewards


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu.sh", description="Check and measure rmtool on one CUDA device.")
    parser.add_argument("out", type=Path, metavar="OUT_FOLDER", help="folder for the JSON file of each part")
    parser.add_argument("--part", action="append", default=[], metavar="NAME", help="run this part; can be repeated")
    parser.add_argument("--again", action="store_true", help="run parts that have a JSON file, too")
    parser.add_argument("--list", action="store_true", help="print the names of the parts")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda", help="cpu: small sizes, to try this script"
    )
    parser.add_argument("--model", type=Path, help="folder of a causal LM to measure, too; its tokenizer is used")
    parser.add_argument("--pairs", type=Path, default=DEBUG / "pairs.jsonl", help="preference pairs (default: bundled)")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the device, dense bf16 (default: H100)")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds per part (default {LIMIT:g})")
    args = parser.parse_args(arguments)
    known = (*CHECKS, *SIZES, *(GIVEN if args.model else ()))
    if unknown := set(args.part) - set(known):
        parser.error(f"unknown part: {', '.join(sorted(unknown))}; parts: {', '.join(known)}")
    for path in (args.pairs, *([args.model] if args.model else [])):
        if not path.exists():
            parser.error(f"not found: {path}")
    args.parts = args.part or known
    return args


def main(args: argparse.Namespace) -> int:
    if args.list:
        benchlib.show("\n".join(args.parts))
        return 0
    versions = {name: version_of(name) for name in PACKAGES}
    if missing := [name for name, version in versions.items() if version is None]:
        say(f"not installed: {', '.join(missing)}")
        if set(missing) & set(REQUIRED):
            return 2
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    with benchlib.session(str(benchlib.ROOT / "scripts" / "bench" / "gpu_parts.py"), args.device, 2) as session:
        for part in args.parts:
            path = args.out / f"{part}.json"
            if path.exists() and not args.again:
                report = json.loads(path.read_text(encoding="utf-8"))
                say(f"{part}: {report['status']} (earlier)")
            else:
                report = run_part(session, part, args, versions)
                benchlib.write_json(path, report)
            failed += [part] if report["status"] == "failed" else []
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def run_part(session: Session, part: str, args: argparse.Namespace, versions: dict[str, str | None]) -> Event:
    """Run a part in a process; return its report."""
    results, started, why = list[Event](), time.monotonic(), ""
    say(f"\n{part}")

    def tell(event: Event) -> None:
        if event["event"] not in ("end", "failed"):
            results.append(event)
            say("  " + ", ".join(f"{name} {short(value)}" for name, value in event.items() if name != "table"))

    spec = {name: str(getattr(args, name).resolve()) for name in ("pairs", "model") if getattr(args, name)}
    spec |= {"part": part, "peak_tflops": args.peak_tflops, "limit": args.limit}
    if reason := why_skipped(part, args.device, versions):
        tell({"event": "skipped", "reason": reason})
    else:
        try:
            session.run(part, spec, on_event=tell, limit=args.limit)
        except BenchError as error:
            why = str(error)
            say(why)
    failed = bool(why) or any(result.get("ok") is False for result in results)
    skipped = bool(results) and all(result["event"] == "skipped" for result in results)
    return {
        "part": part,
        "status": "failed" if failed else "skipped" if skipped else "ok",
        "why": why,
        "seconds": round(time.monotonic() - started, 1),
        "environment": benchlib.environment({"device": args.device, **versions}),
        "results": results,
    }


def why_skipped(part: str, device: str, versions: dict[str, str | None]) -> str:
    """Why a part cannot run here, or need not; empty if it can."""
    if "liger" in part and versions["liger-kernel"] is None:
        return "not installed: liger-kernel"
    if part in ("kernel", "precision", "processes") and versions["pytest"] is None:
        return "not installed: pytest"
    if "liger" in part and device == "cpu":
        return "Liger's kernels need a CUDA device"
    return "on a CPU, the same as train-1b-compile" if part == "train-8b-compile" and device == "cpu" else ""


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------ the checks


def check_kernel(spec: Event) -> None:
    """Worker: one kernel call against the loop, as `test_attention_gpu.py` does it."""
    with kernel_in_place(spec["device"]) as (kernel_checks, _):
        for sizes in ((64, 64), (192, 128)):
            for window in (None, 5):
                error = kernel_checks.one_call_error(sizes, window, spec["device"])
                emit("kernel", head_sizes=sizes, window=window, error=error, ok=error < 1e-2)


def check_precision(spec: Event) -> None:
    """Worker: rewards and gradients in bf16 and fp32, shared and padded, against fp32 padded, in heads of 64."""
    for layers in (2, DEEP):
        for family in ("llama", "qwen3", "mistral_window"):
            with kernel_in_place(spec["device"]) as (kernel_checks, calls):
                errors = kernel_checks.half_precision_errors(family, spec["device"], calls, layers)
            for what, found in errors.items():
                ratio = found["shared"] / found["padded"]
                bound = 1.5 if layers == 2 else DEEP_BOUND
                ok = ratio < bound and found["shared_fp32"] < 1e-3
                emit("precision", family=family, layers=layers, what=what, ratio=ratio, **found, ok=ok)


class kernel_in_place:  # noqa: N801 - a context manager
    """`kernel_checks`, and the kernel's calls in the block; on a CPU with a plain function in the kernel's place."""

    def __init__(self, device: str) -> None:
        import pytest

        self.device, self.patch = device, pytest.MonkeyPatch()

    def __enter__(self) -> tuple[Any, list[int]]:
        import kernel_checks
        import mutants
        from torch.nn.attention.varlen import varlen_attn

        if self.device == "cpu":
            kernel_checks.take_kernel_on_cpu(self.patch)
        kernel = mutants.plain_kernel if self.device == "cpu" else varlen_attn
        return kernel_checks, kernel_checks.count_calls(kernel, self.patch)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def check_processes(spec: Event) -> None:
    """Worker: rewards and gradients in fp32 with and without Liger and compiled layers, a process each."""
    import kernel_checks

    device = spec["device"]
    families = kernel_checks.HALF_FAMILIES if device == "cuda" else kernel_checks.HALF_FAMILIES[:1]
    kinds = [(False, False), (False, True), (True, False), (True, True)] if device == "cuda" else [(False, False)]
    for liger, compiled in kinds:
        if liger and version_of("liger-kernel") is None:
            emit("skipped", reason="not installed: liger-kernel")
            continue
        for family in families:
            error = ""
            try:
                kernel_checks.in_a_process(kernel_checks.rewards_and_gradients, family, device, liger, compiled)
            except Exception:  # noqa: BLE001 - of whatever kind, the other processes run
                error = traceback.format_exc()[-2000:]
            emit("process", family=family, liger=liger, compiled=compiled, ok=not error, error=error)


def check_commands(spec: Event) -> None:
    """Worker: train, eval and score from the command line, with the debug recipe; and which processes hold memory."""
    folder, cuda = Path(spec["scratch"]), spec["device"] == "cuda"
    steps = ["--set", f"train.max_steps={40 if cuda else 8}", "--set", f"train.precision={'bf16' if cuda else 'fp32'}"]
    for engine in ("single", "fsdp2", "zero3") if cuda else ("single", "zero3"):
        if engine == "zero3" and version_of("deepspeed") is None:
            emit("skipped", reason="not installed: deepspeed")
            continue
        run_command(f"train {engine}", ["train", "--recipe", "debug", "--output", str(folder / engine), *steps,
                    "--set", f"launch.engine={engine}"], cuda)  # fmt: skip
    run_command("eval", ["eval", str(folder / "single"), "--json"], cuda)
    output = folder / "scored.jsonl"
    score = ["score", str(DEBUG / "responses.jsonl"), "--model", str(folder / "single"), "--output", str(output)]
    run_command("score", score, cuda)
    rows = benchlib.read_jsonl(output) if output.exists() else []
    rewards = [reward for row in rows for reward in (row["rewards"] if "rewards" in row else [row["reward"]])]
    emit("rewards", count=len(rewards), ok=bool(rewards) and None not in rewards)


def run_command(name: str, arguments: list[str], cuda: bool) -> None:
    """Run rmtool; emit its exit code, and on CUDA the most processes that held the device's memory at one time."""
    before, most = set(holders()) if cuda else set(), list[str]()
    started, ended = time.monotonic(), threading.Event()

    def watch() -> None:
        nonlocal most
        while True:
            most = max(most, [each for each in holders() if each not in before], key=len)
            if ended.wait(0.5):
                return

    watcher = threading.Thread(target=watch)
    if cuda:
        watcher.start()
    command = [sys.executable, "-m", "rmtool.cli.main", *arguments]
    environment = {**os.environ, "RMTOOL_CACHE": os.environ["TMPDIR"]}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
    )
    ended.set()
    if cuda:
        watcher.join()
    memory = {"processes": (most or "none shown by nvidia-smi") if cuda else "skipped: no CUDA device"}
    failed = done.returncode != 0
    tail = done.stdout[-2000:] if failed else ""
    seconds = time.monotonic() - started
    emit("command", name=name, exit_code=done.returncode, seconds=seconds, **memory, output=tail,
         ok=not failed and len(most) <= 1)  # fmt: skip


def holders() -> Iterator[str]:
    """The processes with memory on the device, by nvidia-smi (in a container, perhaps with the host's ids)."""
    query = ["nvidia-smi", "--query-compute-apps=pid,process_name", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    return (line.strip() for line in found if line.strip() and not line.startswith(f"{os.getpid()},"))


def with_device(worker: Callable[[Event], None]) -> benchlib.Worker:
    """The worker, after a report of the device."""

    def run(spec: Event) -> None:
        import torch

        if spec["device"] == "cuda":
            emit("device", name=torch.cuda.get_device_name(), bytes=torch.cuda.get_device_properties(0).total_memory)
        worker(spec)

    return run


WORKERS = {
    "kernel": with_device(check_kernel),
    "precision": with_device(check_precision),
    "processes": with_device(check_processes),
    "commands": check_commands,  # in a process that holds no memory
    **{part: with_device(gpu_steps.inspect_step) for part in ("step", "step-liger")},
    **{part: with_device(gpu_steps.measure_training) for part in (*SIZES, *GIVEN) if part.startswith("train")},
    **{part: with_device(gpu_steps.measure_scoring) for part in (*SIZES, *GIVEN) if part.startswith("score")},
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(benchlib.serve(WORKERS))
    sys.exit(benchlib.guarded(lambda: main(parse())))
