"""Records in a temporary file, so that their text is not held in memory.

In: records, appended one by one. Out: the same records, by their places.
Cost: the disk that their text takes, in $TMPDIR; in memory 8 bytes each. The file has no name, so that nothing is left
of it however the process ends.
"""

from __future__ import annotations

import mmap
import tempfile
from array import array

from rmtool.data.record import Record
from rmtool.errors import RmtoolError


class KeptRecords:
    """Append all, then read."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this is
        self._ends = array("q", [0])
        self._content: mmap.mmap | None = None

    def append(self, record: Record) -> None:
        """Keep a record.

        Raises:
            RmtoolError: E0502 the disk is full.
        """
        assert self._content is None, "append all records before reading one"
        content = record.pack()
        try:
            self._file.write(content)
        except OSError as error:
            self._refuse(error)
        self._ends.append(self._ends[-1] + len(content))

    def _refuse(self, error: OSError) -> None:
        folder = tempfile.gettempdir()
        hint = "free the disk, or name another folder in $TMPDIR"
        raise RmtoolError("E0502", f"{folder} cannot be written: {error.strerror}", hint) from error

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place: int) -> Record:
        if self._content is None:
            try:
                self._file.flush()
            except OSError as error:
                self._refuse(error)
            self._content = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return Record.unpack(self._content[self._ends[place] : self._ends[place + 1]])
