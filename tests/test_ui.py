"""What is shown and tracked: progress on a terminal and elsewhere, curves, wandb that cannot stop a run."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from rmtool.config import TrackConfig
from rmtool.errors import ExitCode, Place, RmtoolError, format_error
from rmtool.training.tracking import Tracker, draw_curves, read_metrics
from rmtool.ui import SilentUi, TerminalUi
from rmtool.ui.pipe import PipeUi, Replay


def plain() -> tuple[TerminalUi, io.StringIO]:
    err = io.StringIO()
    return TerminalUi(io.StringIO(), err), err


def work(ui: TerminalUi | PipeUi) -> None:
    ui.say("starts")
    with ui.progress("Scoring", 3, "rows") as bar:
        for _ in range(3):
            bar.advance(note="loss 0.5")
    ui.say("ends")


def test_without_a_terminal_progress_is_plain_lines() -> None:
    ui, err = plain()
    work(ui)
    first, middle, last = err.getvalue().splitlines()
    assert (first, last) == ("starts", "ends")
    assert middle.startswith("Scoring: 3/3 rows (")
    assert middle.endswith("loss 0.5")
    assert "\x1b" not in err.getvalue()


def test_without_a_terminal_long_work_is_a_line_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmtool.ui.PLAIN_INTERVAL_S", 0.0)
    ui, err = plain()
    with ui.progress("Reading", None, "rows") as bar:
        bar.advance(2, note="loss 0.5")
        bar.advance()
    first, second, last = err.getvalue().splitlines()
    assert first.startswith("Reading: 2 rows (")
    assert second.startswith("Reading: 3 rows (")
    assert last.endswith("loss 0.5"), "a note stays until the next one"


def test_what_a_worker_shows_is_shown_by_its_launcher() -> None:
    pipe = io.StringIO()
    work(PipeUi(pipe))
    ui, err = plain()
    replay = Replay(ui)
    for line in pipe.getvalue().splitlines():
        replay.line(line)
    assert err.getvalue().startswith("starts\nScoring: 3/3 rows")
    assert not replay.open


def test_a_killed_workers_bars_are_closed() -> None:
    pipe = io.StringIO()
    work(PipeUi(pipe))
    ui, err = plain()
    replay = Replay(ui)
    for line in pipe.getvalue().splitlines()[:3]:
        replay.line(line)
    replay.close()
    assert "Scoring: 1/3 rows" in err.getvalue()


def test_a_worker_whose_launcher_is_gone_stops() -> None:
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(RmtoolError) as caught:
        PipeUi(os.fdopen(write, "w")).say("hello")
    assert caught.value.id == "E0803"


def test_an_error_has_one_form_and_survives_the_way_between_processes() -> None:
    error = RmtoolError("E0303", "what is wrong", "fix it", Place("a.jsonl", 3, 7), "null")
    text = "error[E0303]: what is wrong\n  --> a.jsonl:3:7\n  found: null\n  hint: fix it"
    assert format_error(error) == text
    assert error.exit_code is ExitCode.DATA
    assert format_error(RmtoolError.from_dict(json.loads(json.dumps(error.as_dict())))) == text


ROW = {"step": 1, "train/rm/loss": 0.7, "train/rm/accuracy": 0.5, "train/rm/reward_margin": 0.0}


def test_metrics_and_curves_are_written(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, TrackConfig(), {"name": "x"}, SilentUi())
    for step in range(1, 4):
        tracker.log(ROW | {"step": step})
    tracker.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert draw_curves(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_a_number_that_json_cannot_hold_is_never_written(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, TrackConfig(), {"name": "x"}, SilentUi())
    with pytest.raises(ValueError, match="Out of range"):
        tracker.log({"step": 1, "x": float("nan")})
    tracker.close()


@pytest.mark.parametrize("broken", [False, True], ids=["offline", "unreachable"])
def test_wandb_never_stops_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    monkeypatch.setattr("rmtool.training.tracking.WANDB_TIMEOUT_S", 2)
    if broken:
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    else:
        monkeypatch.setenv("WANDB_MODE", "offline")
    ui, err = plain()
    tracker = Tracker(tmp_path, TrackConfig(wandb=True), {"name": "x"}, ui)
    tracker.log(ROW)
    tracker.close()
    assert len(read_metrics(tmp_path)) == 1
    assert "wandb" in err.getvalue()
    assert broken or list((tmp_path / "wandb").glob("offline-run-*"))
