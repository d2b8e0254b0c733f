"""Token groups in a file, for inputs that do not fit into memory.

In: groups, appended one by one. Out: a sequence of the same groups, each read from the file when it is asked for.
Cost: 4 bytes of disk per token; in memory 16 bytes per group and 8 per response.
"""

from __future__ import annotations

import tempfile
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, overload

import numpy as np

from rmtool.tokenization.response_group import Ids, ResponseGroup


class TokenStore(Sequence[ResponseGroup]):
    """Append all, then read; use as a context, or leave it open to the end of the process.

    Args:
        path: the file, new; or a folder for a file that has no name, so that nothing is left of it however the process
            ends.

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """

    def __init__(self, path: Path):
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=path) if path.is_dir() else open(path, "w+b")  # noqa: SIM115
        self._lengths = array("q")  # of each group: its prompt, then its responses
        self._first = array("q", [0])  # where each group's lengths begin, and the end
        self._start = array("q", [0])  # where each group's tokens begin, and the end
        self._tokens: Ids | None = None
        self.crc = 0  # of the file

    @classmethod
    def reopen(cls, path: Path, layout: dict[str, np.ndarray]) -> TokenStore:
        """The spool that was written to `path`, with what its `layout()` was.

        Raises:
            OSError, ValueError: the file is not there, or not that file.
        """
        spool = cls.__new__(cls)
        spool._file, spool._tokens, spool.crc = open(path, "rb"), None, 0  # noqa: SIM115
        ends = np.cumsum(layout["lengths"])
        spool._lengths = array("q", layout["lengths"].astype(np.int64).tobytes())
        spool._first = array("q", np.concatenate(([0], np.cumsum(layout["pieces"]))).astype(np.int64).tobytes())
        spool._start = array("q", np.concatenate(([0], ends))[np.asarray(spool._first)].astype(np.int64).tobytes())
        while block := spool._file.read(2**22):
            spool.crc = zlib.crc32(block, spool.crc)
        if spool._file.tell() != 4 * spool._start[-1]:
            raise ValueError("the file has another length")
        return spool

    def layout(self) -> dict[str, np.ndarray]:
        """What must be known beside the file to read it."""
        return {"lengths": np.array(self._lengths, dtype=np.int32), "pieces": np.diff(self._first).astype(np.int32)}

    def __enter__(self) -> TokenStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._tokens = None
        self._file.close()

    def append(self, group: ResponseGroup) -> None:
        assert self._tokens is None, "append all groups before reading one"
        pieces = (group.prompt, *group.responses)
        content = np.concatenate(pieces).astype(np.int32, copy=False).tobytes()
        self._file.write(content)
        self.crc = zlib.crc32(content, self.crc)
        self._lengths.extend(map(len, pieces))
        self._first.append(len(self._lengths))
        self._start.append(self._start[-1] + sum(map(len, pieces)))

    def flush(self) -> None:
        self._file.flush()

    def __len__(self) -> int:
        return len(self._start) - 1

    @overload
    def __getitem__(self, index: int) -> ResponseGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[ResponseGroup]: ...
    def __getitem__(self, index: int | slice) -> ResponseGroup | list[ResponseGroup]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._tokens is None:
            self._tokens = self._map()
        pieces, start = list[Ids](), self._start[index]
        for length in self._lengths[self._first[index] : self._first[index + 1]]:
            pieces.append(self._tokens[start : start + length])
            start += length
        return ResponseGroup(pieces[0], tuple(pieces[1:]))

    def _map(self) -> Ids:
        if not self._start[-1]:
            return np.zeros(0, dtype=np.int32)
        if self._file.writable():
            self._file.flush()
        # A plain view: slices of a memmap object cost ten times as much.
        return np.memmap(self._file, dtype=np.int32, mode="r").view(np.ndarray)
