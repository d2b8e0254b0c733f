"""Invalid rows: counted, listed in one error, and skipped where that is allowed.

In: an error per invalid row, from the reader, the parsers or the encoder. Out: one error that lists them, or a JSONL
file with each row, its place and the reason.
Cost: the first LISTED errors are held in memory; with a file, one line of it per row.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rmtool.data.json_values import as_json
from rmtool.errors import RmtoolError

LISTED = 20
_SKIP_ROWS = "or pass --on-bad-row skip"
REJECTS_FILE = "rejects.jsonl"  # in a run folder
_ROWS = "E03"  # ids of errors in the data
_WRITTEN = re.compile(rb'\{"code": "E03\d\d", "file": ')  # how a file of skipped rows begins


class Rejects:
    """Collector of invalid rows. Use it as a context manager if there is a file.

    Args:
        path: invalid rows are skipped and written there; None: `raise_if_any` raises.
    """

    def __init__(self, path: Path | None = None):
        self.path, self.count = path, 0
        self._listed: list[RmtoolError] = []
        self._hints = Counter[str]()
        self._file: IO[str] | None = None

    def __enter__(self) -> Rejects:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file:
            self._file.close()

    def add(self, error: RmtoolError, row: Any = None) -> None:
        """Count an invalid row; `row` is what could be parsed of it.

        Raises:
            RmtoolError: `error` itself when it is not about a row, E0501 when the file cannot be written.
        """
        if not error.id.startswith(_ROWS) or error.place is None:
            raise error
        self.count += 1
        if len(self._listed) < LISTED:
            self._listed.append(error)
        if error.hint in self._hints or len(self._hints) < LISTED:
            self._hints[error.hint] += 1
        if self.path:
            self._write(self.path, error, row)

    def _write(self, path: Path, error: RmtoolError, row: Any) -> None:
        about = {name: value for name, value in error.as_dict().items() if name in ("file", "line", "column", "found")}
        known = {name: value for name, value in about.items() if value is not None}
        line = {"code": error.id, **known, "reason": error.what, "row": row}
        try:
            if self._file is None:
                self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
            self._file.write(json.dumps(as_json(line)) + "\n")
            self._file.flush()
        except OSError as failed:
            hint = "free disk space, or check the permissions of its folder"
            raise RmtoolError("E0501", f"cannot write {path}: {failed.strerror}", hint) from failed

    def raise_if_any(self) -> None:
        """Raise the errors of invalid rows, unless they are skipped.

        Raises:
            RmtoolError: the error of the only invalid row, or one that lists the first LISTED of them.
        """
        if self.path or not self.count:
            return
        # Readers are ahead of encoders in the file.
        self._listed.sort(key=lambda error: (error.place.file, error.place.line or 0) if error.place else ("", 0))
        first = self._listed[0]
        if self.count == 1:
            raise first
        raise RmtoolError(
            first.id,
            f"{self.count:,} invalid rows",
            self._hint(),
            first.place,
            rows=tuple(f"{error.place}: {error.summary()}" for error in self._listed),
            more=self.count - len(self._listed),
        )

    def _hint(self) -> str:
        """Return the rows' hints; several are lines, each with its number of rows."""
        hints = [(hint.removesuffix(f", {_SKIP_ROWS}"), count) for hint, count in self._hints.most_common()]
        if len(hints) == 1:
            return f"{hints[0][0].replace('this row', 'them')}, {_SKIP_ROWS}"
        return "\n".join([*(f"{count:,} row{'s' * (count > 1)}: {hint}" for hint, count in hints), _SKIP_ROWS])


def require_free(path: Path, inputs: Iterable[str]) -> None:
    """Check that skipped rows can be written to `path`: it does not exist, or an earlier command wrote them there.

    Raises:
        RmtoolError: E0501 when it cannot be read, E0601 when it is one of the inputs or contains something else.
    """
    if not os.path.exists(path):
        return
    if any(os.path.exists(name) and os.path.samefile(path, name) for name in inputs):
        raise RmtoolError("E0601", f"skipped rows are written to {path}, but it is an input", "rename the input")
    if not _has_skipped_rows(path):
        what = f"skipped rows are written to {path}, but it contains something else"
        raise RmtoolError("E0601", what, "move or rename that file")


def _has_skipped_rows(path: Path) -> bool:
    """Return whether it is a file of skipped rows, or an empty one."""
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise RmtoolError("E0501", f"cannot read {path}: {error.strerror}", "move or rename that file") from error
    return not start or _WRITTEN.match(start) is not None
