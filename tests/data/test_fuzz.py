"""Malformed files: every error is an RmtoolError with the line of the fault."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from helpers import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import fuzz_reading


def test_malformed_inputs_are_read_or_refused() -> None:
    outcomes, failure = fuzz_reading.run_share((0, 2000))
    assert failure is None
    assert sum(outcomes.values()) == 2000
    assert outcomes.keys() == {"read", "E0301", "E0302", "E0303"}
    assert min(outcomes.values()) > 0


def test_commands_end_with_a_documented_exit_code(rmtool: Any, model: Path, tmp_path: Path) -> None:
    codes = set()
    for seed in range(16):
        (tmp_path / "x.jsonl").write_bytes(fuzz_reading.make_input(seed))
        more = ("--on-bad-row", "skip") if seed % 2 else ()
        codes.add(rmtool("eval", model, "--data", tmp_path / "x.jsonl", "--allow-empty", *more).code)
    assert codes == {0, 1, 3}


def test_an_error_is_reported_with_its_line(tmp_path: Path) -> None:
    kinds = set()
    for seed in range(500):
        content, line, kind = fuzz_reading.plant(seed)
        path = tmp_path / "x.jsonl"
        path.write_bytes(content)
        error = fuzz_reading.first_error(path)
        kinds.add(kind)
        assert error is not None, (seed, kind)
        assert error.place is not None
        assert error.place.line == line, (seed, kind)
    assert kinds == set(fuzz_reading.FAULTS)
