"""Node layout from Slurm's and torchrun's variables, and the scripts that set them."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from rmtool.errors import RmtoolError
from rmtool.launch.launcher_env import LauncherEnv, detect_launcher_env, first_host

STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "1",
        "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_GPUS_ON_NODE": "8"}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "env"),
    [
        ({}, LauncherEnv()),
        (STEP, LauncherEnv(2, 8, 1, "gpu03", None, "Slurm")),
        (STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}, LauncherEnv(2, 8, 1, "10.0.0.1", 7, "Slurm")),
        # The shell of a batch script is not a step; its command runs on one node.
        ({name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"}, LauncherEnv()),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "NPROC_PER_NODE": "4"},
         LauncherEnv(2, 4, 0, "a", None, "torchrun variables")),
        ({"PET_NNODES": "2:4", "PET_NODE_RANK": "3", "PET_NPROC_PER_NODE": "8", "MASTER_ADDR": "a"},
         LauncherEnv(4, 8, 3, "a", None, "torchrun variables")),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "auto", "MASTER_ADDR": "a"},
         LauncherEnv(2, None, 1, "a", None, "torchrun variables")),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "1", "RANK": "1",
          "MASTER_ADDR": "a", "MASTER_PORT": "29500"}, LauncherEnv(2, None, 1, "a", 29501, "torchrun variables")),
    ],
)  # fmt: skip
def test_the_node_layout_comes_from_the_variables(variables: dict[str, str], env: LauncherEnv) -> None:
    assert detect_launcher_env(variables) == env


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (STEP | {"SLURM_STEP_NUM_TASKS": "16"}, "--ntasks-per-node=1"),
        (STEP | {"SLURM_NODEID": "one"}, "SLURM_NODEID must be an integer"),
        (STEP | {"MASTER_PORT": "0"}, "MASTER_PORT must be a port from 1 to 65535"),
        ({"PET_MASTER_PORT": "70000"}, "PET_MASTER_PORT must be a port from 1 to 65535"),
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "8"}, "--nproc-per-node 1"),
    ],
)
def test_too_many_processes_and_invalid_numbers_are_refused(variables: dict[str, str], words: str) -> None:
    with pytest.raises(RmtoolError) as caught:
        detect_launcher_env(variables)
    assert caught.value.id == "E0207"
    assert words in caught.value.what + caught.value.hint


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("gpu03", "gpu03"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("a,b", "a"),
        ("rack1-gpu[1,3]-ib", "rack1-gpu1-ib"),
        ("rack[1-2]gpu[3-4],x", "rack1gpu3"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(names: str, first: str) -> None:
    assert first_host(names) == first


def test_a_world_size_without_a_node_count_is_refused(rmtool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod or an MPI launcher sets the rank of 4 processes, but not how many run on a node."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "7"}.items():
        monkeypatch.setenv(name, value)
    shown = rmtool("train", "--dry-run")
    assert shown.code == 2
    assert shown.error == "E0207"
    assert "WORLD_SIZE is 4, but the number of nodes is not set" in shown.err
    assert "--nodes 4 --node-rank $RANK" in shown.err
    commands = launch_commands(["train", "--recipe", "tulu3-8b", "--nodes", "4", "--node-rank", "1"], rmtool)
    assert {(each.num_machines, each.main_process_ip, each.main_process_port) for each in commands} == {(4, "a", 7)}


def test_a_node_rank_out_of_range_names_its_source(rmtool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    shown = rmtool("train", "--nodes", "1", "--dry-run")
    assert shown.code == 2
    assert "node rank 1 (from Slurm) is out of range for 1 nodes" in shown.err


def commands_of(script: str, tmp_path: Path, *, environment: dict[str, str], code: int = 0) -> list[list[str]]:
    """The commands a script runs; `srun`, `rmtool` and `scontrol` are programs that write down their arguments.

    `srun` exits with `code`, which must be the script's, too.
    """
    log = tmp_path / "commands"
    for name in ("srun", "rmtool", "scontrol"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {log}\nexit {code if name == "srun" else 0}\n')
        program.chmod(0o755)
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    shown = subprocess.run(["bash", ROOT / script], env={"PATH": path, **environment}, cwd=tmp_path)
    assert shown.returncode == code
    return [shlex.split(line) for line in log.read_text().splitlines()]


def launch_commands(arguments: list[str], rmtool: Any) -> list[Any]:
    """The parsed launch commands of every node that `rmtool ARGUMENTS --dry-run` prints."""
    from accelerate.commands.launch import launch_command_parser

    shown = rmtool(*arguments, "--dry-run")
    assert shown.code == 0, shown.err
    lines = re.findall(r"^# node \d+: .*\n(.+)$", shown.out, re.MULTILINE)
    return [launch_command_parser().parse_args(shlex.split(line)[3:]) for line in lines]


def test_the_slurm_script_leads_to_64_processes(tmp_path: Path, rmtool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    [command] = commands_of("scripts/train/tulu3_8b.sbatch", tmp_path, environment={"SLURM_CPUS_ON_NODE": "96"})
    assert command[:2] == ["srun", "--cpus-per-task=96"]
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", (ROOT / "scripts/train/tulu3_8b.sbatch").read_text(), re.M))
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("8", "1", "8")
    step = STEP | {"SLURM_STEP_NUM_NODES": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NODEID": "5"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    check_64(launch_commands(command[command.index("rmtool") + 1 :], rmtool), "gpu03")


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (8, False), (75, True), (130, False), (143, False)])
def test_the_slurm_script_requeues_itself_after_75_only(code: int, requeued: bool, tmp_path: Path) -> None:
    environment = {"SLURM_JOB_ID": "17", "SLURM_CPUS_ON_NODE": "96"}
    _, *after = commands_of("scripts/train/tulu3_8b.sbatch", tmp_path, environment=environment, code=code)
    assert after == ([["scontrol", "requeue", "17"]] if requeued else [])


def test_slurm_warns_only_the_steps_of_a_job_that_may_be_requeued() -> None:
    """A signal to the batch shell would end it before it could requeue the job. The nodes that are still leaving when
    the first one has left get the time to, and the log goes on.
    """
    text = (ROOT / "scripts/train/tulu3_8b.sbatch").read_text()
    assert re.search(r"^srun .*--kill-on-bad-exit=0 --wait=900 rmtool train ", text, re.MULTILINE)
    assert re.search(r"^#SBATCH --open-mode=append$", text, re.MULTILINE)
    assert re.search(r"^#SBATCH --signal=USR1@\d+$", text, re.MULTILINE)
    assert re.search(r"^#SBATCH --requeue$", text, re.MULTILINE)


def test_the_shell_script_leads_to_64_processes(tmp_path: Path, rmtool: Any) -> None:
    environment = {"NODE_RANK": "5", "MASTER_ADDR": "10.0.0.1"}
    [command] = commands_of("scripts/train/tulu3_8b.sh", tmp_path, environment=environment)
    assert command[0] == "rmtool"
    check_64(launch_commands(command[1:], rmtool), "10.0.0.1")


def check_64(commands: list[Any], address: str) -> None:
    assert [command.machine_rank for command in commands] == list(range(8))
    for command in commands:
        assert (command.num_machines, command.num_processes) == (8, 64)
        assert (command.main_process_ip, command.main_process_port) == (address, 29500)
        assert (command.multi_gpu, command.training_script) == (True, "rmtool.training.worker")
