"""From a recipe to running processes: the plan, the command, and the terminal that shows what they do.

In: a recipe and an output folder. Out: a finished run folder, or the error of the first process that failed.
The processes' own output goes to train.log in the run folder; what they want to show comes through a pipe.
Cost: `accelerate launch` takes a few seconds to import its own libraries before a process starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmtool.checkpoint import MANIFEST
from rmtool.config import Recipe, dump_recipe, resolve
from rmtool.data.formats import preference_record
from rmtool.data.rows import is_hub_source, read_rows
from rmtool.errors import ExitCode, RmtoolError
from rmtool.steps import plan_steps
from rmtool.ui import Replay, TerminalUi

LOG_FILE = "train.log"
EVENTS_FILE = ".events"
CONFIG_FILE = "config.yaml"
GRACE_S = 10.0  # between asking the processes to stop and killing them


@dataclass(frozen=True)
class Plan:
    """What will run; computed from the recipe and the data, never written back. `pairs` is None for Hub datasets."""

    recipe: Recipe
    output: Path
    world_size: int
    pairs: int | None
    steps: int | None
    commands: tuple[str, ...]  # one per node

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for a table."""
        recipe, train, data, launch = self.recipe, self.recipe.train, self.recipe.data, self.recipe.launch
        unknown = "known when the dataset is loaded"
        weights = f"LoRA rank {recipe.lora.rank}" if recipe.lora.rank else "all weights"
        held_out = f"{data.holdout} pairs held out" if data.holdout else "none"
        when = f"every {train.eval_every} steps and at the end" if train.eval_every else "at the end"
        nodes = f"{launch.nodes} node{'s' * (launch.nodes > 1)} x {launch.processes_per_node}"
        limit = f", at most {train.max_steps}" if train.max_steps else ""
        betas = " and ".join(f"{beta:g}" for beta in train.betas)
        share = f"{train.batch_size / self.world_size:g} per process"
        pushed = f", then pushed to {recipe.hub.repo_id}" if recipe.hub.repo_id else ""
        return [
            ("model", f"{recipe.model.path} ({recipe.model.weights} weights; trained: {weights})"),
            ("training data", ", ".join(data.train)),
            ("training pairs", unknown if self.pairs is None else f"{self.pairs:,}"),
            ("evaluation", f"{', '.join(data.eval) or held_out}; {when}"),
            ("longest sequence", f"{data.max_length:,} tokens; longer: {data.on_long}"),
            ("processes", f"{self.world_size} = {nodes}, {launch.engine}, {train.precision}"),
            ("pairs per step", f"{train.batch_size:,} over all processes ({share})"),
            ("tokens per pack", f"at most {train.tokens_per_pack:,} unique tokens per forward and process"),
            ("steps", f"{unknown if self.steps is None else f'{self.steps:,}'} (epochs: {train.epochs}{limit})"),
            ("learning rate", f"{train.learning_rate:g}, {train.schedule}, {train.warmup_steps} warm-up steps"),
            ("optimiser", f"AdamW, betas {betas}, eps {train.eps:g}, weight decay {train.weight_decay:g}"),
            ("gradients", f"clipped at norm {train.max_grad_norm}" + ", checkpointed" * train.gradient_checkpointing),
            ("seed", str(train.seed)),
            ("tracking", f"wandb project {recipe.track.project}" if recipe.track.wandb else "the run folder only"),
            ("checkpoint", f"{self.output / 'model'}, {train.save_dtype}{pushed}"),
        ]

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "world_size": self.world_size,
            "pairs": self.pairs,
            "steps": self.steps,
            "batch_size": self.recipe.train.batch_size,
            "commands": list(self.commands),
        }


def make_plan(recipe: Recipe, output: Path) -> Plan:
    """Read and check the local data, and work out what will run.

    Raises:
        RmtoolError: E02xx and E03xx for files that are missing or malformed.
    """
    pairs = _count_pairs(recipe)
    steps = None
    if pairs is not None:
        train = recipe.train
        if recipe.data.holdout >= pairs:
            raise RmtoolError(
                "E0302", f"data.holdout is {recipe.data.holdout}, and there are {pairs} pairs", "hold out fewer pairs"
            )
        pairs -= recipe.data.holdout
        steps = plan_steps(train.epochs, train.max_steps, pairs, train.batch_size)
    launch = recipe.launch
    commands = tuple(_for_a_shell(launch_command(recipe, output, node)) for node in range(launch.nodes))
    return Plan(recipe, output, launch.nodes * launch.processes_per_node, pairs, steps, commands)


def _for_a_shell(command: list[str]) -> str:
    """The command as one line to paste; $MASTER_ADDR is left for the shell to fill in."""
    return " ".join(part if part == "$MASTER_ADDR" else shlex.quote(part) for part in command)


def _count_pairs(recipe: Recipe) -> int | None:
    """Pairs to train on, before any is held out; None if a source is on the Hub. Local rows are checked here already:
    a mistake in line 3 shows in a second, not after the libraries are imported.
    """
    train = [_check_source(resolve(source)) for source in recipe.data.train]
    for source in recipe.data.eval:
        _check_source(resolve(source))
    return None if None in train else sum(count or 0 for count in train)


def _check_source(source: str) -> int | None:
    if is_hub_source(source):
        return None
    return sum(len(preference_record(row).preferences) for row in read_rows(source))


