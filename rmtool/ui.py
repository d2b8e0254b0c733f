"""Terminal output: messages, tables and progress bars, by rich on a terminal and as plain lines elsewhere.

In: text, table rows, and counts of completed work. Out: stderr (messages, progress) and stdout (results), and the log
file, which gets the output of libraries and tracebacks.
A training process does not own the terminal: it writes the same calls as JSON lines to the pipe $RMTOOL_EVENTS
(`PipeUi`), and the launcher replays them on its terminal (`Replay`).
Cost: a progress update is a dictionary write; a terminal is redrawn at most ten times a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rmtool.errors import RmtoolError, format_error

_PARENT_EXITED = ("E0803", "the parent rmtool process has exited", "run the command again")
PLAIN_INTERVAL_S = 10.0  # without a terminal: minimum seconds between progress lines


class Bar(Protocol):
    """The progress of one long task."""

    def advance(self, count: int = 1, note: str = "") -> None: ...


class Ui(Protocol):
    """The output that every part of rmtool may use."""

    def say(self, text: str) -> None: ...
    def progress(self, label: str, total: int | None, unit: str) -> contextlib.AbstractContextManager[Bar]: ...
    def facts(self, title: str, rows: Sequence[tuple[str, str]]) -> None: ...


def _rate(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


class _RateColumn(rich_progress.ProgressColumn):
    def render(self, task: rich_progress.Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if not speed else f"{_rate(speed)} {task.fields['unit']}/s", style="progress.data.speed")


class _Bar:
    """A bar that rich draws, or a line every PLAIN_INTERVAL_S where rich is disabled."""

    def __init__(self, ui: TerminalUi, progress: rich_progress.Progress, label: str, total: int | None, unit: str):
        self.ui, self.progress = ui, progress
        self.id = progress.add_task(label, total=total, unit=unit, note="")
        self.start = self.last = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        if note:  # without one, the last note stays
            self.progress.update(self.id, note=note)
        self.progress.update(self.id, advance=count)
        if self.progress.disable and time.monotonic() - self.last >= PLAIN_INTERVAL_S:
            self.last = time.monotonic()
            self.print_line()

    def print_line(self) -> None:
        task, elapsed = self.progress.tasks[0], time.monotonic() - self.start
        done, speed = int(task.completed), task.completed / elapsed if elapsed else 0.0
        of = f"/{int(task.total)}" if task.total is not None else ""
        left = f", {(task.total - done) / speed:.0f} s left" if task.total and speed and done < task.total else ""
        counts = f"{done}{of} {task.fields['unit']} ({_rate(speed)}/s, {elapsed:.0f} s{left})"
        self.ui.say(f"{task.description}: {counts}  {task.fields['note']}".rstrip())


def _console(file: IO[str]) -> Console:
    """Return a console as wide as its own terminal: rich asks the process's standard streams, which may be a log."""
    width = None
    if file.isatty() and "COLUMNS" not in os.environ:
        with contextlib.suppress(OSError):
            width = os.get_terminal_size(file.fileno()).columns or None  # containers have terminals of size 0
    return Console(file=file, width=width, highlight=False)


