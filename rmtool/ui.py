"""What a person sees: words, tables and progress, drawn by rich on a terminal and as plain lines elsewhere.

In: sentences, table rows, and counts of work done. Out: stderr (words, progress) and stdout (results).
A training process does not own the terminal: it is started with RMTOOL_EVENTS set to a pipe, writes the same calls
there as JSON lines (`PipeUi`), and the launcher replays them on its own terminal (`replay`).
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

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from rmtool.errors import RmtoolError, format_error

PLAIN_INTERVAL_S = 10.0  # without a terminal: at most one progress line in this time


class Bar(Protocol):
    """A piece of long work under way."""

    def advance(self, count: int = 1, note: str = "") -> None: ...


class Ui(Protocol):
    """What the rest of rmtool may show."""

    def say(self, text: str) -> None: ...

    def progress(self, label: str, total: int | None, unit: str) -> contextlib.AbstractContextManager[Bar]: ...

    def facts(self, title: str, rows: Sequence[tuple[str, str]]) -> None: ...


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if not speed else f"{_short(speed)} {task.fields['unit']}/s", style="progress.data.speed")


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


class _RichBar:
    def __init__(self, progress: Progress, label: str, total: int | None, unit: str):
        self.progress = progress
        self.task = progress.add_task(label, total=total, unit=unit, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        # An empty note keeps the one that stands there.
        if note:
            self.progress.update(self.task, note=note)
        self.progress.update(self.task, advance=count)


class _PlainBar:
    def __init__(self, ui: TerminalUi, label: str, total: int | None, unit: str):
        self.ui, self.label, self.total, self.unit = ui, label, total, unit
        self.done, self.note, self.start = 0, "", time.monotonic()
        self.last = self.start

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done, self.note = self.done + count, note or self.note
        if time.monotonic() - self.last >= PLAIN_INTERVAL_S:
            self.last = time.monotonic()
            self.line()

    def line(self) -> None:
        elapsed = time.monotonic() - self.start
        rate = self.done / elapsed if elapsed else 0.0
        of = f"/{self.total}" if self.total is not None else ""
        left = (
            f", {(self.total - self.done) / rate:.0f} s left" if self.total and rate and self.done < self.total else ""
        )
        note = f"  {self.note}" if self.note else ""
        self.ui.say(f"{self.label}: {self.done}{of} {self.unit} ({_short(rate)}/s, {elapsed:.0f} s{left}){note}")


def _console(file: IO[str]) -> Console:
    """A console as wide as its own terminal; rich alone asks the process's standard streams, which may be a log."""
    width = None
    if file.isatty() and "COLUMNS" not in os.environ:
        with contextlib.suppress(OSError):
            width = os.get_terminal_size(file.fileno()).columns
    return Console(file=file, width=width, highlight=False)


def _clean(text: str) -> str:
    """Without control characters: data must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


class TerminalUi:
    """Draws on this process's terminal, or writes plain lines where stderr is none."""

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
        """Words or data that the command was asked for, on stdout."""
        self.out.print(_clean(text), markup=False, soft_wrap=True)

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        numeric_from: int = 1,
        to_stderr: bool = False,
    ) -> None:
        """One table, on stdout unless said otherwise; columns from `numeric_from` on are right-aligned."""
        table = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index >= numeric_from else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(_clean(cell)) for cell in row))
        (self.err if to_stderr else self.out).print(table)

    def facts(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """What is said along the way, as a table of names and values on stderr."""
        self.table(title, ("", ""), rows, numeric_from=2, to_stderr=True)

    def progress(self, label: str, total: int | None, unit: str) -> contextlib.AbstractContextManager[Bar]:
        return self._rich(label, total, unit) if self.err.is_terminal else self._plain(label, total, unit)

    @contextlib.contextmanager
    def _rich(self, label: str, total: int | None, unit: str) -> Iterator[Bar]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.err, expand=True) as progress:
            yield _RichBar(progress, label, total, unit)

    @contextlib.contextmanager
    def _plain(self, label: str, total: int | None, unit: str) -> Iterator[Bar]:
        bar = _PlainBar(self, label, total, unit)
        yield bar
        bar.line()


class _PipeBar:
    def __init__(self, ui: PipeUi, key: int):
        self.ui, self.key = ui, key

    def advance(self, count: int = 1, note: str = "") -> None:
        self.ui.send({"advance": self.key, "count": count, "note": note})


class PipeUi:
    """The same calls, written as JSON lines for the process that owns the terminal."""

    def __init__(self, pipe: IO[str]):
        self.pipe, self.next_key = pipe, 0

    def send(self, event: dict[str, Any]) -> None:
        try:
            self.pipe.write(json.dumps(event) + "\n")
            self.pipe.flush()
        except BrokenPipeError as error:
            # The launcher was killed: without it nobody would stop this process.
            raise RmtoolError("E0803", "the rmtool process that started this one is gone", "run it again") from error

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
    """Shows nothing: for every rank but the first, and for tests."""

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
    """Shows a `PipeUi`'s events on another ui, one line at a time."""

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
        """End the bars that a killed process left open."""
        for manager, _ in self.open.values():
            manager.__exit__(None, None, None)
        self.open.clear()


def worker_ui(main_process: bool) -> Ui:
    """The ui of a training process: the launcher's pipe if there is one, else this terminal."""
    if not main_process:
        return SilentUi()
    path = os.environ.get("RMTOOL_EVENTS")
    if not path:
        return TerminalUi()
    try:
        # Not blocking: an open without a reader would wait for ever where the launcher was killed meanwhile.
        pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        raise RmtoolError("E0803", "the rmtool process that started this one is gone", "run it again") from error
    os.set_blocking(pipe, True)
    return PipeUi(os.fdopen(pipe, "w", encoding="utf-8"))


def print_json(data: object, ui: TerminalUi) -> None:
    """A result for a script, on stdout. Not-a-number has no JSON form and must have been dealt with before."""
    ui.out.file.write(json.dumps(data, ensure_ascii=False, allow_nan=False, indent=2) + "\n")
    ui.out.file.flush()


def _open_log() -> IO[bytes]:
    path = Path(os.environ.get("RMTOOL_LOG") or Path.home() / ".cache" / "rmtool" / "rmtool.log")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "ab")
    except OSError as error:
        hint = "set RMTOOL_LOG to a file that can be written"
        raise RmtoolError("E0501", f"the log {path} cannot be written: {error.strerror}", hint) from error


@contextlib.contextmanager
def redirect_output() -> Iterator[TerminalUi]:
    """Send everything that libraries print, at the level of file descriptors, to a log file; yield a ui that still
    writes to the terminal. The log is $RMTOOL_LOG, else rmtool.log in the user's cache folder.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(_open_log())
        kept = [os.dup(1), os.dup(2)]
        out, err = (
            stack.enter_context(os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace", buffering=1))
            for fd in kept
        )
        saved = [os.dup(1), os.dup(2)]
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            yield TerminalUi(out, err)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in zip((1, 2), saved, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
