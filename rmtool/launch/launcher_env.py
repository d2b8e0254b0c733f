"""Node count, rank and address from the environment.

In: environment variables of Slurm, torchrun or Kubernetes. Out: a `LauncherEnv`; a field is None if no variable sets
it, and the recipe or the command line decides.
rmtool runs once per node and starts that node's processes itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rmtool.errors import RmtoolError


@dataclass(frozen=True)
class LauncherEnv:
    """Number of nodes, rank of this node and address of node 0, where the environment sets them."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    node_rank: int | None = None
    main_address: str | None = None
    main_port: int | None = None
    source: str = ""  # what set them, for messages: "Slurm" or "torchrun variables"


def detect_launcher_env(variables: Mapping[str, str]) -> LauncherEnv:
    """Read the node layout from environment variables.

    Raises:
        RmtoolError: E0207 when the launcher runs this command more than once per node, or a variable is invalid.
    """
    if "SLURM_STEP_ID" in variables:  # set by srun; a batch script or the shell of salloc does not have it
        return _slurm(variables)
    return _torchrun(variables)


def _slurm(variables: Mapping[str, str]) -> LauncherEnv:
    nodes = _integer(variables, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    tasks = _integer(variables, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if nodes and tasks and tasks > nodes:
        what = f"Slurm runs {tasks} tasks on {nodes} node{'s' * (nodes > 1)}, but rmtool must run once per node"
        raise RmtoolError("E0207", what, "pass --ntasks-per-node=1 to srun; rmtool starts one process per GPU")
    names = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_NODELIST") or ""
    return LauncherEnv(
        nodes,
        _slurm_gpus(variables),
        _integer(variables, "SLURM_NODEID"),
        variables.get("MASTER_ADDR") or first_host(names) or None,
        _port(variables, "MASTER_PORT"),
        "Slurm",
    )


def _slurm_gpus(variables: Mapping[str, str]) -> int | None:
    """SLURM_GPUS_ON_NODE is a number; SLURM_GPUS_PER_NODE can name the type too: h100:8."""
    if "SLURM_GPUS_ON_NODE" in variables:
        return _integer(variables, "SLURM_GPUS_ON_NODE")
    counts = re.findall(r"(?:^|[:,])(\d+)(?=,|$)", variables.get("SLURM_GPUS_PER_NODE", ""))
    return sum(map(int, counts)) or None


def _torchrun(variables: Mapping[str, str]) -> LauncherEnv:
    nested = "TORCHELASTIC_RUN_ID" in variables  # torchrun itself started this command
    copies = _integer(variables, "LOCAL_WORLD_SIZE")
    if nested and copies and copies > 1:
        what = f"torchrun runs this command {copies} times on a node, but rmtool must run once per node"
        raise RmtoolError("E0207", what, "pass --nproc-per-node 1 to torchrun; rmtool starts one process per GPU")
    nodes = _integer(variables, "NNODES", "PET_NNODES", *(["WORLD_SIZE"] if nested else []))
    rank = _integer(variables, "NODE_RANK", "PET_NODE_RANK", "GROUP_RANK")
    port = _port(variables, "MASTER_PORT", "PET_MASTER_PORT")
    return LauncherEnv(
        nodes,
        None if nested else _integer(variables, "NPROC_PER_NODE", "PET_NPROC_PER_NODE", "LOCAL_WORLD_SIZE"),
        rank,
        variables.get("MASTER_ADDR") or variables.get("PET_MASTER_ADDR"),
        port + 1 if port and nested else port,  # torchrun itself listens on its port
        "torchrun variables" if nodes or rank else "",
    )


def refuse_ambiguous_world_size(env: LauncherEnv, variables: Mapping[str, str]) -> None:
    """Refuse a WORLD_SIZE without a node count: some launchers set it per process, others per node.

    Raises:
        RmtoolError: E0207 when WORLD_SIZE is above 1 and `env` has no node count.
    """
    world_size = variables.get("WORLD_SIZE", "").strip()
    if env.nodes is None and world_size.isdecimal() and int(world_size) > 1:
        what = f"WORLD_SIZE is {world_size}, but the number of nodes is not set"
        hint = f"if there is one process per node, pass --nodes {world_size} --node-rank $RANK; else unset WORLD_SIZE"
        raise RmtoolError("E0207", what, hint)


def _port(variables: Mapping[str, str], *names: str) -> int | None:
    port = _integer(variables, *names)
    if port is not None and not 0 < port < 2**16:
        name = next(name for name in names if variables.get(name, "").strip())
        hint = f"set {name} to a free port on node 0, or unset it"
        raise RmtoolError("E0207", f"{name} must be a port from 1 to 65535", hint, found=str(port))
    return port


def _integer(variables: Mapping[str, str], *names: str) -> int | None:
    """The first of these variables that is set; None for torchrun's "auto", which leaves the number to the recipe."""
    for name in names:
        text = variables.get(name, "").strip()
        if text in ("auto", "gpu", "cpu") and name.endswith("NPROC_PER_NODE"):
            continue
        if name.endswith("NNODES"):  # torchrun's MIN:MAX
            text = text.rpartition(":")[2]
        if text:
            if not text.isdecimal():
                raise RmtoolError("E0207", f"{name} must be an integer", f"fix or unset {name}", found=text)
            return int(text)
    return None


def first_host(names: str) -> str:
    """The first host in Slurm's compressed list: `gpu03` for `gpu[03-05,9],cpu1`."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])*", names)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", found.group()) if found else ""
