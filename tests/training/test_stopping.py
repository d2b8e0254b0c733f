"""Requests to stop: signals and the time limit, and that ranks agree on them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import pair_rows, write_jsonl

from rmtool.errors import ExitCode, Stopped
from rmtool.launch.stop_request import hold_back_signals
from rmtool.recipe import load_recipe
from rmtool.training import stopping, worker
from rmtool.training.stopping import Stopping, deadline_of
from rmtool.training.worker_status import DEADLINE, STOP_SIGNALS, read_status
from rmtool.ui import SilentUi


class Ranks:
    """A collective sum between threads, one per rank: it returns when all ranks have called it."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size, timeout=10)
        self.values: list[torch.Tensor] = []
        self.calls = 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.values.append(values)
        if self.barrier.wait() == 0:
            self.calls += 1
        total = sum(self.values, torch.zeros_like(values))
        if self.barrier.wait() == 0:
            self.values.clear()
        self.barrier.wait()
        return total


def together(ranks: Sequence[Stopping], steps: int) -> list[list[bool]]:
    """The answers of every rank in `steps` steps; a rank ends with the step after which it is to stop."""
    answers: list[list[bool]] = [[] for _ in ranks]

    def run(rank: int) -> None:
        for _ in range(steps):
            answers[rank].append(ranks[rank].requested())
            if answers[rank][-1]:
                return

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return answers


def saved(*_: object) -> None:
    pass


def single(deadline: float | None = None, now: float = 0.0) -> Stopping:
    return Stopping(lambda values: values, saved, deadline, lambda: now)


@pytest.mark.parametrize("receiver", [0, 1, 2])
def test_a_rank_that_gets_the_signal_alone_does_not_leave_alone(receiver: int) -> None:
    group = Ranks(3)
    ranks = [Stopping(group.sum, saved) for _ in range(3)]
    ranks[receiver]._receive(signal.SIGTERM, None)
    assert together(ranks, 4) == [[True]] * 3
    assert {rank.reason for rank in ranks} == {"SIGTERM"}


def test_without_a_request_ranks_go_on_with_one_sum_per_step() -> None:
    group = Ranks(2)
    assert together([Stopping(group.sum, saved) for _ in range(2)], 5) == [[False] * 5] * 2
    assert group.calls == 5


def test_ranks_with_different_signals_agree_on_one_exit_code() -> None:
    group = Ranks(2)
    ranks = [Stopping(group.sum, saved) for _ in range(2)]
    ranks[0]._receive(signal.SIGUSR1, None)
    ranks[1]._receive(signal.SIGINT, None)
    together(ranks, 1)
    for rank in ranks:
        with pytest.raises(Stopped) as stopped:
            rank.leave(3, 9)
        assert stopped.value.exit_code == ExitCode.INTERRUPTED


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)], ids=lambda each: str(each)
)
def test_a_signal_saves_and_tells_how_to_go_on(number: signal.Signals, code: int) -> None:
    calls = []
    asked = Stopping(lambda values: values, lambda step, pending: calls.append((step, pending)))
    with asked:
        assert not asked.requested()
        os.kill(os.getpid(), number)
        assert asked.requested()
    with pytest.raises(Stopped) as stopped:
        asked.leave(12, 126, {"loss": 1.0})
    assert stopped.value.exit_code == code
    assert calls == [(12, {"loss": 1.0})]
    assert str(stopped.value) == f"stopped at step 12 of 126 ({number.name}); the same command resumes"


EARLY = """
import os, signal
os.kill(os.getpid(), signal.SIGTERM)
from rmtool.training.stopping import Stopping
with Stopping(lambda values: values, lambda *_: None) as asked:
    print(asked.requested(), asked.reason)
os.kill(os.getpid(), signal.SIGTERM)  # held back again, while it leaves
"""


