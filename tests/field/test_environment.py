"""Situations from bug reports that are not in the files: links, pipes, devices, the terminal, the user."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import pwd
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import scored, write_jsonl

from rmtool.cli import main as cli
from rmtool.ui import TerminalUi

ROWS = [{"prompt": "Hi", "response": "Yes."}, {"prompt": "Hi", "response": "No."}]
PAIRS = [{"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}]


def test_an_output_that_is_a_link_is_written_where_it_leads(rmtool: Any, model: Path) -> None:
    """Seen: cabinpkg/cabin#1286."""
    write_jsonl(Path("rows.jsonl"), ROWS)
    Path("large-disk").mkdir()
    Path("scored.jsonl").symlink_to("large-disk/scored.jsonl")
    for more in ((), ("--overwrite",)):
        assert rmtool("score", "rows.jsonl", "--model", model, "--output", "scored.jsonl", *more).code == 0
        assert Path("scored.jsonl").is_symlink()
        assert len(scored(Path("large-disk/scored.jsonl"))) == 2
    assert rmtool("score", "rows.jsonl", "--model", model, "--output", "scored.jsonl").error == "E0601"


def test_an_output_that_is_no_file_is_never_replaced(rmtool: Any, model: Path) -> None:
    """Seen: bazelbuild/bazel#31038: renaming a file to /dev/null, as root, replaces the device."""
    write_jsonl(Path("rows.jsonl"), ROWS)
    os.mkfifo("device")
    Path("link").symlink_to("device")
    for name in ("device", "link"):
        shown = rmtool("score", "rows.jsonl", "--model", model, "--output", name, "--overwrite")
        assert shown.error == "E0601"
        assert Path("device").is_fifo()


def test_a_folder_with_files_of_someone_else_is_no_run_folder(rmtool: Any, causal_lm: Path, tmp_path: Path) -> None:
    """Seen: huggingface/community-events#77, jakeret/tf_unet#216: `--output ./` deletes what is there."""
    write_jsonl(Path("pairs.jsonl"), PAIRS)
    command = ("train", "--recipe", "debug", "--model", causal_lm, "--data", "pairs.jsonl", "--set", "data.holdout=0")
    for name in ("model", "previous", "config.yaml", ".tmp-notes"):
        folder = tmp_path / f"project {name}"
        (folder / name).mkdir(parents=True)
        shown = rmtool(*command, "--output", folder)
        assert (shown.error, name in shown.err) == ("E0601", True)
        assert [path.name for path in folder.iterdir()] == [name]


def test_an_input_that_is_no_file_is_said(rmtool: Any, model: Path) -> None:
    Path("rows.jsonl").mkdir()
    shown = rmtool("score", "rows.jsonl", "--model", model)
    assert shown.error == "E0201"
    assert "not found" not in shown.err


def test_inputs_and_models_may_be_links(rmtool: Any, model: Path) -> None:
    write_jsonl(Path("rows.jsonl"), ROWS)
    Path("link.jsonl").symlink_to("rows.jsonl")
    Path("snapshot").symlink_to(model)
    rmtool("score", "rows.jsonl", "--model", model)
    assert rmtool("score", "link.jsonl", "--model", "snapshot").code == 0
    assert scored(Path("link.scored.jsonl")) == scored(Path("rows.scored.jsonl"))


def test_a_terminal_of_size_zero_shows_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen: moby/moby#43229: `docker run -t` starts programs on a terminal of 0 columns."""
    monkeypatch.delenv("COLUMNS", raising=False)
    master, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as out, os.fdopen(os.dup(terminal), "w") as err:
        ui = TerminalUi(out, err)
        ui.table("eval/rm", ("subset", "accuracy"), [("all", "0.9950")])
        ui.say("note: seen")
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed, and all is read
        while True:
            shown += os.read(master, 4096)
    os.close(master)
    assert b"0.9950" in shown
    assert b"note: seen" in shown


def test_a_user_without_a_home_folder_is_told(rmtool: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen: psf/black#2813, NixOS/nixpkgs#411914: `docker run -u 1234`."""

    def nobody(uid: int) -> Any:
        raise KeyError(uid)

    write_jsonl(Path("rows.jsonl"), ROWS)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    shown = rmtool("score", "rows.jsonl", "--model", model)
    assert shown.error == "E0501"
    assert "HOME" in shown.err
    assert rmtool("--help").code == 0


@contextlib.contextmanager
def stdout_to(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    saved = os.dup(1)
    os.dup2(descriptor, 1)
    os.close(descriptor)
    unbuffered = io.TextIOWrapper(os.fdopen(1, "wb", 0, closefd=False), write_through=True)  # nothing is left to write
    monkeypatch.setattr(sys, "stdout", unbuffered)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def exit_code(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return ended.value.code


def test_a_reader_that_has_gone_does_not_look_like_skipped_rows(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: xorq-labs/xorq#2228, pallets/click#625: `rmtool eval ... | head`."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("pairs.jsonl"), PAIRS)
    reader, writer = os.pipe()
    os.close(reader)
    with stdout_to(writer, monkeypatch):
        assert exit_code("eval", str(model), "--data", "pairs.jsonl") == 128 + signal.SIGPIPE


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_full_disk_below_stdout_is_no_bug(
    more: tuple[str, ...], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("pairs.jsonl"), PAIRS)
    with stdout_to(os.open("/dev/full", os.O_WRONLY), monkeypatch):
        assert exit_code("eval", str(model), "--data", "pairs.jsonl", *more) == 5
    assert "error[E0502]" in capfd.readouterr().err
