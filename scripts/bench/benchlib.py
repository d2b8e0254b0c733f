"""What the benchmarks share: worker processes, the peers' environment, figures and tables. Standard library only.

In: a script's arguments. Out: events that its workers report, and the numbers made of them.
Every system runs in its own interpreter (`python bench_x.py --worker NAME SPEC.json`), with the same cores, the
same seed files and fresh caches, and writes one JSON object per line. Nothing is written outside a temporary folder,
which goes when the script ends, `.venv-bench`, and the files that the user named.
Cost: what the workers cost; the driver itself sleeps, so that it takes no core from them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
SHARED = ROOT.parent / "shared"
MODEL = Path.home() / ".cache" / "rmtool" / "SmolLM2-135M-Instruct"
MAKER = SHARED / "models" / "make_smollm2.py"
DATA = {
    "hh": SHARED / "data" / "hh-rlhf-harmless-base.test.jsonl.gz",
    "rmb": SHARED / "data" / "train" / "rmb-preferences.jsonl.gz",
    "rmb-bon": SHARED / "data" / "rmb" / "RMB_dataset",
}
VENV = ROOT / ".venv-bench"
PEERS = ("trl==1.16.0",)
STDERR_TAIL = 25  # lines shown of a worker that failed
PEAK_SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}
PEAK_SECONDS = 0.3  # per size and layout
PEAK_LONGEST = 0.1  # a product that takes longer is large enough

Event = dict[str, Any]
Worker = Callable[[Event], None]


class BenchError(Exception):
    """A mistake of the user; shown without a traceback."""


# --------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of `count` measurements."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{digits(self.median)} ({digits(self.low)} to {digits(self.high)}, n={self.count})"


def spread(values: Sequence[float]) -> Spread:
    if not values:
        raise ValueError("no measurements")
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratio(ours: dict[Any, float], theirs: dict[Any, float]) -> Spread:
    """How many times faster we are: their seconds over ours, for every piece of work that both have done."""
    return spread([theirs[key] / ours[key] for key in sorted(ours.keys() & theirs.keys())])


def digits(value: float) -> str:
    """Three figures that count, without an exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - len(str(int(abs(value)))) + 1)}f}" if abs(value) >= 1 else f"{value:.3g}"


@dataclass(frozen=True)
class Tokens:
    """Tokens to compute for the same responses: padded in batches, packed end to end, and with shared prompts."""

    padded: int
    packed: int
    shared: int

    def per(self, count: int) -> list[str]:
        return [digits(value / count) for value in (self.padded, self.packed, self.shared)]