def launch_command(recipe: Recipe, output: Path, node: int) -> list[str]:
    """The `accelerate launch` command of one node. Every value is given: what is left out, accelerate asks a config
    file in the user's home for.
    """
    launch = recipe.launch
    world = launch.nodes * launch.processes_per_node
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--num_machines", str(launch.nodes), "--num_processes", str(world), "--machine_rank", str(node)]
    command += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", str(_threads(launch.processes_per_node))]
    if world > 1:
        address = launch.main_address or os.environ.get("MASTER_ADDR") or "$MASTER_ADDR"
        command += ["--main_process_ip", address, "--main_process_port", str(launch.main_port)]
    command += _engine_arguments(recipe)
    return [*command, "--module", "rmtool.train", str(output)]


def _engine_arguments(recipe: Recipe) -> list[str]:
    engine, train = recipe.launch.engine, recipe.train
    if not engine.startswith("zero"):
        # Autocast is the model's own (see model.py): with accelerate's on top there would be two.
        return (["--multi_gpu"] if engine == "ddp" else []) + ["--mixed_precision", "no"]
    return [
        "--use_deepspeed",
        *("--zero_stage", engine.removeprefix("zero")),
        *("--zero3_init_flag", "true" if engine == "zero3" else "false"),
        *("--zero3_save_16bit_model", "true" if engine == "zero3" else "false"),
        *("--mixed_precision", "bf16" if train.precision == "bf16" else "no"),
        *("--gradient_accumulation_steps", "1"),
        *("--gradient_clipping", str(train.max_grad_norm or 0.0)),
        *("--deepspeed_multinode_launcher", "standard"),
    ]


def _threads(processes: int) -> int:
    """One process computes on all of this machine's cores; of several, each drives a GPU."""
    return len(os.sched_getaffinity(0)) if processes == 1 else 1


def prepare_folder(output: Path, overwrite: bool) -> None:
    """Make the run folder and see that it can be written.

    Raises:
        RmtoolError: E0601 a finished run is there, E0501 it cannot be written.
    """
    if (output / "model" / MANIFEST).is_file() and not overwrite:
        raise RmtoolError(
            "E0601", f"{output} holds a finished run", "choose another --output, or pass --overwrite to replace it"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise RmtoolError(
            "E0501", f"{output} cannot be written: {error.strerror}", "choose another --output"
        ) from error


def run(plan: Plan, ui: TerminalUi) -> None:
    """Write the run's config, start its processes, show their progress, and wait.

    Raises:
        RmtoolError: what the first failing process wrote down, or E0801 if it died without a word.
    """
    if plan.recipe.launch.engine.startswith("zero") or plan.world_size > 1:
        raise RmtoolError(
            "E0207",
            f"{plan.world_size} processes on {plan.recipe.launch.engine} are planned, but not run by this version",
            "use --dry-run for the plan; to train here, set launch.engine=single and one process",
        )
    output = plan.output
    with _locked(output):
        _run_processes(plan, ui)


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold the run folder: a second run in it would mix its files with this one's. The lock goes with the process."""
    with open(output / ".lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RmtoolError(
                "E0602", f"another rmtool trains in {output}", "wait for it, or choose another --output"
            ) from error
        yield


def _run_processes(plan: Plan, ui: TerminalUi) -> None:
    output = plan.output
    for stale in output.glob("exit-*.json"):
        stale.unlink()
    (output / CONFIG_FILE).write_text(dump_recipe(plan.recipe), encoding="utf-8")
    with _events_pipe(output) as pipe, open(output / LOG_FILE, "wb") as log:
        child = subprocess.Popen(
            launch_command(plan.recipe, output, 0),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(output),
            start_new_session=True,
        )
        try:
            _follow(child, pipe, Replay(ui))
        finally:
            _stop(child)
    _raise_failure(output, child.returncode)


def _environment(output: Path) -> dict[str, str]:
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **quiet, "RMTOOL_EVENTS": str(output / EVENTS_FILE)}


@contextlib.contextmanager
def _events_pipe(output: Path) -> Iterator[int]:
    path = output / EVENTS_FILE
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    # Opened for writing too: without a writer a pipe is always "ready", and a writer that ends closes nothing here.
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def _follow(child: subprocess.Popen[bytes], pipe: int, replay: Replay) -> None:
    """Show events until the child is gone and the pipe is empty."""
    buffer = b""
    with selectors.DefaultSelector() as selector, contextlib.closing(replay):
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            gone = child.poll() is not None
            if selector.select(0 if gone else 0.2):
                *lines, buffer = (buffer + os.read(pipe, 1 << 16)).split(b"\n")
                for line in lines:
                    replay.line(line.decode())
            elif gone:
                return


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End the child's whole process group: the launcher alone would leave the workers behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        try:
            child.wait(GRACE_S)
            return
        except subprocess.TimeoutExpired:
            continue


def _raise_failure(output: Path, code: int) -> None:
    statuses = [json.loads(path.read_text()) for path in sorted(output.glob("exit-*.json"))]
    for status in statuses:
        if status["error"]:
            raise RmtoolError.from_dict(status["error"])
    if code == 0 and statuses and all(status["exit"] == 0 for status in statuses):
        return
    log = output / LOG_FILE
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
    bug = any(status["exit"] == ExitCode.BUG for status in statuses)
    raise RmtoolError(
        "E7001" if bug else "E0801",
        "training met a bug in rmtool" if bug else f"the training process died (exit code {code})",
        f"read the end of {log}"
        + (" and report it" if bug else "; out of memory is the usual reason: lower train.tokens_per_pack"),
        found=tail[0] if tail else None,
    )


def final_metrics(output: Path) -> dict[str, float]:
    """The last step's eval metrics, or its training metrics where no pairs were held out."""
    last = json.loads((output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    held_out = {name: value for name, value in last.items() if name.startswith("eval/")}
    return held_out or {name: value for name, value in last.items() if "/" in name}
