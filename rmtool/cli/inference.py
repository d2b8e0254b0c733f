"""What `eval` and `score` share: their options, loading the model, and the notes at the end of their output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmtool.errors import RmtoolError

if TYPE_CHECKING:
    from rmtool.data.rejects import Rejects
    from rmtool.model.loading import LoadedModel
    from rmtool.ui import TerminalUi


@dataclass(frozen=True)
class InferenceOptions:
    """How eval and score read conversations and run the model; None follows the checkpoint's manifest."""

    precision: str | None
    max_length: int | None
    on_long: str | None
    allow_empty: bool
    tokens_per_pack: int
    chat_template: str | None
    on_bad_row: str = "fail"
    columns: tuple[tuple[str, str], ...] = ()

    def rejects(self, output: Path, inputs: Sequence[str]) -> Rejects:
        """Where invalid rows of the inputs go: `output` with the ending .rejects.jsonl, or into the error.

        Raises:
            RmtoolError: E0601 a file of the user's has that name.
        """
        from rmtool.data.rejects import Rejects, require_free

        if self.on_bad_row != "skip":
            return Rejects()
        path = with_ending(output, ".rejects.jsonl")
        require_free(path, inputs)
        return Rejects(path)

    def check(self, on_long: tuple[str, ...]) -> None:
        """Raises:
        RmtoolError: E0206 an option has a value that is not allowed.
        """
        for option, value, allowed in (
            ("--precision", self.precision, ("fp32", "bf16")),
            ("--on-bad-row", self.on_bad_row, ("fail", "skip")),
            ("--on-long", self.on_long, on_long),
        ):
            if value not in (None, *allowed):
                raise RmtoolError("E0206", f"invalid {option}: {value}", f"use {' or '.join(allowed)}")


def load(folder: Path, options: InferenceOptions, ui: TerminalUi) -> LoadedModel:
    """Load the model as eval and score both use it, and print what the user should know of it."""
    from rmtool.model.loading import load_for_inference

    loaded = load_for_inference(
        folder,
        precision=options.precision,
        max_length=options.max_length,
        on_long=options.on_long,
        on_empty="keep" if options.allow_empty else None,
        chat_template=options.chat_template,
    )
    for notice in loaded.notices:
        ui.say(f"note: {notice}")
    return loaded


def print_skipped(rejects: Rejects, ui: TerminalUi) -> None:
    """Print how many invalid rows were skipped, and where they are."""
    if rejects.count:
        ui.say(f"note: skipped {rejects.count:,} invalid rows, see {rejects.path}")


def print_sharing(loaded: LoadedModel, ui: TerminalUi) -> None:
    """Print that prefix sharing is off; last, so that a slow run shows why it was slow."""
    if loaded.padded_reason:
        from rmtool.packing.prefix_sharing import describe_sharing

        ui.say(f"note: prefix sharing: {describe_sharing(loaded.padded_reason)}")


def sharing_fields(reason: str | None) -> dict[str, Any]:
    """The fields on prefix sharing in `--json` output; `reason` is why batches are padded, None where they are not."""
    return {"prefix_sharing": reason is None, "padded_reason": reason}


def with_ending(path: Path, ending: str) -> Path:
    """`path` with another ending in place of a data file's."""
    name = path.name
    for suffix in (".gz", ".jsonl", ".json", ".parquet"):
        name = name.removesuffix(suffix)
    return path.with_name(name + ending)
