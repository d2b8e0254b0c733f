"""Errors: the registry of ids and what raises them, and where the traceback of a bug goes."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from rmtool.errors import ERRORS, ExitCode, RmtoolError, error_table, first_line


def test_every_id_is_raised_and_every_raised_id_is_registered() -> None:
    raised = {
        node.value
        for path in (ROOT / "rmtool").rglob("*.py")
        if path.name != "errors.py" or path.parent.name != "rmtool"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"E\d{4}", node.value)
    }
    assert raised == set(ERRORS)
    assert list(ERRORS) == sorted(ERRORS)


def test_every_id_starts_with_an_exit_code() -> None:
    assert {ExitCode(int(id[1:3])) for id in ERRORS} == set(ExitCode) - {
        ExitCode.OK, ExitCode.PARTIAL, ExitCode.PREEMPTED, ExitCode.INTERRUPTED
    }  # fmt: skip


def test_an_id_that_is_not_registered_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        RmtoolError("E0299", "what", "hint")


def test_the_table_of_errors_is_the_generated_one() -> None:
    table = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert table == error_table(), "run: python -m rmtool.errors > docs/errors.md"


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError(" \n")) == "ValueError"


def broken(*_: object, **__: object) -> None:
    raise KeyError("a bug\nof two lines")


@pytest.mark.parametrize("where", ["rmtool.recipe.load_recipe", "rmtool.planning.plan.make_plan"])
def test_the_traceback_of_a_bug_is_in_the_log_that_the_error_names(
    where: str, rmtool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after the output of libraries is redirected to the same file."""
    monkeypatch.setattr(where, broken)
    shown = rmtool("train")
    assert (shown.code, shown.error) == (70, "E7001")
    assert r"internal error: KeyError: 'a bug\nof two lines'" in shown.err
    assert f"hint: see the traceback in {tmp_path / 'rmtool.log'} and report it" in shown.err
    log = (tmp_path / "rmtool.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "in broken\n    raise KeyError" in log


def test_the_traceback_of_a_bug_can_be_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With RMTOOL_DEBUG=1, and where there is no log file to write it to."""
    from rmtool.cli.main import main

    monkeypatch.setattr("rmtool.recipe.load_recipe", broken)
    for name, value, hint in (("RMTOOL_DEBUG", "1", "see the traceback in"), ("RMTOOL_LOG", "/proc/no/log", "above")):
        monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main(["train"])
        shown = capfd.readouterr().err
        assert ended.value.code == 70
        assert "in broken\n    raise KeyError" in shown
        assert hint in shown.rpartition("hint: ")[2]
        monkeypatch.delenv("RMTOOL_DEBUG", raising=False)
