"""The user's mistakes, as one exception with an id, a place and one thing to do next.

In: what went wrong, said once where it is noticed. Out: the text (or JSON) that every command prints for it, and the
process's exit code. Our own mistakes are `assert`s; they end as exit code 70 with a request to report them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """What a script may branch on."""

    OK = 0  # done, all of it
    SET_ASIDE = 1  # ran to the end; some rows were set aside, or the answer is "no"
    USAGE = 2  # usage or recipe error, nothing started
    DATA = 3  # bad input data
    MODEL = 4  # bad model, tokenizer or checkpoint
    MACHINE = 5  # this machine: disk, permission, memory
    CONFLICT = 6  # the output is taken
    REMOTE = 7  # a remote service failed
    TRAINING = 8  # training failed: not finite, or a process died
    BUG = 70  # a bug in rmtool
    INTERRUPTED = 130  # Ctrl-C


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the user's files: `file:line:column`, as much of it as is known. Lines and columns count from 1."""

    file: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)


class RmtoolError(Exception):
    """A mistake that the user can mend.

    Args:
        id: "E" and four digits; the first two are the exit code (E0312 exits with 3).
        what: one sentence, what is wrong.
        hint: one thing to do next.
        place: where, if it is in a file.
        found: what stood there, if that helps.
        rows: what is wrong with each of several rows, a sentence with its place each.
        more: how many rows beside those.
    """

    def __init__(
        self,
        id: str,
        what: str,
        hint: str,
        place: Place | None = None,
        found: str | None = None,
        rows: tuple[str, ...] = (),
        more: int = 0,
    ):
        assert id[0] == "E", id
        assert len(id) == 5, id
        super().__init__(what)
        self.id, self.what, self.hint, self.place, self.found = id, what, hint, place, found
        self.rows, self.more = rows, more
        self.exit_code = ExitCode(int(id[1:3]))

    def __reduce__(self) -> tuple[Any, ...]:
        return RmtoolError, (self.id, self.what, self.hint, self.place, self.found, self.rows, self.more)

    def as_dict(self) -> dict[str, Any]:
        """The `--json` form, without the outer {"error": ...}."""
        place = self.place or Place("")
        return {
            "code": self.id,
            "exit": int(self.exit_code),
            "message": self.what,
            "file": place.file or None,
            "line": place.line,
            "column": place.column,
            "found": self.found,
            "hint": self.hint,
            **({"rows": list(self.rows), "more_rows": self.more} if self.rows else {}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RmtoolError:
        """The inverse of `as_dict`: a worker process writes its error to a file, the launcher shows it."""
        place = Place(data["file"], data["line"], data["column"]) if data["file"] else None
        rows, more = tuple(data.get("rows", ())), data.get("more_rows", 0)
        return cls(data["code"], data["message"], data["hint"], place, data["found"], rows, more)


def format_error(error: RmtoolError) -> str:
    """The one way an error looks on the terminal (without color)."""
    lines = [f"error[{error.id}]: {error.what}"]
    if error.rows:
        lines += [f"  --> {row}" for row in error.rows]
        lines += [f"  and {error.more:,} more"] if error.more else []
    elif error.place:
        lines.append(f"  --> {error.place}")
    if error.found:
        lines.append(f"  found: {error.found}")
    lines.append(f"  do: {error.hint}")
    return "\n".join(lines)


def first_line(error: BaseException) -> str:
    """Return the first line of a different library's message, to quote it in ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