def count_tokens(rows: Sequence[Sequence[int]], shared: int, batch: int) -> Tokens:
    """The tokens of rows of responses, each given by its whole length, prompt included.

    Args:
        rows: per row (a pair, or a prompt's responses), the length of every sequence.
        shared: their tokens when what they share is computed once.
        batch: rows padded together to their longest sequence.
    """
    groups = [[length for row in rows[start : start + batch] for length in row] for start in range(0, len(rows), batch)]
    packed = sum(length for row in rows for length in row)
    return Tokens(sum(len(group) * max(group) for group in groups), packed, shared)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text columns: the first on the left, numbers on the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def shown(line: Sequence[str]) -> str:
        first, *rest = (
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join(["", title, "", shown(lines[0]), rule, *(shown(line) for line in lines[1:])])


# ------------------------------------------------------------------------------------------------ the driver


def padded_reason(events: Sequence[Event]) -> str | None:
    """Why rmtool's worker used padded batches; None if it shared prompts."""
    return next((event["reason"] for event in events if event["event"] == "padded"), None)


def layout_notes(padded: str | None) -> list[str]:
    """What a reader of the results must know where rmtool did not share prompts, for the reason given."""
    if padded is None:
        return []
    return [f"prefix sharing: off, using padded batches ({padded}); rmtool's tokens include padding"]


def say(text: str) -> None:
    """To the user, now; results go to stdout at the end."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def show(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@dataclass
class Session:
    """One benchmark run: where its workers run, and the folder that goes at the end."""

    folder: Path
    script: Path
    device: str
    cores: int
    peer: Path | None = None
    serial: int = 0

    def run(
        self,
        worker: str,
        spec: Event,
        *,
        peer: bool = False,
        on_event: Callable[[Event], None] | None = None,
        limit: float | None = None,
    ) -> list[Event]:
        """Run a worker to its end, of at most `limit` seconds, and return its events.

        Raises:
            BenchError: it failed; the message ends with the last lines it wrote to stderr.
        """
        self.serial += 1
        scratch = self.folder / f"worker-{self.serial}"
        scratch.mkdir()
        path = scratch / "spec.json"
        path.write_text(json.dumps({**spec, "device": self.device, "scratch": str(scratch)}), encoding="utf-8")
        python = self.peer if peer and self.peer else Path(sys.executable)
        command = [str(python), str(self.script), "--worker", worker, str(path)]
        errors = scratch / "stderr.txt"
        try:
            with open(errors, "wb") as stderr:
                started = time.monotonic()
                events = _run(command, self._environment(scratch), stderr, on_event, limit)
            if events and events[-1]["event"] == "end":
                return events[:-1]
            if limit is not None and time.monotonic() - started >= limit:
                raise BenchError(
                    f"worker {worker} was stopped after {limit:g} s; the end of what it wrote:\n{_tail(errors)}"
                )
            killed = bool(events) and events[-1].get("code") == -signal.SIGKILL
            why = "was killed, as the system does when memory is full" if killed else "failed"
            raise BenchError(f"worker {worker} {why}; the end of what it wrote:\n{_tail(errors)}")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _environment(self, scratch: Path) -> dict[str, str]:
        """The same threads for every system, nothing cached from an earlier run, and nothing fetched."""
        caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HF_DATASETS_CACHE", "MPLCONFIGDIR", "TMPDIR")
        for name in caches:
            (scratch / name).mkdir()
        fixed = {
            "OMP_NUM_THREADS": str(self.cores),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "RMTOOL_LOG": str(scratch / "rmtool.log"),
            **({} if self.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}),
        }
        return {**os.environ, **fixed, **{name: str(scratch / name) for name in caches}}

    def peak(self, precision: str) -> float:
        """GFLOP/s of the best large matrix product, now."""
        return float(self.run("peak", {"precision": precision})[-1]["gflops"])


def _run(
    command: list[str],
    environment: dict[str, str],
    stderr: Any,
    on_event: Callable[[Event], None] | None,
    limit: float | None,
) -> list[Event]:
    """Start, listen, and leave nothing running. The worker ends by itself when its stdin does."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=environment,
        start_new_session=True,
    )
    events: list[Event] = []
    assert process.stdout
    clock = threading.Timer(limit or 0, os.killpg, (process.pid, signal.SIGKILL))
    if limit is not None:
        clock.start()
    try:
        for line in process.stdout:
            events.append(json.loads(line))
            if on_event:
                on_event(events[-1])
        if process.wait() != 0:
            events.append({"event": "failed", "code": process.returncode})
        return events
    finally:
        clock.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or ["(nothing)"]
    return "\n".join(f"  | {line}" for line in lines[-STDERR_TAIL:])


