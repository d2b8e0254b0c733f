"""train.log has what the terminal shows, of all parts of a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rmtool.errors import RmtoolError
from rmtool.launch.train_log import open_log


def fail(path: Path, step: int) -> None:
    with open_log(path) as log:
        log.say(f"snapshot of step {step}")
        raise RmtoolError("E0802", "the loss is NaN", "lower the rate")


def test_a_resumed_run_appends_and_an_error_is_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    for step in (3, 5):
        with pytest.raises(RmtoolError):
            fail(path, step)
    lines = path.read_text().splitlines()
    part = [r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", "snapshot of step 3", r"error\[E0802\]: the loss is NaN",
            "  hint: lower the rate"]  # fmt: skip
    expected = [*part, *(text.replace("step 3", "step 5") for text in part)]
    assert len(lines) == len(expected)
    assert all(re.fullmatch(one, two) for one, two in zip(expected, lines, strict=True))


def test_a_full_disk_does_not_end_the_run() -> None:
    with open_log(Path("/dev/full")) as log:
        log.say("a line")
        log.facts("Data", [("rows", "3")])
