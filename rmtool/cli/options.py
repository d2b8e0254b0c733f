"""Options that several commands share, with one help text each."""

from __future__ import annotations

import re
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
    str,
    typer.Option(help="Compute precision: auto (fp16 on a GPU, fp32 on a CPU), fp16, bf16, tf32 or fp32."),
]
FidelityOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Number of responses whose rewards are also computed in fp32, and compared, unless all are in fp32; 0 for "
        "none. [default: 64, at most a 32nd of the responses, none below 256]",
    ),
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

# How commands without a recipe set what a hint calls by its recipe key.
OPTIONS = {
    "data.on_empty=keep": "--allow-empty",
    "data.columns.": "--column ",
    "data.max_length": "--max-length",
    "data.on_long": "--on-long",
    "model.chat_template": "--chat-template",
    "train.precision": "--precision",
    "train.tokens_per_pack": "--tokens-per-pack",
    "hub.public=true": "--public",
}
_SET = re.compile(rf"(set )?({'|'.join(map(re.escape, OPTIONS))})(=?)")


def in_words_of(command: str, text: str) -> str:
    """Return a message with recipe keys as the options of `command`, if that reads no recipe."""
    if command == "train":
        return text
    return _SET.sub(lambda at: ("pass " if at[1] else "") + OPTIONS[at[2]] + (" " if at[3] else ""), text)
