"""Plan of a run: pairs, steps, processes, and the `accelerate launch` command of every node.

In: a recipe and a run folder. Out: a `Plan`; no process is started.
Cost: local data files are parsed once, into the cache; their mistakes show before any large library is imported.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmtool.config import Recipe, Source, TrainConfig
from rmtool.data.arrow_rows import require_datasets
from rmtool.data.rejects import Rejects
from rmtool.data.rows import is_hub_source
from rmtool.data.sources import SourceCount, draw_share, load_source
from rmtool.dataset.batches import count_pairs
from rmtool.dataset.split import none_held_out, resolve_sources, row_options
from rmtool.errors import RmtoolError
from rmtool.packages import require_packages
from rmtool.recipe import as_source, engine_of, recipe_hash, world_size
from rmtool.training.schedule import UNKNOWN, Schedule, require_reachable, schedule_rows
from rmtool.training.tracking import describe_tracking
from rmtool.ui import SilentUi, Ui

# accelerate reads what a command leaves out from a file in the user's home, unless it is given another one.
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
WORKER = "rmtool.training.worker"  # the module of a training process
ADDRESS = "$MASTER_ADDR"  # in place of the address of node 0, if it is not set
PORT = 29500


@dataclass(frozen=True)
class Plan:
    """What will run; computed from the recipe and the data, never written back. `pairs` is None for Hub datasets."""

    recipe: Recipe
    output: Path
    world_size: int
    pairs: int | None
    schedule: Schedule | None
    commands: tuple[str, ...]  # one per node
    node: int = 0  # the rank of this node
    launcher: str = ""  # which launcher's variables set the number of nodes, if not the recipe
    sources: tuple[SourceCount | None, ...] = ()  # of the training data, then of the eval data; None on the Hub

    @property
    def steps(self) -> int | None:
        return self.schedule.steps if self.schedule else None

    @property
    def folder(self) -> Path:
        """The folder of this node's config and logs; that of node 0 is the run folder."""
        return node_folder(self.output, self.node)

    def rows(self) -> list[tuple[str, str]]:
        """(label, value) for a table."""
        return [*self._data_rows(), *self._process_rows(), *self._training_rows(), *self._output_rows()]

    def _data_rows(self) -> list[tuple[str, str]]:
        recipe, data = self.recipe, self.recipe.data
        trainable = f"LoRA rank {recipe.lora.rank} and score head" if recipe.lora.rank else "all"
        trainable = "score head only" if recipe.train.freeze == "backbone" else trainable
        held_out = f"{_amount(data.holdout)} held out from the training data" if data.holdout else ""
        every = f"every {recipe.train.eval_every} steps and " if recipe.train.eval_every else ""
        return [
            ("recipe", f"{recipe.name} (config hash {recipe_hash(recipe)})"),
            ("base model", f"{recipe.model.path} ({recipe.model.weights} weights)"),
            ("trainable parameters", trainable),
            ("training data", ", ".join(map(_describe_source, data.train))),
            ("training pairs", UNKNOWN if self.pairs is None else f"{self.pairs:,}"),
            ("eval data", ", ".join(map(_describe_source, data.eval)) or held_out or "none"),
            ("evaluation", f"{every}at the end" if data.eval or data.holdout else "off"),
            ("max length", f"{data.max_length:,} tokens (longer: {data.on_long})"),
        ]

    def _process_rows(self) -> list[tuple[str, str]]:
        train, launch = self.recipe.train, self.recipe.launch
        nodes = f"{launch.nodes} node{'s' * (launch.nodes > 1)}"
        processes = f"{launch.gpus_per_node} process{'es' * (launch.gpus_per_node > 1)}"
        source = f", from {self.launcher}" if self.launcher else ""
        return [
            ("processes", f"{self.world_size} ({nodes} x {processes}{source})"),
            ("engine", engine_of(launch)),
            ("precision", train.precision + _precision_tip(train.precision)),
            ("global batch size", f"{train.batch_size:,} pairs ({train.batch_size / self.world_size:g} per process)"),
            ("max tokens per pack", f"{train.tokens_per_pack:,} (unique tokens per forward pass)"),
        ]

    def _training_rows(self) -> list[tuple[str, str]]:
        train = self.recipe.train
        steps = schedule_rows(self.recipe, self.schedule)
        smoothing = f", label smoothing {train.label_smoothing:g}" if train.label_smoothing else ""
        coefficient = train.center_rewards_coefficient
        centering = f", centering {coefficient:g} * (r_chosen + r_rejected)^2" if coefficient else ""
        betas = " and ".join(f"{beta:g}" for beta in train.betas)
        clipping = f"max norm {train.max_grad_norm:g}" if train.max_grad_norm else "off"
        return [
            *steps,
            ("loss", f"{train.loss}{smoothing}{centering}"),
            ("optimizer", f"AdamW, betas {betas}, eps {train.eps:g}, weight decay {train.weight_decay:g}"),
            ("gradient clipping", clipping),
            ("gradient checkpointing", "on" if train.gradient_checkpointing else "off"),
            ("seed", str(train.seed)),
        ]

    def _output_rows(self) -> list[tuple[str, str]]:
        recipe, train = self.recipe, self.recipe.train
        step = "last step" if train.keep == "last" else f"best eval {train.metric_for_best}"
        rows = [("checkpoint", f"{self.output / 'model'} ({step}, {train.save_dtype})")]
        if train.early_stopping_patience:
            rows.append(("early stopping", f"after {train.early_stopping_patience} evaluations without improvement"))
        rows.append(("snapshots", _describe_snapshots(train)))
        if recipe.hub.repo_id:
            rows.append(("push to", recipe.hub.repo_id))
        return [*rows, ("tracking", describe_tracking(recipe.track, self.output))]

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "recipe_hash": recipe_hash(self.recipe),
            "world_size": self.world_size,
            "pairs": self.pairs,
            "steps": self.steps,
            **(self.schedule.as_dict() if self.schedule else {}),
            "batch_size": self.recipe.train.batch_size,
            "commands": list(self.commands),
        }