def _clean(text: str) -> str:
    """Replace control characters: data must not control the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


class TerminalUi:
    """Output on this process's terminal, or as plain lines if stderr is not a terminal."""

    def __init__(self, out: IO[str] | None = None, err: IO[str] | None = None) -> None:
        self.err = _console(err or sys.stderr)
        self.out = _console(out or sys.stdout)

    def say(self, text: str) -> None:
        self.err.print(_clean(text), markup=False, soft_wrap=not self.err.is_terminal)

    def error(self, error: RmtoolError) -> None:
        first, _, rest = _clean(format_error(error)).partition("\n")
        label, _, what = first.partition(": ")
        self.err.print(Text.assemble((label, "bold red"), ": ", (what, "bold")), soft_wrap=True)
        self.err.print(rest, markup=False, soft_wrap=True)

    def result(self, text: str) -> None:
        """Print a result on stdout."""
        self.out.print(_clean(text), markup=False, soft_wrap=True)

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        numeric_from: int = 1,
        to_stderr: bool = False,
    ) -> None:
        """Print a table on stdout, unless `to_stderr`; columns from `numeric_from` on are right-aligned."""
        table = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index >= numeric_from else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(_clean(cell)) for cell in row))
        (self.err if to_stderr else self.out).print(table)

    def facts(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print a table of labels and values on stderr."""
        self.table(title, ("", ""), rows, numeric_from=2, to_stderr=True)

    @contextlib.contextmanager
    def progress(self, label: str, total: int | None, unit: str) -> Iterator[Bar]:
        counts = (rich_progress.MofNCompleteColumn(), _RateColumn())
        times = (rich_progress.TimeElapsedColumn(), rich_progress.TimeRemainingColumn(), "{task.fields[note]}")
        bar_column = rich_progress.BarColumn(bar_width=None)
        columns = (rich_progress.SpinnerColumn(), "{task.description}", bar_column, *counts, *times)
        plain = not self.err.is_terminal
        with rich_progress.Progress(*columns, console=self.err, expand=True, disable=plain) as progress:
            bar = _Bar(self, progress, label, total, unit)
            yield bar
        if plain:
            bar.print_line()


class _PipeBar:
    def __init__(self, ui: PipeUi, key: int):
        self.ui, self.key = ui, key

    def advance(self, count: int = 1, note: str = "") -> None:
        self.ui.send({"advance": self.key, "count": count, "note": note})


class PipeUi:
    """Output as JSON lines for `Replay` in the process that owns the terminal."""

    def __init__(self, pipe: IO[str]):
        self.pipe, self.next_key = pipe, 0

    def send(self, event: dict[str, Any]) -> None:
        try:
            self.pipe.write(json.dumps(event) + "\n")
            self.pipe.flush()
        except BrokenPipeError as error:  # the launcher was killed: nothing else would stop this process
            raise RmtoolError(*_PARENT_EXITED) from error

    def say(self, text: str) -> None:
        self.send({"say": text})

    def facts(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        self.send({"facts": title, "rows": list(rows)})

    @contextlib.contextmanager
    def progress(self, label: str, total: int | None, unit: str) -> Iterator[Bar]:
        self.next_key += 1
        key = self.next_key
        self.send({"start": key, "label": label, "total": total, "unit": unit})
        yield _PipeBar(self, key)
        self.send({"end": key})


class SilentUi:
    """No output: for all ranks but 0, and for tests."""

    def say(self, text: str) -> None:
        pass

    def facts(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        pass

    @contextlib.contextmanager
    def progress(self, label: str, total: int | None, unit: str) -> Iterator[Bar]:
        yield self

    def advance(self, count: int = 1, note: str = "") -> None:
        pass


class Replay:
    """Output of a `PipeUi`'s events on another ui, one line at a time."""

    def __init__(self, ui: Ui):
        self.ui = ui
        self.open: dict[int, tuple[contextlib.AbstractContextManager[Bar], Bar]] = {}

    def line(self, line: str) -> None:
        event = json.loads(line)
        if "say" in event:
            self.ui.say(event["say"])
        elif "facts" in event:
            self.ui.facts(event["facts"], event["rows"])
        elif "start" in event:
            manager = self.ui.progress(event["label"], event["total"], event["unit"])
            self.open[event["start"]] = (manager, manager.__enter__())
        elif "advance" in event:
            self.open[event["advance"]][1].advance(event["count"], event["note"])
        else:
            self.open.pop(event["end"])[0].__exit__(None, None, None)

    def close(self) -> None:
        """Close the bars that a killed process left open."""
        for manager, _ in self.open.values():
            manager.__exit__(None, None, None)
        self.open.clear()


def worker_ui(main_process: bool) -> Ui:
    """Return the ui of a training process: the launcher's pipe if there is one, else this terminal.

    Raises:
        RmtoolError: E0803 when the launcher has exited.
    """
    if not main_process:
        return SilentUi()
    path = os.environ.get("RMTOOL_EVENTS")
    if not path:
        return TerminalUi()
    try:
        # Not blocking: without a reader (the launcher was killed) a blocking open would never return.
        pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        raise RmtoolError(*_PARENT_EXITED) from error
    os.set_blocking(pipe, True)
    return PipeUi(os.fdopen(pipe, "w", encoding="utf-8"))


def print_json(data: object, ui: TerminalUi) -> None:
    """Print a result as JSON on stdout. JSON has no NaN or inf: `data` must not contain them."""
    ui.out.file.write(json.dumps(data, ensure_ascii=False, allow_nan=False, indent=2) + "\n")
    ui.out.file.flush()


def log_path() -> Path:
    """Return the log file: $RMTOOL_LOG, else rmtool.log in the user's cache folder."""
    return Path(os.environ.get("RMTOOL_LOG") or Path.home() / ".cache" / "rmtool" / "rmtool.log")


def open_log() -> IO[bytes]:
    """Open the log file for appending.

    Raises:
        RmtoolError: E0501 when it cannot be written.
    """
    path = log_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "ab")
    except OSError as error:
        hint = "set RMTOOL_LOG to a writable path"
        raise RmtoolError("E0501", f"cannot write {path}: {error.strerror}", hint) from error


@contextlib.contextmanager
def redirect_output() -> Iterator[TerminalUi]:
    """Send the output of libraries, at the level of file descriptors, to the log file, and yield a ui that still writes
    to the terminal.

    Raises:
        RmtoolError: E0501 when the log file cannot be written.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open_log())
        out, err = (
            stack.enter_context(os.fdopen(os.dup(fd), "w", encoding="utf-8", errors="backslashreplace", buffering=1))
            for fd in (1, 2)
        )
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            yield TerminalUi(out, err)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
