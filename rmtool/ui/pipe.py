"""Output of a training process on the terminal of its launcher.

In: the calls of a `Ui`. Out: JSON lines in the pipe $RMTOOL_EVENTS (`PipeUi`), which the launcher replays (`Replay`).
Cost: one small write per call.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import IO, Any

from rmtool.errors import RmtoolError
from rmtool.ui import Bar, Board, SilentUi, TerminalUi, Ui
from rmtool.ui.live import CURVE_KEYS, Numbers

_PARENT_EXITED = ("E0803", "the parent rmtool process has exited", "run the command again")


class _PipeBar:
    """A bar, or the view of a training run."""

    def __init__(self, ui: PipeUi, key: int):
        self.ui, self.key = ui, key

    def advance(self, count: int = 1, note: str = "") -> None:
        self.ui.send({"advance": self.key, "count": count, "note": note})

    def step(self, numbers: Numbers) -> None:
        self.ui.send({"step": self.key, "numbers": dict(numbers)})

    def event(self, kind: str, text: str) -> None:
        self.ui.send({"event": self.key, "kind": kind, "text": text})


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
    def training(self, name: str, total: int, past: Sequence[Numbers] = ()) -> Iterator[Board]:
        self.next_key += 1
        key = self.next_key
        shown = [{key: value for key, value in row.items() if key in CURVE_KEYS} for row in past]
        self.send({"training": key, "name": name, "total": total, "past": shown})
        yield _PipeBar(self, key)
        self.send({"end": key})

    @contextlib.contextmanager
    def progress(self, label: str, total: int | None, unit: str) -> Iterator[Bar]:
        self.next_key += 1
        key = self.next_key
        self.send({"start": key, "label": label, "total": total, "unit": unit})
        yield _PipeBar(self, key)
        self.send({"end": key})


class Replay:
    """Output of a `PipeUi`'s events on another ui, one line at a time."""

    def __init__(self, ui: Ui):
        self.ui = ui
        self.open: dict[int, tuple[contextlib.AbstractContextManager[Any], Any]] = {}  # bars and views by key

    def line(self, line: str) -> None:
        event = json.loads(line)
        if "say" in event:
            self.ui.say(event["say"])
        elif "facts" in event:
            self.ui.facts(event["facts"], event["rows"])
        elif "start" in event:
            self._enter(event["start"], self.ui.progress(event["label"], event["total"], event["unit"]))
        elif "training" in event:
            self._enter(event["training"], self.ui.training(event["name"], event["total"], event["past"]))
        elif "step" in event:
            self.open[event["step"]][1].step(event["numbers"])
        elif "event" in event:
            self.open[event["event"]][1].event(event["kind"], event["text"])
        elif "advance" in event:
            self.open[event["advance"]][1].advance(event["count"], event["note"])
        else:
            self.open.pop(event["end"])[0].__exit__(None, None, None)

    def _enter(self, key: int, manager: contextlib.AbstractContextManager[Any]) -> None:
        self.open[key] = (manager, manager.__enter__())

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