def make_plan(recipe: Recipe, output: Path, node: int = 0, launcher: str = "", ui: Ui | None = None) -> Plan:
    """Load the local data, and plan the run.

    Raises:
        RmtoolError: E0207 the node rank is out of range, E0209 a setting that the steps cannot reach, E02xx and E03xx
            as loading does, E0302 nothing is left to train on, E0308 nothing is held out, E0507 a package is missing.
    """
    require_packages(recipe)
    launch, train, holdout = recipe.launch, recipe.train, recipe.data.holdout
    if node >= launch.nodes:
        hint = f"set --node-rank to 0 to {launch.nodes - 1}, or set --nodes"
        raise RmtoolError("E0207", f"node rank {node} is out of range for {launch.nodes} nodes", hint)
    schedule, (pairs, sources) = None, _count_training_pairs(recipe, ui or SilentUi())
    if pairs is not None:
        held_out = holdout if isinstance(holdout, int) else int(holdout * pairs)
        if held_out >= pairs:
            hint = f"set data.holdout below {pairs}"
            raise RmtoolError("E0302", f"cannot hold out {held_out:,} of {pairs:,} pairs", hint)
        if holdout and not held_out:
            raise none_held_out(holdout, pairs)
        pairs -= held_out
        schedule = Schedule(recipe, pairs)
    known = schedule.steps if schedule else train.max_steps  # of a Hub dataset, the most
    if known:
        require_reachable(train, known)
    commands = tuple(_shell_line(launch_command(recipe, output, number)) for number in range(launch.nodes))
    return Plan(recipe, output, world_size(launch), pairs, schedule, commands, node, launcher, sources)


def node_folder(output: Path, node: int) -> Path:
    return output / f"node-{node}" if node else output


def _shell_line(command: list[str]) -> str:
    """The command as one line to paste; $MASTER_ADDR is left to the shell."""
    return " ".join(part if part == ADDRESS else shlex.quote(part) for part in command)


