"""What a recipe will run: pairs, steps, processes, and the `accelerate launch` command of every node.

In: a recipe and an output folder. Out: a `Plan`; nothing is written and no process started.
Cost: local data files are read once, which also finds their mistakes before any large library is imported.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmtool.config import Recipe, Source
from rmtool.data.rejects import Rejects
from rmtool.data.rows import is_hub_source
from rmtool.data.sources import SourceCount, draw_share, read_records
from rmtool.errors import RmtoolError
from rmtool.recipe import as_source
from rmtool.split import reading_of, sources_of
from rmtool.steps import plan_steps

# accelerate takes what a command leaves out from a file in the user's home, unless it is given another.
ACCELERATE_FILE = "accelerate.yaml"
ACCELERATE_CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
mixed_precision: 'no'
num_machines: 1
num_processes: 1
machine_rank: 0
use_cpu: false
"""


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
        held_out = f"{_held(data.holdout)} held out" if data.holdout else "none"
        when = f"every {train.eval_every} steps and at the end" if train.eval_every else "at the end"
        nodes = f"{launch.nodes} node{'s' * (launch.nodes > 1)} x {launch.processes_per_node}"
        limit = f", at most {train.max_steps}" if train.max_steps else ""
        betas = " and ".join(f"{beta:g}" for beta in train.betas)
        share = f"{train.batch_size / self.world_size:g} per process"
        pushed = f", then pushed to {recipe.hub.repo_id}" if recipe.hub.repo_id else ""
        return [
            ("model", f"{recipe.model.path} ({recipe.model.weights} weights; trained: {weights})"),
            ("training data", ", ".join(map(_shown, data.train))),
            ("training pairs", unknown if self.pairs is None else f"{self.pairs:,}"),
            ("evaluation", f"{', '.join(map(_shown, data.eval)) or held_out}; {when}"),
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
        held = recipe.data.holdout if isinstance(recipe.data.holdout, int) else int(recipe.data.holdout * pairs)
        if held >= pairs:
            raise RmtoolError("E0302", f"data.holdout is {held}, and there are {pairs} pairs", "hold out fewer pairs")
        pairs -= held
        steps = plan_steps(train.epochs, train.max_steps, pairs, train.batch_size)
    launch = recipe.launch
    commands = tuple(_for_a_shell(launch_command(recipe, output, node)) for node in range(launch.nodes))
    return Plan(recipe, output, launch.nodes * launch.processes_per_node, pairs, steps, commands)


def _for_a_shell(command: list[str]) -> str:
    """The command as one line to paste; $MASTER_ADDR is left for the shell to fill in."""
    return " ".join(part if part == "$MASTER_ADDR" else shlex.quote(part) for part in command)


def _shown(item: str | Source) -> str:
    source = as_source(item)
    share = f"{source.rows:,} rows of " if source.rows else f"{source.fraction:g} of " if source.fraction else ""
    return share + source.path


def _held(holdout: int | float) -> str:
    return f"{holdout} pairs" if isinstance(holdout, int) else f"{holdout:.3g} of the pairs"


def _count_pairs(recipe: Recipe) -> int | None:
    """Pairs to train on, before any is held out; None if a source is on the Hub. Local rows are checked here already:
    a mistake in line 3 shows in a second, not after the libraries are imported.

    Raises:
        RmtoolError: E03xx as reading says; bad rows are passed over where the recipe sets them aside.
    """
    data = recipe.data
    with Rejects(Path(os.devnull) if data.on_bad_row == "skip" else None) as rejects:
        train = [_count_source(source, number, recipe, rejects) for number, source in enumerate(sources_of(data.train))]
        for number, source in enumerate(sources_of(data.eval)):
            _count_source(source, number, recipe, rejects)
        rejects.settle()
    return None if None in train else sum(count or 0 for count in train)


def _count_source(source: Source, number: int, recipe: Recipe, rejects: Rejects) -> int | None:
    if is_hub_source(source.path):
        return None
    records = read_records(source.path, reading_of(recipe.data), rejects, SourceCount(source.path), lambda: None)
    pairs = np.array([len(record.preferences) for record in records], dtype=int)
    return int(pairs[draw_share(source, len(pairs), recipe.train.seed, number)].sum())


def launch_command(recipe: Recipe, output: Path, node: int) -> list[str]:
    """The `accelerate launch` command of one node."""
    launch = recipe.launch
    world = launch.nodes * launch.processes_per_node
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--num_machines", str(launch.nodes), "--num_processes", str(world), "--machine_rank", str(node)]
    if world == 1:
        command += ["--config_file", str(output / ACCELERATE_FILE)]
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
