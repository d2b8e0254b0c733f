"""The live view of a training run: its curves, and what fits on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import termios

import pytest
from helpers import until
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rmtool.ui import TerminalUi
from rmtool.ui.live import CURVE_POINTS, Curve, LiveView, duration
from rmtool.ui.pipe import PipeUi, Replay

STEP = {
    "step": 120,
    "train/rm/loss": 0.51234,
    "train/rm/accuracy": 0.75,
    "train/rm/reward_margin": 0.61,
    "train/rm/lr": 9.8e-06,
    "grad_norm": 1.234,
    "step_seconds": 2.0,
    "unique_tokens": 3000,
    "tokens": 6000,
    "peak_memory": 3 * 2**30,
}


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=400))
def test_a_curve_keeps_the_mean_of_each_part(values: list[float]) -> None:
    curve = Curve()
    for value in values:
        curve.add(value)
    assert len(curve.sums) <= 2 * CURVE_POINTS
    at = 0
    for total, count in curve.sums:
        assert total == pytest.approx(sum(values[at : at + count]), abs=1e-6)
        at += count
    assert at == len(values)
    assert len(curve.sparkline()) <= CURVE_POINTS


def test_a_curve_goes_from_its_lowest_to_its_highest_value() -> None:
    curve = Curve()
    for value in range(8):
        curve.add(value)
    assert curve.sparkline() == "▁▂▃▄▅▆▇█"


def test_the_view_follows_a_terminal_that_is_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, 80))
    with open(terminal, "w") as err:
        ui = TerminalUi(io.StringIO(), err)
        with ui.training("debug", 500) as board:
            board.step(STEP)
            termios.tcsetwinsize(terminal, (40, 60))
            until(lambda: ui.err.width == 60, 2)
        shown = os.read(master, 2**16).decode()
    os.close(master)
    assert re.findall("╰─+╯", shown)[-1] == f"╰{'─' * 58}╯"


@pytest.mark.parametrize("width", [80, 200])
def test_the_view_fits_the_terminal(width: int) -> None:
    view = LiveView("debug", 500)
    view.step(STEP)
    view.events["snapshot"] = "step 100"
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None).print(view)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for shown in ("Training debug", "step 120 of 500 (24.0%)", "12 min 40 s left", "0.5123", "0.7500", "9.8e-06"):
        assert shown in text
    assert "1,500/s (50% saved by prefix sharing)" in text
    assert "3.0 GiB" in text
    assert "step 100" in text


def test_a_skipped_step_keeps_the_values_before() -> None:
    view = LiveView("debug", 500)
    view.step(STEP)
    view.step({"step": 121, "train/rm/loss": None, "train/rm/accuracy": None})
    assert (view.done, view.last["train/rm/loss"]) == (121, 0.51234)
    assert view.loss.sums == [(0.51234, 1)]


def test_a_resumed_run_counts_from_its_step_through_the_pipe() -> None:
    pipe, err = io.StringIO(), io.StringIO()
    past = [STEP | {"step": step} for step in range(1, 120)]
    ui = PipeUi(pipe)
    with ui.training("debug", 500, past) as board:
        board.step(STEP)
        with ui.progress("Evaluating", 3, "rows") as bar:
            bar.advance(3)
        board.event("evaluation", "step 120: accuracy 0.7")
    replay = Replay(TerminalUi(io.StringIO(), err))
    for line in pipe.getvalue().splitlines():
        assert "peak_memory" not in json.loads(line).get("past", [{}])[0], "past steps are sent for their curves only"
        replay.line(line)
    assert err.getvalue().startswith("Evaluating: 3/3 rows (")
    assert "\nTraining: 120/500 steps (" in err.getvalue()
    assert not replay.open
    assert err.getvalue().rstrip().endswith("loss 0.512 acc 0.75")


@pytest.mark.parametrize(
    ("seconds", "text"), [(42, "42 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (273600, "3 d 04 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