def _describe_source(item: str | Source) -> str:
    source = as_source(item)
    share = f"{source.rows:,} rows of " if source.rows else f"{source.fraction:g} of " if source.fraction else ""
    return share + source.path


def _describe_snapshots(train: TrainConfig) -> str:
    every = [f"every {train.save_every:,} steps"] if train.save_every else []
    every += [f"every {train.save_minutes:g} minutes"] if train.save_minutes else []
    deleted = ", deleted when the run is finished" if train.delete_snapshots else ""
    return f"{' and '.join(every)} (the last {train.keep_snapshots} are kept{deleted})" if every else "off"


def _amount(holdout: int | float) -> str:
    return f"{holdout:,} pairs" if isinstance(holdout, int) else f"{holdout:.3g} of the pairs"


def _precision_tip(precision: str) -> str:
    """A remark if this machine is much faster in bf16, or cannot compute in `precision`."""
    from rmtool.model.precision import compute_precision, fast_bf16_device  # imports torch

    if precision != "fp32":
        used = compute_precision(precision)
        return "" if used == precision else f" (not supported by this CPU: computed in {used})"
    device = fast_bf16_device()
    return f" (bf16 is several times faster on {device}: --set train.precision=bf16)" if device else ""


def _count_training_pairs(recipe: Recipe, ui: Ui) -> tuple[int | None, tuple[SourceCount | None, ...]]:
    """Count the pairs before any is held out, None if a source is on the Hub; return what each source has, too.

    Local sources are parsed here already, into the cache: a mistake shows before the large libraries are imported.

    Raises:
        RmtoolError: E03xx as loading does; invalid rows are skipped if the recipe skips them.
    """
    data = recipe.data
    with Rejects(Path(os.devnull) if data.on_bad_row == "skip" else None) as rejects:
        train, held_out = (
            [
                _count_source(source, number, recipe, rejects, ui)
                for number, source in enumerate(resolve_sources(sources))
            ]
            for sources in (data.train, data.eval)
        )
        rejects.raise_if_any()
    counts = [pairs for pairs, _ in train]
    sources = tuple(source for _, source in (*train, *held_out))
    return None if None in counts else sum(pairs or 0 for pairs in counts), sources


def _count_source(
    source: Source, number: int, recipe: Recipe, rejects: Rejects, ui: Ui
) -> tuple[int | None, SourceCount | None]:
    if is_hub_source(source.path):
        require_datasets(source.path)
        return None, None
    with ui.progress(f"Reading {Path(source.path).name}", None, "rows") as bar:
        loaded = load_source(
            *(source.path, row_options(recipe.data), rejects, bar.advance, ui.say), use_cache=recipe.data.cache
        )
    metadata = loaded.metadata
    drawn = draw_share(source, len(metadata), recipe.train.seed, number)
    loaded.count.taken = len(drawn)
    return count_pairs(metadata[index] for index in drawn), loaded.count


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
        # On one node 0, any free port, so that two runs do not meet.
        port = launch.main_port or (PORT if launch.nodes > 1 else 0)
        command += ["--main_process_port", str(port), *_engine_arguments(engine_of(launch))]
        # Seconds until torch ends the other processes when one died; by then rmtool has seen which one it was.
        command += ["--monitor_interval", "1"]
    # RewardModel applies autocast itself; accelerate would add a second one.
    return [*command, "--mixed_precision", "no", "--module", WORKER, str(folder)]


def _engine_arguments(engine: str) -> list[str]:
    if engine in ("ddp", "fsdp2"):  # which of them, the worker finds in the recipe
        return ["--multi_gpu"]
    initialized = "true" if engine == "zero3" else "false"  # whether weights are sharded while they are loaded
    return ["--use_deepspeed", "--zero_stage", engine[-1], "--zero3_init_flag", initialized,
            "--deepspeed_multinode_launcher", "standard"]  # fmt: skip


def _threads(processes: int) -> int:
    """The cores per process of this node; with GPUs, processes use them to tokenize."""
    return max(1, len(os.sched_getaffinity(0)) // processes)
