"""Runs that are asked to stop: what the launcher does with a signal, and complete runs stopped at many instants."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers import PROGRAM, free_port, logged_steps, started_by, until

from rmtool.errors import Stopped
from rmtool.launch.stop_request import REPEAT_S, StopRequest, hold_back_signals
from rmtool.launch.watch import Position
from rmtool.training.worker_status import Status, process_state


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def snapshot(folder: Path) -> Path:
    (folder / "snapshots/step-00000007").mkdir(parents=True)
    (folder / "snapshots/step-00000007/MANIFEST.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    """Python's own handler, also where a shell started the tests in the background, which then ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "resumes", "code"),
    [
        (signal.SIGTERM, False, 143),
        (signal.SIGUSR1, False, 143),
        (signal.SIGINT, False, 130),
        (signal.SIGTERM, True, 75),
        (signal.SIGUSR1, True, 75),
        (signal.SIGINT, True, 130),
    ],
)
def test_before_the_steps_a_signal_ends_the_command_at_once(
    number: signal.Signals, resumes: bool, code: int, tmp_path: Path
) -> None:
    with StopRequest() as request:
        request.at_once(snapshot(tmp_path) if resumes else tmp_path)
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), number)
        assert stopped.value.exit_code == code
        assert ("resumes" in str(stopped.value)) == resumes
        os.kill(os.getpid(), number)  # while it cleans up: not a second time


def test_an_incomplete_snapshot_cannot_be_resumed(tmp_path: Path) -> None:
    (snapshot(tmp_path) / "snapshots/step-00000007/MANIFEST.json").unlink()
    with StopRequest() as request:
        request.at_once(tmp_path)
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.exit_code == 143


def test_a_signal_while_the_recipe_is_read_waits_for_the_run_folder(tmp_path: Path) -> None:
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            request.at_once(snapshot(tmp_path))
        os.kill(os.getpid(), signal.SIGTERM)  # while it cleans up
    assert stopped.value.exit_code == 75


def test_a_signal_while_processes_run_is_only_recorded(tmp_path: Path) -> None:
    with StopRequest() as request:
        request.at_once(tmp_path)
        request.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.name == "SIGTERM"


def test_the_same_signal_to_the_process_and_to_its_group_is_one_request() -> None:
    clock = Clock()
    request = StopRequest(clock)
    request._receive(signal.SIGTERM, None)
    clock.now += REPEAT_S / 2
    request._receive(signal.SIGTERM, None)
    assert not request.again
    clock.now += REPEAT_S
    request._receive(signal.SIGINT, None)
    assert request.again
    assert request.stopped().exit_code == 143  # the first one decides


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGINT)
        assert request.name is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_rank_gets_the_signal_once_and_a_dead_one_does_not_matter() -> None:
    request = StopRequest()
    request._receive(signal.SIGUSR1, None)
    code = "import signal; print(signal.sigwait([signal.SIGUSR1]), flush=True); print(signal.sigtimedwait([10], 1))"
    rank = subprocess.Popen([sys.executable, "-c", code], preexec_fn=hold_back_signals, stdout=subprocess.PIPE)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    statuses = [Status(0, gone.pid, saves=True), Status(1, rank.pid, saves=True), Status(2, os.getpid(), exit=75)]
    request.pass_on(statuses)
    assert rank.stdout
    assert rank.stdout.readline().strip() == b"10"
    request.pass_on(statuses)
    assert rank.stdout.readline().strip() == b"None"
    rank.wait()


def test_the_time_limit_ends_a_start_up_that_takes_too_long(tmp_path: Path) -> None:
    clock = Clock()
    request = StopRequest(clock)
    request.limit(60)
    clock.now += 54
    assert not request.poll(may_wait=False)
    clock.now += 1.5
    assert not request.poll(may_wait=True)  # the ranks know it, too, and what they need for a save
    assert request.poll(may_wait=False)
    assert (request.name, request.stopped().exit_code) == ("time limit", 143)
    request._receive(signal.SIGTERM, None)  # Slurm's, at the same time
    assert not request.again