def test_a_signal_before_the_handlers_are_there_is_received_later() -> None:
    """The launcher starts a rank so; the signal arrives while the rank imports its libraries."""
    command = [sys.executable, "-c", EARLY]
    shown = subprocess.run(command, preexec_fn=hold_back_signals, capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (0, "True SIGTERM\n"), shown.stderr


def test_a_signal_during_the_sum_counts_in_the_next_step() -> None:
    """The answer of a step is what was known before its sum: else this rank would leave, and the others wait."""

    def interrupted(values: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return values

    with Stopping(interrupted, saved) as asked:
        assert not asked.requested()
        assert asked.requested()


def test_handlers_are_those_from_before_at_the_end() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with single():
        pass
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


@pytest.mark.parametrize(
    ("now", "step", "save", "stops"),
    [
        (889.9, 0, 0, False),
        (990, 0, 0, True),
        (982, 0, 0, False),
        (982, 8, 0, True),
        (981, 8, 0, False),
        (981, 0, 4.5, True),
        (980.9, 0, 4.5, False),
        (2000, 0, 0, True),
    ],
)
def test_the_time_limit_leaves_room_for_two_saves_a_step_and_ten_seconds(
    now: float, step: float, save: float, stops: bool
) -> None:
    asked = single(1000.0, now)
    asked.step_seconds, asked.save_seconds = step, save
    assert asked.requested() == stops
    assert asked.reason == ("time limit" if stops else None)
    if stops:
        with pytest.raises(Stopped) as stopped:
            asked.leave(1, 2)
        assert stopped.value.exit_code == 75


def test_without_a_time_limit_the_clock_does_not_matter() -> None:
    assert not single(None, 1e12).requested()


def test_the_wall_clock_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may jump by an hour."""
    asked = Stopping(lambda values: values, saved, time.monotonic() + 100)
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert not asked.requested()


def test_ranks_whose_clocks_differ_stop_together() -> None:
    group = Ranks(2)
    ranks = [Stopping(group.sum, saved, deadline, lambda: 100.0) for deadline in (105.0, 5000.0)]
    assert together(ranks, 3) == [[True]] * 2


def test_the_deadline_is_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The minutes that start-up takes belong to the limit."""
    monkeypatch.setattr(stopping.time, "monotonic", lambda: 50.0)
    assert deadline_of("3h55m", {DEADLINE: "17.5"}) == 17.5
    assert deadline_of("3h55m", {}) == 50 + 3 * 3600 + 55 * 60
    assert deadline_of(None, {DEADLINE: "17.5"}) is None


RECIPE = """\
name: stopped
model: {{path: {model}}}
data: {{train: {data}, holdout: 4, cache: false}}
train: {{batch_size: 4, learning_rate: 1e-3, max_steps: 3, eval_every: 2, tokens_per_pack: 60}}
"""


@pytest.mark.parametrize(
    ("answer", "step", "pending", "logged"),
    [
        (1, 1, False, 1),  # after the first step
        (2, 2, True, 1),  # before the first forward of the evaluation after the second one
        (3, 2, True, 1),  # between two of its forwards
    ],
)
def test_a_run_leaves_after_a_step_or_between_forwards(
    answer: int, step: int, pending: bool, logged: int, causal_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.yaml"
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(16))
    path.write_text(RECIPE.format(model=causal_lm, data=data))
    asked, requested = [0], Stopping.requested

    def signal_at_answer(self: Stopping) -> bool:
        asked[0] += 1
        if asked[0] == answer:
            os.kill(os.getpid(), signal.SIGTERM)
        return requested(self)

    monkeypatch.setattr(Stopping, "requested", signal_at_answer)
    with pytest.raises(Stopped) as stopped:
        worker.run(load_recipe(str(path)), tmp_path, Accelerator(cpu=True), SilentUi())
    assert str(stopped.value) == f"stopped at step {step} of 3 (SIGTERM); the same command resumes"
    [saved] = tmp_path.glob("snapshots/*/progress.json")
    progress = json.loads(saved.read_text())["progress"]
    assert progress["step"] == step
    assert (progress["pending"] is not None) == pending
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == logged
    assert asked[0] == answer
    assert read_status(tmp_path / "rank-0.json").saves  # which the launcher waits for


def test_the_time_limit_knows_how_long_steps_and_snapshots_take(
    causal_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seconds = tmp_path / "r.yaml", list[tuple[float, float]]()
    path.write_text(RECIPE.format(model=causal_lm, data=write_jsonl(tmp_path / "pairs.jsonl", pair_rows(16))))
    requested = Stopping.requested

    def record(self: Stopping) -> bool:
        seconds.append((self.step_seconds, self.save_seconds))
        return requested(self)

    monkeypatch.setattr(Stopping, "requested", record)
    worker.run(load_recipe(str(path), [("train.save_every", 1)]), tmp_path, Accelerator(cpu=True), SilentUi())
    assert seconds[0][0] > 0  # after the first step
    assert seconds[0][1] > 0
