"""Rows that cannot be used: counted, the first of them listed, and where it is allowed set aside in a file.

In: an error per bad row, whoever finds it: reader, format or encoder. Out: one error that lists them, or a JSONL file
with each row, its place and the reason.
Cost: the first LISTED errors are held; with a file, one line of it per row.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rmtool.errors import RmtoolError

LISTED = 20
REJECTS_FILE = "rejects.jsonl"  # in a run folder
_ROWS = "E03"  # ids of errors in the data
_WRITTEN = re.compile(rb'\{"code": "E03\d\d", "file": ')  # how a file of set aside rows begins


class Rejects:
    """Use as a context where there is a file.

    Args:
        path: rows are set aside there, and the work goes on; None: `raise_if_any` raises.
    """

    def __init__(self, path: Path | None = None):
        self.path, self.count = path, 0
        self._listed: list[RmtoolError] = []
        self._file: IO[str] | None = None

    def __enter__(self) -> Rejects:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file:
            self._file.close()

    def add(self, error: RmtoolError, row: Any = None) -> None:
        """Count a bad row; `row` is what could be read of it.

        Raises:
            RmtoolError: `error` itself if it is about no row, E0501 the file cannot be written.
        """
        if not error.id.startswith(_ROWS) or error.place is None:
            raise error
        self.count += 1
        if len(self._listed) < LISTED:
            self._listed.append(error)
        if self.path:
            self._write(self.path, error, row)

    def _write(self, path: Path, error: RmtoolError, row: Any) -> None:
        known = {"file", "line", "column", "found"}
        about = {name: value for name, value in error.as_dict().items() if name in known and value is not None}
        line = {"code": error.id, **about, "reason": error.what, "row": row}
        try:
            if self._file is None:
                self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
            self._file.write(json.dumps(line, ensure_ascii=True, default=str) + "\n")
            self._file.flush()
        except OSError as failed:
            raise RmtoolError(
                "E0501", f"{path} cannot be written: {failed.strerror}", "free or change the disk"
            ) from failed

    def raise_if_any(self) -> None:
        """Raise what was found, unless it was set aside.

        Raises:
            RmtoolError: the one bad row's error, or one that lists the first LISTED of them.
        """
        if self.path or not self.count:
            return
        # Whoever finds a bad row may be ahead of another in the file.
        self._listed.sort(key=lambda error: (error.place.file, error.place.line or 0) if error.place else ("", 0))
        first = self._listed[0]
        if self.count == 1:
            raise first
        raise RmtoolError(
            first.id,
            f"{self.count:,} rows cannot be used",
            "mend or remove them, or set them aside: --on-bad-row skip",
            first.place,
            rows=tuple(f"{error.place}: {error.what}{_found(error)}" for error in self._listed),
            more=self.count - len(self._listed),
        )


def require_free(path: Path, inputs: Iterable[str]) -> None:
    """See that bad rows can be set aside in `path` and nothing is lost but what an earlier command set aside there.

    Raises:
        RmtoolError: E0601 it is one of the inputs, or holds something else.
    """
    if not os.path.exists(path):
        return
    if any(os.path.exists(name) and os.path.samefile(path, name) for name in inputs):
        raise RmtoolError("E0601", f"bad rows are set aside in {path}, and it is an input", "rename the input")
    if not _is_rejects(path):
        what = f"bad rows are set aside in {path}, and it is there already with something else in it"
        raise RmtoolError("E0601", what, "move or rename that file")


def _is_rejects(path: Path) -> bool:
    """Whether it is a file of rows that were set aside, or an empty one."""
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise RmtoolError("E0501", f"{path} cannot be read: {error.strerror}", "move or rename that file") from error
    return not start or _WRITTEN.match(start) is not None


def _found(error: RmtoolError) -> str:
    return f" (found: {error.found})" if error.found else ""
