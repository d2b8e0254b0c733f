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

from rmtool.config import Recipe, Source
from rmtool.data.rejects import Rejects
from rmtool.data.rows import is_hub_source
from rmtool.data.sources import draw_share, load_source
from rmtool.dataset.batches import count_pairs, plan_steps
from rmtool.dataset.split import resolve_sources, row_options
from rmtool.errors import RmtoolError
from rmtool.recipe import as_source, engine_of, recipe_hash, world_size

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
ADDRESS = "$MASTER_ADDR"  # stands for the first node's address where a plan does not know it
PORT = 29500


@dataclass(frozen=True)
class Plan:
    """What will run; computed from the recipe and the data, never written back. `pairs` is None for Hub datasets."""

    recipe: Recipe
    output: Path
    world_size: int
    pairs: int | None
    steps: int | None
    commands: tuple[str, ...]  # one per node
    node: int = 0  # this one
    launcher: str = ""  # what set the number of nodes, if not the recipe

    @property
    def folder(self) -> Path:
        """Where this node's processes find their config and leave their logs: the first node's is the run folder."""
        return node_folder(self.output, self.node)

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for a table."""
        recipe, train, data, launch = self.recipe, self.recipe.train, self.recipe.data, self.recipe.launch
        unknown = "known when the dataset is loaded"
        weights = f"LoRA rank {recipe.lora.rank}" if recipe.lora.rank else "all weights"
        weights = "the score head alone" if train.freeze == "backbone" else weights
        kept = (
            "the last step's weights"
            if train.keep == "last"
            else f"the weights with the best eval {train.metric_for_best}"
        )
        stop = (
            f"; stops after {train.early_stopping_patience} evaluations without a better one"
            if train.early_stopping_patience
            else ""
        )
        smooth = f", labels smoothed by {train.label_smoothing:g}" if train.label_smoothing else ""
        centering = (
            f", plus {train.center_rewards_coefficient:g} (chosen + rejected)^2"
            if train.center_rewards_coefficient
            else ""
        )
        held_out = f"{_held(data.holdout)} held out" if data.holdout else "none"
        when = f"every {train.eval_every} steps and at the end" if train.eval_every else "at the end"
        nodes = f"{launch.nodes} node{'s' * (launch.nodes > 1)} x {launch.gpus_per_node}"
        told = f" (from {self.launcher})" if self.launcher else ""
        limit = f", at most {train.max_steps}" if train.max_steps else ""
        betas = " and ".join(f"{beta:g}" for beta in train.betas)
        share = f"{train.batch_size / self.world_size:g} per process"
        pushed = f", then pushed to {recipe.hub.repo_id}" if recipe.hub.repo_id else ""
        return [
            ("recipe", f"{recipe.name}, {recipe_hash(recipe)} (sha256 of what decides what is learned)"),
            ("model", f"{recipe.model.path} ({recipe.model.weights} weights; trained: {weights})"),
            ("training data", ", ".join(map(_shown, data.train))),
            ("training pairs", unknown if self.pairs is None else f"{self.pairs:,}"),
            ("evaluation", f"{', '.join(map(_shown, data.eval)) or held_out}; {when}"),
            ("longest sequence", f"{data.max_length:,} tokens; longer: {data.on_long}"),
            ("processes", f"{self.world_size} = {nodes}{told}, {engine_of(launch)}, {train.precision}"),
            *self._precision_rows(),
            ("pairs per step", f"{train.batch_size:,} over all processes ({share})"),
            ("tokens per pack", f"at most {train.tokens_per_pack:,} unique tokens per forward and process"),
            ("steps", f"{unknown if self.steps is None else f'{self.steps:,}'} (epochs: {train.epochs}{limit})"),
            ("loss", f"{train.loss.replace('_', '-')}{smooth}{centering}"),
            ("learning rate", f"{train.learning_rate:g}, {train.schedule}, {train.warmup_steps} warm-up steps"),
            ("optimizer", f"AdamW, betas {betas}, eps {train.eps:g}, weight decay {train.weight_decay:g}"),
            ("gradients", f"clipped at norm {train.max_grad_norm}" + ", checkpointed" * train.gradient_checkpointing),
            ("seed", str(train.seed)),
            ("tracking", f"wandb project {recipe.track.project}" if recipe.track.wandb else "the run folder only"),
            ("checkpoint", f"{self.output / 'model'}: {kept}, {train.save_dtype}{pushed}{stop}"),
        ]

    def _precision_rows(self) -> list[tuple[str, str]]:
        """A remark where this machine multiplies much faster in another precision."""
        if self.recipe.train.precision != "fp32":
            return []
        from rmtool.model.precision import fast_bf16_device  # imports torch

        device = fast_bf16_device()
        if device is None:
            return []
        return [("precision", f"fp32 (bf16 is several times faster on {device}: --set train.precision=bf16)")]

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "recipe_hash": recipe_hash(self.recipe),
            "world_size": self.world_size,
            "pairs": self.pairs,
            "steps": self.steps,
            "batch_size": self.recipe.train.batch_size,
            "commands": list(self.commands),
        }


def make_plan(recipe: Recipe, output: Path, node: int = 0, launcher: str = "") -> Plan:
    """Read and check the local data, and work out what will run.

    Raises:
        RmtoolError: E02xx and E03xx for files that are missing or malformed.
    """
    launch = recipe.launch
    if node >= launch.nodes:
        hint = f"count nodes from 0: --node-rank 0 to {launch.nodes - 1}, or set --nodes"
        raise RmtoolError("E0207", f"this is node {node} of {launch.nodes}", hint)
    pairs = _count_training_pairs(recipe)
    steps = None
    if pairs is not None:
        train = recipe.train
        held = recipe.data.holdout if isinstance(recipe.data.holdout, int) else int(recipe.data.holdout * pairs)
        if held >= pairs:
            raise RmtoolError("E0302", f"data.holdout is {held}, and there are {pairs} pairs", "hold out fewer pairs")
        pairs -= held
        steps = plan_steps(train.epochs, train.max_steps, pairs, train.batch_size)
    commands = tuple(_for_a_shell(launch_command(recipe, output, number)) for number in range(launch.nodes))
    return Plan(recipe, output, world_size(launch), pairs, steps, commands, node, launcher)


def node_folder(output: Path, node: int) -> Path:
    return output / f"node-{node}" if node else output


def _for_a_shell(command: list[str]) -> str:
    """The command as one line to paste; $MASTER_ADDR is left for the shell to fill in."""
    return " ".join(part if part == ADDRESS else shlex.quote(part) for part in command)


def _shown(item: str | Source) -> str:
    source = as_source(item)
    share = f"{source.rows:,} rows of " if source.rows else f"{source.fraction:g} of " if source.fraction else ""
    return share + source.path


def _held(holdout: int | float) -> str:
    return f"{holdout} pairs" if isinstance(holdout, int) else f"{holdout:.3g} of the pairs"


def _count_training_pairs(recipe: Recipe) -> int | None:
    """Count the pairs before any is held out; None if a source is on the Hub.

    Local sources are parsed here already, into the cache: a mistake in line 3 shows in a second, not after the
    libraries are imported.

    Raises:
        RmtoolError: E03xx as loading does; invalid rows are passed over if the recipe skips them.
    """
    data = recipe.data
    with Rejects(Path(os.devnull) if data.on_bad_row == "skip" else None) as rejects:
        counts, _ = (
            [_count_source(source, number, recipe, rejects) for number, source in enumerate(resolve_sources(sources))]
            for sources in (data.train, data.eval)
        )
        rejects.raise_if_any()
    return None if None in counts else sum(count or 0 for count in counts)


def _count_source(source: Source, number: int, recipe: Recipe, rejects: Rejects) -> int | None:
    if is_hub_source(source.path):
        return None
    metadata = load_source(source.path, row_options(recipe.data), rejects, use_cache=recipe.data.cache).metadata
    return count_pairs(metadata[index] for index in draw_share(source, len(metadata), recipe.train.seed, number))


def launch_command(recipe: Recipe, output: Path, node: int) -> list[str]:
    """The `accelerate launch` command of one node."""
    launch, processes = recipe.launch, world_size(recipe.launch)
    folder = node_folder(output, node)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / ACCELERATE_FILE)]
    command += ["--num_machines", str(launch.nodes), "--num_processes", str(processes), "--machine_rank", str(node)]
    command += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", str(_threads(launch.gpus_per_node))]
    if launch.nodes > 1:
        command += ["--main_process_ip", launch.main_address or ADDRESS]
    if engine_of(launch) != "single":
        # On one node 0: any port that is free, so that two runs do not meet.
        port = launch.main_port or (PORT if launch.nodes > 1 else 0)
        command += ["--main_process_port", str(port), *_engine_arguments(engine_of(launch))]
        # Seconds after which torch ends the others when one has died; by then rmtool has seen which one it was.
        command += ["--monitor_interval", "1"]
    # Autocast is the model's own (see model.py): with accelerate's on top there would be two.
    return [*command, "--mixed_precision", "no", "--module", "rmtool.training.worker", str(folder)]


def _engine_arguments(engine: str) -> list[str]:
    if engine == "ddp":
        return ["--multi_gpu"]
    initialized = "true" if engine == "zero3" else "false"  # whether weights are sharded while they are loaded
    return ["--use_deepspeed", "--zero_stage", engine[-1], "--zero3_init_flag", initialized,
            "--deepspeed_multinode_launcher", "standard"]  # fmt: skip


def _threads(processes: int) -> int:
    """The cores of this machine, shared out; the processes of one with GPUs use them to read data."""
    return max(1, len(os.sched_getaffinity(0)) // processes)