@contextlib.contextmanager
def session(script: str, device: str, cores: int) -> Iterator[Session]:
    """A temporary folder, `cores` cores for everything that is started, and a clean end also when terminated."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):  # the second is ignored in what a script starts with &
        signal.signal(number, stop)
    allowed = sorted(os.sched_getaffinity(0))
    taken = allowed[: max(1, min(cores, len(allowed)))] if device == "cpu" else allowed
    os.sched_setaffinity(0, taken)
    with tempfile.TemporaryDirectory(prefix="rmtool-bench-") as folder:
        yield Session(Path(folder), Path(script).resolve(), device, len(taken))


def guarded(run: Callable[[], int]) -> int:
    """Exit code of `run`; a mistake of the user's is one message, an interruption none."""
    try:
        return run()
    except BenchError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted; workers are stopped")
        return 130


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks have."""
    parser.add_argument(
        "--model", type=Path, default=MODEL, help="folder of a causal LM (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument(
        "--random-llama", choices=("1b", "8b"), help="random weights of this size, with --model's tokenizer"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cores", type=int, default=2, help="CPU cores for every system (default 2; with cuda: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice and order of the data")
    parser.add_argument("--tokens-per-pack", type=int, default=8192, help="rmtool's own (default: rmtool's)")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")


def add_peers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peer-python", type=Path, help=f"an interpreter with {', '.join(PEERS)} (default: one is made in {VENV.name})"
    )
    parser.add_argument("--without-peers", action="store_true", help="run rmtool alone")


def peer_python(given: Path | None) -> Path:
    """The peers' interpreter, installed from the index the first time.

    Raises:
        BenchError: it does not exist, or the installation failed.
    """
    if given:
        if not given.is_file():
            raise BenchError(f"--peer-python not found: {given}")
        return given.absolute()  # not resolved: a venv's python is a link out of it
    python, stamp = VENV / "bin" / "python", VENV / "bench-installed"
    constraints = ROOT / "constraints.txt"
    wanted = "\n".join(PEERS) + "\n" + constraints.read_text(encoding="utf-8")
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    torch = next(line for line in constraints.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    say(f"installing {', '.join(PEERS)} into {VENV} (a few minutes, once)")
    for command in (
        [sys.executable, "-m", "venv", str(VENV)],
        [*pip, torch],  # first and by itself: what follows would otherwise choose a different build
        [*pip, "--constraint", str(constraints), *PEERS],
    ):
        if subprocess.run(command, check=False).returncode:
            raise BenchError(f"this failed: {' '.join(command)}\nor name an interpreter with --peer-python")
    stamp.write_text(wanted, encoding="utf-8")
    return python


def find_data(name: str) -> Path:
    """A file, or one of the short names of DATA."""
    path = DATA.get(name, Path(name))
    if not path.exists():
        raise BenchError(f"file not found: {path}; --data takes a file, or {', '.join(DATA)} where ../shared is")
    return path.resolve()


def find_model(folder: Path) -> Path:
    """The model's folder; the default one is built the first time."""
    if folder == MODEL and not (folder / "model.safetensors").exists() and MAKER.is_file():
        say(f"building {folder}")
        subprocess.run([sys.executable, str(MAKER), str(folder)], check=True, stdout=subprocess.DEVNULL)
    if not (folder / "config.json").is_file():
        raise BenchError(f"model not found in {folder}; pass a folder with --model")
    return folder.resolve()