def test_a_process_that_holds_signals_back_ends_with_its_parent() -> None:
    code = (
        "import subprocess, time; from rmtool.launch.stop_request import hold_back_signals\n"
        "child = subprocess.Popen(['sleep', '60'], preexec_fn=hold_back_signals)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    until(lambda: process_state(child) in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD), 10)


def test_the_launcher_says_what_the_ranks_do_before_they_leave() -> None:
    position = Position()
    said = [position.last_actions()]
    for event in (
        {"say": "hello"},
        {"training": 1, "name": "debug", "total": 9, "past": []},
        {"step": 1, "numbers": {"step": 1}},
        {"start": 2, "label": "Evaluating", "total": 9, "unit": "rows"},
        {"advance": 2, "count": 4, "note": ""},
        {"end": 2},
        {"end": 1},
    ):
        position.line(json.dumps(event).encode())
        said.append(position.last_actions())
    saving, evaluating = ", then saving a snapshot", "abandoning the evaluation, then saving a snapshot"
    assert said == [
        f"finishing the step{saving}",
        f"finishing the step{saving}",
        f"finishing the step{saving}",
        f"finishing step 2{saving}",
        evaluating,
        evaluating,
        f"finishing step 2{saving}",
        "saving the checkpoint, which completes the run",
    ]


# --- complete runs


START_S = 300  # to the first step, on a loaded machine
STEP_S = 5  # and a save, on a loaded machine


class Run:
    """`rmtool train` in a folder, and every process that it started."""

    def __init__(self, folder: Path, *settings: str, processes: int = 1):
        self.folder, self.output = folder, folder / "runs/debug"
        command = [PROGRAM, "train", "--gpus-per-node", str(processes), *settings]
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # of a test that failed: what it started ends with it
        self.process.wait()

    def started(self) -> list[psutil.Process]:
        return started_by(self.process.pid)

    def steps(self) -> int:
        return logged_steps(self.output)

    def status(self, rank: int) -> dict[str, object]:
        path = self.output / f"rank-{rank}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def saved(self) -> list[int]:
        return sorted(int(path.parent.name[5:]) for path in self.output.glob("snapshots/step-*/MANIFEST.json"))

    def end(self, code: int | tuple[int, ...], seconds: float = 60) -> str:
        """Wait for the end; return stderr. No process may be left."""
        said = self.process.communicate(timeout=seconds)[1]
        until(lambda: not self.started(), 10)
        assert self.process.returncode in (code if isinstance(code, tuple) else (code,)), said
        assert "Traceback" not in said
        return said


LONG = ("--recipe", "debug", "--set", "train.epochs=100")
OFTEN = (*LONG, "--set", "train.eval_every=1")


def in_step(run: Run) -> bool:
    return run.steps() >= 2


def evaluating(run: Run) -> bool:
    """`step` is complete, and its metrics are not yet written: it is being evaluated."""
    return run.steps() >= 1 and bool(run.status(0).get("saves"))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "engine"), [(1, "auto"), (2, "auto"), (2, "zero3")])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_run_saves_after_the_step(
    number: signal.Signals, code: int, processes: int, engine: str, tmp_path: Path
) -> None:
    with Run(tmp_path, *LONG, "--set", f"launch.engine={engine}", processes=processes) as run:
        until(lambda: in_step(run), START_S)
        run.process.send_signal(number)
        said = run.end(code)
        [step] = run.saved()
        assert step == run.steps()
        shown = re.search(rf"{number.name}: finishing step (\d+), then saving a snapshot \(send it again", said)
        assert shown
        assert step - 1 <= int(shown[1]) <= step + 1  # the launcher hears of a step a moment after it is complete
        assert f"stopped at step {step} of 6500 ({number.name}); the same command resumes" in said


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_all_processes_at_once_is_as_one_to_the_launcher(processes: int, tmp_path: Path) -> None:
    """Some of Slurm's plugins signal every process of a step: `accelerate launch` and torchrun must survive it."""
    with Run(tmp_path, *LONG, processes=processes) as run:
        until(lambda: in_step(run), START_S)
        for process in [psutil.Process(run.process.pid), *run.started()]:
            process.send_signal(signal.SIGUSR1)
        run.end(75)
        assert run.saved() == [run.steps()]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all(rank: int, tmp_path: Path) -> None:
    with Run(tmp_path, *LONG, processes=2) as run:
        until(lambda: in_step(run), START_S)
        os.kill(int(str(run.status(rank)["pid"])), signal.SIGTERM)
        assert "(SIGTERM); the same command resumes" in run.end(75)
        assert run.saved() == [run.steps()]
        assert [run.status(each)["exit"] for each in (0, 1)] == [75, 75]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_an_evaluation_is_abandoned_and_pending(processes: int, tmp_path: Path) -> None:
    """Steps of two pairs, and 2,000 held out in small packs: an evaluation takes seconds, a step a hundredth of one."""
    small = ("train.batch_size=2", "train.tokens_per_pack=200", "data.holdout=2000")
    with Run(tmp_path, *OFTEN, *(word for each in small for word in ("--set", each)), processes=processes) as run:
        until(lambda: evaluating(run), START_S)
        time.sleep(1)
        run.process.send_signal(signal.SIGTERM)
        said = run.end(75)
        [step] = run.saved()
        progress = json.loads((run.output / f"snapshots/step-{step:08}/progress.json").read_text())["progress"]
        pending = progress["pending"]
        assert "SIGTERM: abandoning the evaluation, then saving a snapshot" in said
        assert pending["step"] == step
        assert not any(name.startswith("eval/") for name in pending)
        assert run.steps() == step - 1  # its metrics are complete after the evaluation


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
def test_a_signal_to_one_of_two_nodes_saves_one_snapshot_that_both_resume(node: int, tmp_path: Path) -> None:
    """Two launchers on one host; both commands run again go on together."""
    step = 0
    for again in (False, True):
        nodes = (*LONG, "--nodes", "2", "--main-address", "127.0.0.1", "--main-port", str(free_port()))
        with (
            Run(tmp_path, *nodes, "--node-rank", "0") as first,
            Run(tmp_path, *nodes, "--node-rank", "1") as second,
        ):
            until(lambda: first.steps() >= step + 2, START_S)  # noqa: B023 - called in this turn
            (first, second)[node].process.send_signal(signal.SIGTERM)
            said = first.end(75)
            second.end(75)
        assert (f"resuming from step {step} of 6500" in said) == again
        step = first.steps()
        assert max(first.saved()) == step
        assert f"stopped at step {step} of 6500 (SIGTERM); the same command resumes" in said
        assert len(first.saved()) == 1 + again  # the last two are kept


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with Run(tmp_path, *LONG, processes=2) as run:
        until(lambda: in_step(run), START_S)
        stuck = psutil.Process(int(str(run.status(1)["pid"])))
        stuck.suspend()  # the first one cannot be answered
        run.process.send_signal(signal.SIGTERM)
        time.sleep(2 * REPEAT_S)
        assert run.process.poll() is None
        run.process.send_signal(signal.SIGTERM)
        assert "SIGTERM: stopped" in run.end(143, 15)
        assert run.saved() == []


