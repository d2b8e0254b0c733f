"""Shared parts of `eval` and `score`: checked options, model loading, and the notes at the end of the output.

In: command-line options. Out: a loaded model, notes on stderr, fields of the JSON output.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmtool.errors import RmtoolError

if TYPE_CHECKING:
    from rmtool.data.record import RowOptions
    from rmtool.data.rejects import Rejects
    from rmtool.model.fidelity import Fidelity
    from rmtool.model.loading import LoadedModel
    from rmtool.ui import TerminalUi


PRECISIONS = ("auto", "fp16", "bf16", "tf32", "fp32")


@dataclass(frozen=True)
class InferenceOptions:
    """Options of eval and score; None takes the value from the checkpoint's manifest."""

    precision: str
    max_length: int | None
    on_long: str | None
    allow_empty: bool
    tokens_per_pack: int
    chat_template: str | None
    on_bad_row: str = "fail"
    columns: tuple[tuple[str, str], ...] = ()
    fidelity: int | None = None

    def row_options(self) -> RowOptions:
        """Return how rows are read."""
        from rmtool.data.record import RowOptions

        return RowOptions(self.columns)

    def rejects(self, output: Path, inputs: Sequence[str]) -> Rejects:
        """Return where invalid rows go: `output` with the ending .rejects.jsonl, or an error that lists them.

        Raises:
            RmtoolError: E0601 when a file of the user has this name.
        """
        from rmtool.data.rejects import Rejects, require_free

        if self.on_bad_row != "skip":
            return Rejects()
        path = with_ending(output, ".rejects.jsonl")
        require_free(path, inputs)
        return Rejects(path)

    def check(self, on_long: tuple[str, ...]) -> None:
        """Check the options that have a fixed set of values.

        Raises:
            RmtoolError: E0206 when one has another value.
        """
        for option, value, allowed in (
            ("--precision", self.precision, PRECISIONS),
            ("--on-bad-row", self.on_bad_row, ("fail", "skip")),
            ("--on-long", self.on_long, on_long),
        ):
            if value not in (None, *allowed):
                raise RmtoolError(
                    "E0206", f"invalid {option}: {value}", f"use {', '.join(allowed[:-1])} or {allowed[-1]}"
                )


def parse_columns(texts: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    """Parse `FIELD=COLUMN` options.

    Raises:
        RmtoolError: E0206 when one has another form.
    """
    columns = tuple((name, column) for name, _, column in (text.partition("=") for text in texts or []))
    for text, (name, column) in zip(texts or [], columns, strict=True):
        if not name or not column:
            what = f"invalid --column {text}: must be FIELD=COLUMN"
            raise RmtoolError("E0206", what, "use this form, e.g. --column prompt=question")
    return columns


def load(folder: Path, options: InferenceOptions, ui: TerminalUi) -> LoadedModel:
    """Load a model for eval or score, and print its notices."""
    from rmtool.model.loading import load_for_inference

    loaded = load_for_inference(
        folder,
        precision=options.precision,
        max_length=options.max_length,
        on_long=options.on_long,
        on_empty="keep" if options.allow_empty else None,
        chat_template=options.chat_template,
        fidelity=options.fidelity != 0,
    )
    for notice in loaded.notices:
        ui.say(f"note: {notice}")
    return loaded


def print_skipped(rejects: Rejects, ui: TerminalUi) -> None:
    """Print the number of skipped rows and the path of the file that has them."""
    if rejects.count:
        ui.say(f"note: skipped {rejects.count:,} invalid row{'s' * (rejects.count != 1)}, see {rejects.path}")


def print_sharing(loaded: LoadedModel, ui: TerminalUi) -> None:
    """Print why prefix sharing is off, if it is: as the last line, so that the reason for a slow run is seen."""
    if loaded.padded_reason:
        from rmtool.packing.prefix_sharing import describe_sharing

        ui.say(f"note: prefix sharing: {describe_sharing(loaded.padded_reason)}")


def print_precision(loaded: LoadedModel, fidelity: Fidelity | None, requested: int | None, ui: TerminalUi) -> None:
    """Print what the rewards were computed in, how far they are from fp32, and what had to be repeated in fp32."""
    from rmtool.model.compiling import SHORT

    guard, precision = loaded.model.overflow_guard, loaded.model.precision
    if guard.repeated:
        ui.say(f"note: {guard.describe()}")
    if requested and not fidelity:
        reason = "rewards are computed in fp32" if precision == "fp32" else "out of memory in fp32"
        ui.say(f"note: fidelity not measured: {reason}")
    if fidelity:
        ui.say(f"fidelity ({precision}): {fidelity}")
    if loaded.model.compiled not in ("off", SHORT):
        ui.say(f"compiled layers: {loaded.model.compiled}")


def precision_fields(loaded: LoadedModel, fidelity: Fidelity | None) -> dict[str, Any]:
    """Return the JSON fields on precision."""
    return {
        "precision": loaded.model.precision,
        "fidelity": fidelity.as_dict() if fidelity else None,
        "fp32_packs": loaded.model.overflow_guard.repeated,
        "compiled_layers": loaded.model.compiled,
    }


def sharing_fields(reason: str | None) -> dict[str, Any]:
    """Return the JSON fields on prefix sharing; `reason` is why it is off, or None."""
    return {"prefix_sharing": reason is None, "padded_reason": reason}


def with_ending(path: Path, ending: str) -> Path:
    """Return `path` with a new ending instead of that of a data file."""
    name = re.sub(r"(\.(jsonl|json|parquet|arrow))?(\.gz)?$", "", path.name, flags=re.IGNORECASE)
    return path.with_name(name + ending)
