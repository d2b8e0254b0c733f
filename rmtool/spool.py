"""Token trees in a temporary file, for inputs that do not fit into memory.

In: trees, appended one by one. Out: a sequence of the same trees, each read from the file when it is asked for.
Cost: 4 bytes of disk per token; in memory 24 bytes per tree and 8 per response. The file has no name, so that nothing
is left of it however the process ends.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import overload

import numpy as np

from rmtool.tree import Ids, TokenTree


class TreeSpool(Sequence[TokenTree]):
    """Append all, then read; use as a context.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """

    def __init__(self, folder: Path):
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        self._lengths = array("q")  # of each tree: its prompt, then its responses
        self._first = array("q", [0])  # where each tree's lengths begin, and the end
        self._start = array("q", [0])  # where each tree's tokens begin, and the end
        self._tokens: Ids | None = None

    def __enter__(self) -> TreeSpool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._tokens = None
        self._file.close()

    def append(self, tree: TokenTree) -> None:
        assert self._tokens is None, "append all trees before reading one"
        pieces = (tree.prompt, *tree.responses)
        self._file.write(np.concatenate(pieces).astype(np.int32, copy=False).tobytes())
        self._lengths.extend(map(len, pieces))
        self._first.append(len(self._lengths))
        self._start.append(self._start[-1] + sum(map(len, pieces)))

    def __len__(self) -> int:
        return len(self._start) - 1

    @overload
    def __getitem__(self, index: int) -> TokenTree: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenTree]: ...
    def __getitem__(self, index: int | slice) -> TokenTree | list[TokenTree]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._tokens is None:
            self._file.flush()
            # A plain view: slices of a memmap object cost ten times as much.
            self._tokens = np.memmap(self._file, dtype=np.int32, mode="r").view(np.ndarray)
        pieces, start = list[Ids](), self._start[index]
        for length in self._lengths[self._first[index] : self._first[index + 1]]:
            pieces.append(self._tokens[start : start + length])
            start += length
        return TokenTree(pieces[0], tuple(pieces[1:]))