@pytest.mark.slow
def test_a_run_stops_before_its_time_limit(tmp_path: Path) -> None:
    limit, started = 45, time.monotonic()
    with Run(tmp_path, *LONG, "--time-limit", f"{limit}s") as run:
        said = run.end(75, 120)
        assert time.monotonic() - started < limit + 2  # and the processes are gone
        assert "(time limit); the same command resumes" in said
        assert run.saved() == [run.steps()]


def random_cases() -> list[tuple[float, int, signal.Signals]]:
    """Seconds from the start, 1 or 2 processes, and a signal; RMTOOL_INSTANTS says how many."""
    rng = random.Random(15)
    count = int(os.environ.get("RMTOOL_INSTANTS", "4"))
    return [
        (rng.uniform(0.3, 20), rng.choice((1, 1, 2)), rng.choice((signal.SIGTERM, signal.SIGUSR1)))
        for _ in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "processes", "number"), random_cases())
def test_a_run_that_is_stopped_at_any_time_ends_in_time(
    seconds: float, processes: int, number: signal.Signals, tmp_path: Path
) -> None:
    """75 with a snapshot, 143 before there can be one: in import, reading, start-up, steps, evaluations and saves."""
    with Run(tmp_path, *OFTEN, "--set", "train.save_every=2", processes=processes) as run:
        time.sleep(seconds)
        at = run.steps()
        could_save = all(run.status(rank).get("saves") for rank in range(processes))
        run.process.send_signal(number)
        sent = time.monotonic()
        run.end((75, 143, -number), 60)
        took = time.monotonic() - sent
        if run.process.returncode == 75:
            assert at <= max(run.saved()) <= at + 2
            assert took < 10 + STEP_S
        else:
            assert not could_save
            assert run.saved() == []
