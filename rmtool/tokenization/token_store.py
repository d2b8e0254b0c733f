"""Response groups in a file, for inputs that do not fit into memory.

In: groups, appended one by one. Out: a sequence of the same groups, each read from the file when it is asked for.
Cost: 4 bytes of disk per token; in memory 16 bytes per group and 8 per response.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, overload

import numpy as np

from rmtool.tokenization.response_group import Ids, ResponseGroup


class TokenStore(Sequence[ResponseGroup]):
    """Append all groups, then read; use as a context, or leave it open to the end of the process.

    Args:
        folder: where the file is; it has no name, so that nothing is left of it however the process ends.

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """

    def __init__(self, folder: Path):
        self._file: IO[bytes] | None = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as this
        self._lengths = array("q")  # of each group: its prompt, then its responses
        self._first = array("q", [0])  # where each group's lengths begin, and the end
        self._start = array("q", [0])  # where each group's tokens begin, and the end
        self._ids: Ids | None = None

    @classmethod
    def from_arrays(cls, ids: Ids, lengths: np.ndarray, pieces: np.ndarray) -> TokenStore:
        """Make a store of what `arrays` returned, without copying `ids`."""
        store = cls.__new__(cls)
        first = np.concatenate(([0], np.cumsum(pieces, dtype=np.int64)))
        start = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))[first]
        store._file, store._ids, store._lengths = None, ids, array("q", lengths.astype(np.int64).tobytes())
        store._first, store._start = array("q", first.tobytes()), array("q", start.tobytes())
        return store

    def arrays(self) -> dict[str, np.ndarray]:
        """The ids of all groups (mapped, not in memory), the lengths of their pieces, and the pieces of each."""
        lengths, pieces = np.array(self._lengths, dtype=np.int32), np.diff(self._first).astype(np.int32)
        return {"ids": self._mapped(), "lengths": lengths, "pieces": pieces}

    def __enter__(self) -> TokenStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ids = None
        if self._file:
            self._file.close()

    def append(self, group: ResponseGroup) -> None:
        assert self._file, "a store of arrays is complete"
        assert self._ids is None, "append all groups before reading one"
        pieces = (group.prompt, *group.responses)
        self._file.write(np.concatenate(pieces).astype(np.int32, copy=False).tobytes())
        self._lengths.extend(map(len, pieces))
        self._first.append(len(self._lengths))
        self._start.append(self._start[-1] + sum(map(len, pieces)))

    def __len__(self) -> int:
        return len(self._start) - 1

    @overload
    def __getitem__(self, index: int) -> ResponseGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[ResponseGroup]: ...
    def __getitem__(self, index: int | slice) -> ResponseGroup | list[ResponseGroup]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        ids, pieces, start = self._mapped(), list[Ids](), self._start[index]
        for length in self._lengths[self._first[index] : self._first[index + 1]]:
            pieces.append(ids[start : start + length])
            start += length
        return ResponseGroup(pieces[0], tuple(pieces[1:]))

    def _mapped(self) -> Ids:
        if self._ids is None:
            assert self._file
            self._file.flush()
            # A plain view: slices of a memmap object cost ten times as much. An empty file cannot be mapped.
            mapped = np.memmap(self._file, dtype=np.int32, mode="r").view(np.ndarray) if self._start[-1] else None
            self._ids = np.zeros(0, dtype=np.int32) if mapped is None else mapped
        return self._ids
