"""Options that several commands share, with one help text each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RUNS = Path("runs")  # default parent of run folders, in the working directory

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a recipe value. Can be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
PrecisionOption = Annotated[
    str | None, typer.Option(help="Compute precision, fp32 or bf16. [default: from the checkpoint]", show_default=False)
]
TokensOption = Annotated[
    int,
    typer.Option(min=1, help="Maximum unique tokens per forward pass. Lower it to save memory; rewards do not change."),
]
MaxLengthOption = Annotated[
    int | None, typer.Option(min=2, help="Maximum tokens per conversation. [default: from the checkpoint]")
]
TemplateOption = Annotated[
    str | None, typer.Option(help="Chat template to use instead of the tokenizer's: a .jinja file, or tulu.")
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FIELD=COLUMN",
        help="Read a field from a column, e.g. prompt=question; ignore=COLUMN leaves one unread. Can be repeated.",
    ),
]
BadRowOption = Annotated[
    str,
    typer.Option(help="What to do with invalid rows: fail, or skip (writes them to *.rejects.jsonl; exit code 1)."),
]
AllowEmptyOption = Annotated[bool, typer.Option("--allow-empty", help="Allow empty responses.")]
