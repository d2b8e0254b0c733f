"""Node count, rank and address from the environment.

In: the environment variables of Slurm, torchrun or Kubernetes. Out: a `LauncherEnv`; what they do not set is None, and
the recipe or the command line decides.
One command runs per node, and starts that node's processes itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rmtool.errors import RmtoolError


@dataclass(frozen=True)
class LauncherEnv:
    """Nodes of this run, this node's place among them, the first one's address; `told_by` names who said so."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    node_rank: int | None = None
    main_address: str | None = None
    main_port: int | None = None
    told_by: str = ""


def detect_launcher_env(variables: Mapping[str, str]) -> LauncherEnv:
    """What the environment says.

    Raises:
        RmtoolError: E0207 it starts several copies of this command on a node, or says what is no number.
    """
    if "SLURM_STEP_ID" in variables:  # srun's processes have it; a batch script itself, or salloc's shell, has not
        return _slurm(variables)
    return _torchrun(variables)


def _slurm(variables: Mapping[str, str]) -> LauncherEnv:
    nodes = _number(variables, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    tasks = _number(variables, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if nodes and tasks and tasks > nodes:
        what = f"Slurm starts {tasks} copies of this command on {nodes} node{'s' * (nodes > 1)}"
        raise RmtoolError("E0207", what, "start one per node: srun --ntasks-per-node=1 (rmtool starts the processes)")
    names = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_NODELIST") or ""
    return LauncherEnv(
        nodes,
        _gpus(variables),
        _number(variables, "SLURM_NODEID"),
        variables.get("MASTER_ADDR") or first_host(names) or None,
        _port(variables, "MASTER_PORT"),
        "Slurm",
    )


def _gpus(variables: Mapping[str, str]) -> int | None:
    """SLURM_GPUS_ON_NODE is a number; SLURM_GPUS_PER_NODE may say the kind too: h100:8."""
    if "SLURM_GPUS_ON_NODE" in variables:
        return _number(variables, "SLURM_GPUS_ON_NODE")
    kinds = variables.get("SLURM_GPUS_PER_NODE", "")
    counts = [int(count) for count in re.findall(r"(?:^|[:,])(\d+)(?=,|$)", kinds)]
    return sum(counts) or None


def _torchrun(variables: Mapping[str, str]) -> LauncherEnv:
    nested = "TORCHELASTIC_RUN_ID" in variables
    copies = _number(variables, "LOCAL_WORLD_SIZE")
    if nested and copies and copies > 1:
        what = f"torchrun starts {copies} copies of this command on a node"
        raise RmtoolError("E0207", what, "start one per node: --nproc-per-node 1 (rmtool starts the processes)")
    nodes = _number(variables, "NNODES", "PET_NNODES", *(["WORLD_SIZE"] if nested else []))
    rank = _number(variables, "NODE_RANK", "PET_NODE_RANK", "GROUP_RANK")
    port = _port(variables, "MASTER_PORT", "PET_MASTER_PORT")
    return LauncherEnv(
        nodes,
        None if nested else _number(variables, "NPROC_PER_NODE", "PET_NPROC_PER_NODE", "LOCAL_WORLD_SIZE"),
        rank,
        variables.get("MASTER_ADDR") or variables.get("PET_MASTER_ADDR"),
        port + 1 if port and nested else port,  # torchrun itself listens on its own
        "torchrun's variables" if nodes or rank else "",
    )


def refuse_ambiguous_world_size(site: LauncherEnv, variables: Mapping[str, str]) -> None:
    """Some launchers say how many processes there are, and not on how many nodes: nothing may be guessed from that.

    Raises:
        RmtoolError: E0207 $WORLD_SIZE is above 1, and `site` knows no nodes.
    """
    world = variables.get("WORLD_SIZE", "").strip()
    if site.nodes is None and world.isdecimal() and int(world) > 1:
        what = f"$WORLD_SIZE is {world}, and nothing says how many nodes that is"
        hint = (
            f"one copy per node: pass --nodes {world} --node-rank $RANK; else start one per node, or unset WORLD_SIZE"
        )
        raise RmtoolError("E0207", what, hint)


def _port(variables: Mapping[str, str], *names: str) -> int | None:
    port = _number(variables, *names)
    if port is not None and not 0 < port < 2**16:
        raise RmtoolError("E0207", f"${names[0]} is {port}, which is no port", "set it from 1 to 65535, or unset it")
    return port


def _number(variables: Mapping[str, str], *names: str) -> int | None:
    """The first of these variables that is set; torchrun's words for "as many as there are" are left to the recipe."""
    for name in names:
        text = variables.get(name, "").strip()
        if text in ("auto", "gpu", "cpu") and name.endswith("NPROC_PER_NODE"):
            continue
        if text and name.endswith("NNODES") and ":" in text:  # torchrun's least:most
            text = text.partition(":")[2]
        if text:
            if not text.isdecimal():
                raise RmtoolError("E0207", f"${name} is {text!r}, which is no number", f"set or unset {name}")
            return int(text)
    return None


def first_host(names: str) -> str:
    """The first of Slurm's compressed names: of `gpu[03-05,9],cpu1` it is `gpu03`."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])*", names)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", found.group()) if found else ""
