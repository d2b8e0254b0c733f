"""User errors: one exception class with an id, a place and a hint, and the registry of all ids.

In: what is wrong, raised where it is found. Out: the text or JSON that every command prints, and the exit code.
Bugs are not RmtoolErrors: they fail an `assert` or raise anything else, and end with exit code 70.
`python -m rmtool.errors > docs/errors.md` writes the table of all ids.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

__all__ = [
    "ERRORS",
    "ExitCode",
    "Place",
    "RmtoolError",
    "Stopped",
    "first_line",
    "format_error",
]


class ExitCode(IntEnum):
    """Exit codes of all commands, for scripts."""

    OK = 0  # completed
    PARTIAL = 1  # completed, but rows were skipped or dropped, or rewards are NaN or inf
    USAGE = 2  # invalid usage or recipe; nothing was started
    DATA = 3  # invalid input data
    MODEL = 4  # invalid model, tokenizer or checkpoint
    MACHINE = 5  # this machine: disk, permissions, memory, hardware
    CONFLICT = 6  # output exists or is in use
    REMOTE = 7  # the Hub, the network or a tracker failed
    TRAINING = 8  # training failed: NaN or inf, or a process died
    BUG = 70  # internal error: a bug in rmtool
    PREEMPTED = 75  # stopped early by a signal or the time limit, state saved: the same command resumes
    INTERRUPTED = 130  # Ctrl-C; the state is saved as for 75


# Every id, and what it means. The first two digits are the exit code.
ERRORS = {
    "E0201": "file, recipe or chat template not found, or not a supported file",
    "E0202": "the recipe is not valid YAML",
    "E0203": "unknown configuration or split of a Hub dataset",
    "E0204": "unknown recipe key or field name",
    "E0205": "invalid recipe value",
    "E0206": "invalid value of a command-line option",
    "E0207": "the number of nodes or processes, the node rank or the main address is missing or inconsistent",
    "E0208": "ranks differ in recipe, model, data, tokenizer or package versions",
    "E0209": "a setting cannot be reached in the optimizer steps of the run",
    "E0271": "invalid repo id",
    "E0272": "symlinks in the checkpoint point to files that are not uploaded",
    "E0273": "no usable Hugging Face token",
    "E0274": "the Hub rejected the token",
    "E0275": "the token has no write access to the repository",
    "E0276": "the repository is public, but a private one was requested",
    "E0277": "the Hub rejected the metadata of the model card",
    "E0278": "push while HF_HUB_OFFLINE is set",
    "E0301": "a line or file cannot be parsed, or changed while it was read",
    "E0302": "no rows or pairs are left",
    "E0303": "invalid row",
    "E0304": "chosen and rejected response have the same token ids",
    "E0305": "a conversation exceeds the max length",
    "E0306": "empty response",
    "E0307": "a conversation cannot be rendered by the chat template or tokenized",
    "E0308": "cannot select this number of rows, or hold out this number of pairs",
    "E0401": "the model has no score head",
    "E0402": "the model has more than one label",
    "E0403": "the tokenizer or chat template differs from the one in training",
    "E0404": "model, checkpoint or tokenizer not found, or cannot be loaded",
    "E0405": "the chat template is missing or unsupported",
    "E0406": "unsupported model class or score head",
    "E0407": "the checkpoint has no safetensors weights",
    "E0408": "the checkpoint's manifest is corrupted",
    "E0409": "a reward is NaN or inf",
    "E0410": "the max length exceeds the limit of the model's RoPE scaling",
    "E0411": "the max length exceeds the model's position embeddings",
    "E0412": "padding changes the rewards of this model",
    "E0413": "the checkpoint is a PEFT adapter",
    "E0414": "the checkpoint's weights are quantized",
    "E0415": "a token id exceeds the model's embedding",
    "E0416": "fp16 cannot hold the checkpoint's weights",
    "E0471": "the folder is not a complete checkpoint",
    "E0472": "a weights file is corrupted",
    "E0501": "a file cannot be read or written",
    "E0502": "writing failed, e.g. no space left on device",
    "E0503": "out of memory",
    "E0504": "torch.compile failed",
    "E0505": "4-bit weights need a CUDA device and bitsandbytes",
    "E0506": "a node does not see the run folder of node 0",
    "E0507": "a package that a setting requires is not installed",
    "E0570": "a file of the checkpoint cannot be read",
    "E0601": "output exists",
    "E0602": "another process is training in the run folder",
    "E0603": "recipe, data, model, tokenizer or package versions changed since the snapshot",
    "E0604": "the training state in a snapshot is of another model or other trainable parameters",
    "E0701": "model or dataset not found locally or on the Hub",
    "E0702": "a tracker failed, and the recipe has track.strict",
    "E0771": "the connection to the Hub failed",
    "E0772": "the Hub timed out",
    "E0773": "the Hub returned an error",
    "E0774": "unexpected response from the Hub",
    "E0775": "the Hub's storage rejected a file",
    "E0801": "a training process died",
    "E0802": "loss or gradient norm is NaN or inf",
    "E0803": "the parent rmtool process has exited",
    "E0805": "lost the connection to another rank",
    "E7001": "internal error: a bug in rmtool",
}


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a user's file, `file:line:column`, as far as it is known. Lines and columns count from 1."""

    file: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)


