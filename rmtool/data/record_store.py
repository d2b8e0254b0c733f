"""Records in a temporary file, so that their text is not held in memory.

In: records, appended one by one. Out: the same records, by their places.
Cost: the disk that their text takes, in $TMPDIR; in memory 8 bytes each. The file has no name, so that nothing is left
of it however the process ends.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from array import array
from collections.abc import Iterator

from rmtool.data.record import Record
from rmtool.errors import RmtoolError


class RecordStore:
    """Append all, then read."""

    def __init__(self) -> None:
        with _disk_errors():
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this is
        self._ends = array("q", [0])

    def append(self, record: Record) -> None:
        """Keep a record.

        Raises:
            RmtoolError: E0502 the disk is full.
        """
        content = record.pack()
        with _disk_errors():
            self._file.write(content)
        self._ends.append(self._ends[-1] + len(content))

    def finish(self) -> None:
        """To be called before the first is read; raises as `append`."""
        with _disk_errors():
            self._file.flush()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place: int) -> Record:
        start, end = self._ends[place : place + 2]
        # Read, not mapped: pages that were mapped would count as this process's memory.
        return Record.unpack(os.pread(self._file.fileno(), end - start, start))


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        folder = tempfile.gettempdir()
        hint = "free the disk, or name another folder in $TMPDIR"
        raise RmtoolError("E0502", f"{folder} cannot be written: {error.strerror}", hint) from error
