"""train.log: what a run shows on its terminal, as plain lines, also of the runs that it resumes.

In: a path. Out: a ui that appends to that file. It never fails: a full disk is the error of those who need it.
Cost: a line per 10 seconds, and per message.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from rmtool.errors import RmtoolError
from rmtool.ui import TerminalUi


class _LogStream:
    """A text stream that appends to a file what the disk takes."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            os.write(self.descriptor, text.encode(errors="replace"))
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[TerminalUi]:
    """Append to the log of a run, beginning with the time; an error that ends the run is in it, too."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    stream = _LogStream(descriptor)
    log = TerminalUi(stream, stream)  # type: ignore[arg-type]
    try:
        log.say(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
        yield log
    except RmtoolError as error:
        log.error(error)
        raise
    finally:
        os.close(descriptor)