def environment(versions: Event) -> Event:
    """What a reader must know of the machine and the code to believe a number."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "cpu": _cpu_name(),
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": " ".join(["python", *sys.argv]),
        **{name: value for name, value in versions.items() if name != "event"},
    }


def describe(facts: Event, cores: int) -> str:
    """`environment` in two lines."""
    where = facts.get("gpu") or f"{cores} cores of {facts['cpu']}"
    commit = facts["commit"] + (" with changes" if facts["changed"] else "")
    return f"{facts['date']}, {where}, torch {facts['torch']}, commit {commit}\n{facts['command']}"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    with contextlib.suppress(OSError):
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return result.stdout.strip()
    return ""


def read_jsonl(path: Path) -> list[Any]:
    """One value per line; only a newline ends a line, not the other characters that `splitlines` knows."""
    with open(path, encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def write_json(path: Path | None, content: Event) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        say(f"written: {path}")


# ------------------------------------------------------------------------------------------------- a worker


_events: Any = None


def emit(event: str, **values: Any) -> None:
    """One event to the driver."""
    _events.write(json.dumps({"event": event, **values}) + "\n")
    _events.flush()


def serve(workers: dict[str, Worker]) -> int:
    """Be the worker that the command line names. What libraries print goes to stderr, events alone to stdout."""
    global _events
    name, path = sys.argv[2:4]
    _events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_driver, daemon=True).start()
    with contextlib.suppress(OSError):  # when memory is full, only this process ends
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    ({"peak": measure_peak, "save": save_checkpoint} | workers)[name](
        json.loads(Path(path).read_text(encoding="utf-8"))
    )
    emit("end")
    return 0


def _end_with_driver() -> None:
    """However the driver ended, its end of stdin is closed then."""
    while os.read(0, 1):
        pass
    os._exit(1)


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


class TokenCount:
    """Counts the tokens of the batches that a reward model of rmtool is given."""

    def __init__(self, model: Any):
        self.tokens = 0
        # Not where batches are built: that of the next step is built before this one has ended.
        model.register_forward_pre_hook(self._add)

    def _add(self, _: Any, given: Any) -> None:
        self.tokens += given[0].input_ids.numel()

    def take(self) -> int:
        """The tokens since the last call."""
        taken, self.tokens = self.tokens, 0
        return taken


def reset_memory_peak(device: str) -> None:
    """From here on the peak counts; where the system has no such reset, loading counts too."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory(device: str) -> tuple[int, int]:
    """(bytes in use, peak of it): resident memory on a CPU, allocated tensors on a GPU."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.strip()}
    return int(fields["VmRSS"]) * 1024, int(fields["VmHWM"]) * 1024


def measure_peak(spec: Event) -> None:
    """Worker: GFLOP/s of the fastest large square matrix product in this precision."""
    emit("peak", gflops=peak_gflops(spec["device"], spec["precision"]))


def peak_gflops(device: str, precision: str) -> float:
    """GFLOP/s of the fastest large square matrix product in this precision."""
    import torch

    best, dtype = 0.0, torch.float32 if precision == "fp32" else torch.bfloat16
    for size in PEAK_SIZES[device]:
        fastest = _product_seconds(torch.randn(size, size, device=device).to(dtype))
        best = max(best, 2 * size**3 / fastest / 1e9)
        if fastest > PEAK_LONGEST:
            break
    return best


def _product_seconds(matrix: Any) -> float:
    """Seconds of the fastest product of a matrix with itself, in the three layouts of a linear layer: its forward, and
    the gradients of its input and its weight. The first of each is not counted.
    """
    device, fastest = matrix.device.type, float("inf")
    for left, right in ((matrix, matrix.T), (matrix, matrix), (matrix.T, matrix)):
        left @ right
        end = time.perf_counter() + PEAK_SECONDS
        while time.perf_counter() < end:
            synchronize(device)
            started = time.perf_counter()
            left @ right
            synchronize(device)
            fastest = min(fastest, time.perf_counter() - started)
    return fastest


LLAMAS = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}


def save_checkpoint(spec: Event) -> None:
    """Worker: the reward model that every system starts from, built by rmtool; and what it is made of."""
    import torch

    from rmtool.config import DataConfig, ModelConfig, Recipe, TrainConfig
    from rmtool.model.loading import training_encoder, training_model

    source, target = Path(spec["model"]), Path(spec["checkpoint"])
    if spec["random_llama"]:
        source = random_llama(source, Path(spec["scratch"]) / "llama", spec["random_llama"])
    weights = "random" if spec["random_llama"] else "pretrained"
    recipe = Recipe(
        "bench",
        ModelConfig(str(source), weights=weights, head="new"),
        DataConfig(("none",)),
        TrainConfig(batch_size=1, learning_rate=1.0, seed=spec["seed"], liger="off"),
    )
    encoder, _ = training_encoder(recipe, source)
    model, _ = training_model(recipe, source, encoder)
    model.classifier.to(torch.bfloat16 if spec["save_dtype"] == "bf16" else torch.float32)
    model.classifier.save_pretrained(target)
    encoder.tokenizer.save_pretrained(target)
    embeddings = sum(parameter.numel() for parameter in model.classifier.get_input_embeddings().parameters())
    total = sum(parameter.numel() for parameter in model.classifier.parameters())
    gpu = torch.cuda.get_device_name() if spec["device"] == "cuda" else None
    emit("saved", parameters=total, matrix_parameters=total - embeddings, torch=torch.__version__, gpu=gpu)


def random_llama(source: Path, folder: Path, size: str, **changes: int) -> Path:
    """The config of a Llama of this size, with `changes`, and `source`'s tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)
    heads = LLAMAS[size]["hidden_size"] // (64 if size == "1b" else 128)
    shape = {"num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": len(tokenizer), **LLAMAS[size]}
    config = LlamaConfig(
        **shape | changes,
        max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder
