"""Terminal output: messages, tables and progress bars, by rich on a terminal and as plain lines elsewhere.

In: text, table rows, and counts of completed work. Out: stderr (messages, progress) and stdout (results), and the log
file, which gets the output of libraries and tracebacks.
A training process does not own the terminal: it writes the same calls to a pipe (`pipe.py`). A training run on a
terminal has a live view (`live.py`).
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
from typing import IO, Protocol

from rich import progress as rich_progress
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rmtool.errors import RmtoolError, format_error
from rmtool.redaction import redact
from rmtool.ui.live import LiveView, Numbers

PLAIN_INTERVAL_S = 10.0  # without a terminal: minimum seconds between progress lines


class Bar(Protocol):
    """The progress of one long task."""

    def advance(self, count: int = 1, note: str = "") -> None: ...


class Board(Protocol):
    """The view of a training run."""

    def step(self, numbers: Numbers) -> None: ...
    def event(self, kind: str, text: str) -> None: ...


class Ui(Protocol):
    """The output that every part of rmtool may use."""

    def say(self, text: str) -> None: ...
    def progress(self, label: str, total: int | None, unit: str) -> contextlib.AbstractContextManager[Bar]: ...
    def facts(self, title: str, rows: Sequence[tuple[str, str]]) -> None: ...
    def training(self, name: str, total: int, past: Sequence[Numbers]) -> contextlib.AbstractContextManager[Board]: ...


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
        self.before = 0  # of the total, by an earlier process

    def skip(self, count: int) -> None:
        """Count what was done before a resume, which does not count for the speed."""
        self.before = count
        self.progress.update(self.id, completed=count)

    def advance(self, count: int = 1, note: str = "") -> None:
        if note:  # without one, the last note stays
            self.progress.update(self.id, note=note)
        self.progress.update(self.id, advance=count)
        if self.progress.disable and time.monotonic() - self.last >= PLAIN_INTERVAL_S:
            self.last = time.monotonic()
            self.print_line()

    def print_line(self) -> None:
        task, elapsed = self.progress.tasks[0], time.monotonic() - self.start
        done = int(task.completed)
        speed = (done - self.before) / elapsed if elapsed else 0.0
        of = f"/{int(task.total)}" if task.total is not None else ""
        left = f", {(task.total - done) / speed:.0f} s left" if task.total and speed and done < task.total else ""
        counts = f"{done}{of} {task.fields['unit']} ({_rate(speed)}/s, {elapsed:.0f} s{left})"
        self.ui.say(f"{task.description}: {counts}  {task.fields['note']}".rstrip())


class _Board:
    """The live view; without a terminal, a line every PLAIN_INTERVAL_S."""

    def __init__(self, view: LiveView, bar: Bar | None = None):
        self.view, self.bar = view, bar

    def step(self, numbers: Numbers) -> None:
        count = int(numbers["step"] or 0) - self.view.done
        self.view.step(numbers)
        if self.bar:
            self.bar.advance(count, self.view.summary())

    def event(self, kind: str, text: str) -> None:
        self.view.events[kind] = _clean(text)


def _console(file: IO[str]) -> Console:
    """Return a console as wide as its own terminal: rich asks the process's standard streams, which may be a log."""
    return Console(file=file, width=_width(file), highlight=False)


def _width(file: IO[str]) -> int | None:
    """The columns of a terminal, unless COLUMNS decides."""
    if file.isatty() and "COLUMNS" not in os.environ:
        with contextlib.suppress(OSError):
            return os.get_terminal_size(file.fileno()).columns or None  # containers have terminals of size 0
    return None


def _clean(text: str) -> str:
    """Replace secrets, and control characters: data must not control the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in redact(text))


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
    def progress(self, label: str, total: int | None, unit: str) -> Iterator[_Bar]:
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

    @contextlib.contextmanager
    def training(self, name: str, total: int, past: Sequence[Numbers] = ()) -> Iterator[Board]:
        """Show a training run; `past` are the metrics of its steps before a resume."""
        view = LiveView(name, total)
        for numbers in past:
            view.step(numbers)

        def resized() -> LiveView:
            self.err.width = _width(self.err.file) or self.err.width
            return view

        if self.err.is_terminal:
            with Live(get_renderable=resized, console=self.err, refresh_per_second=4):
                yield _Board(view)
        else:
            with self.progress("Training", total, "steps") as bar:
                bar.skip(view.done)
                yield _Board(view, bar)


class SilentUi:
    """No output: for all ranks but 0, and for tests."""

    def say(self, text: str) -> None:
        pass

    def facts(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        pass

    @contextlib.contextmanager
    def progress(self, label: str, total: int | None, unit: str) -> Iterator[Bar]:
        yield self

    @contextlib.contextmanager
    def training(self, name: str, total: int, past: Sequence[Numbers] = ()) -> Iterator[Board]:
        yield self

    def advance(self, count: int = 1, note: str = "") -> None:
        pass

    def step(self, numbers: Numbers) -> None:
        pass

    def event(self, kind: str, text: str) -> None:
        pass


def print_json(data: object, ui: TerminalUi) -> None:
    """Print a result as JSON on stdout. JSON has no NaN or inf: `data` must not contain them."""
    ui.out.file.write(redact(json.dumps(data, ensure_ascii=False, allow_nan=False, indent=2)) + "\n")
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