class RmtoolError(Exception):
    """An error that the user can fix.

    Args:
        id: a key of `ERRORS`; its first two digits are the exit code (E0303 exits with 3).
        what: what is wrong, with the value: one lowercase line without a period.
        hint: what to do, as one imperative with a flag, key, path or valid value; one line per kind of several rows.
            A setting is called by its recipe key: `in_words_of` (cli/options.py) replaces it with the option of a
            command that reads no recipe.
        place: the file, line and column.
        found: the invalid value.
        rows: several invalid rows, or problems of a recipe, each with its place.
        more: the number of rows that are not listed.
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
        assert id in ERRORS, id
        super().__init__(what)
        self.id, self.what, self.hint, self.place, self.found = id, what, hint, place, found
        self.rows, self.more = rows, more
        self.exit_code = ExitCode(int(id[1:3]))

    def summary(self) -> str:
        """Return what is wrong and the value, in one line."""
        return f"{self.what} (found: {self.found})" if self.found else self.what

    def __reduce__(self) -> tuple[Any, ...]:
        return RmtoolError, (self.id, self.what, self.hint, self.place, self.found, self.rows, self.more)

    def as_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints under "error"."""
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
        """Rebuild an error from `as_dict`: a worker process writes it to a file, the launcher prints it."""
        place = Place(data["file"], data["line"], data["column"]) if data["file"] else None
        rows, more = tuple(data.get("rows", ())), data.get("more_rows", 0)
        return cls(data["code"], data["message"], data["hint"], place, data["found"], rows, more)


class Stopped(BaseException):
    """The end of a command that was asked to stop. Not an Exception: no library may take it for a failure.

    Args:
        text: one line for the user; empty if a training process has said it.
        exit_code: of the command.
    """

    def __init__(self, text: str, exit_code: int):
        super().__init__(text)
        self.exit_code = int(exit_code)


def format_error(error: RmtoolError) -> str:
    """Return an error as it is printed on the terminal, without color."""
    lines = [f"error[{error.id}]: {error.what}"]
    if error.rows:
        lines += [f"  --> {row}" for row in error.rows]
        lines += [f"  and {error.more:,} more"] if error.more else []
    elif error.place:
        lines.append(f"  --> {error.place}")
    if error.found:
        lines.append(f"  found: {error.found}")
    lines += [f"  hint: {hint}" for hint in error.hint.splitlines()]
    return "\n".join(lines)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def error_table() -> str:
    """Return docs/errors.md: all ids as a Markdown table."""
    rows = [f"| {id} | {meaning} | {int(id[1:3])} |" for id, meaning in ERRORS.items()]
    title = "# Errors\n\nGenerated by `python -m rmtool.errors > docs/errors.md`.\n"
    return "\n".join((title, "| id | meaning | exit code |", "|---|---|---|", *rows, ""))


if __name__ == "__main__":
    sys.stdout.write(error_table())
