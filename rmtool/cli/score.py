"""`rmtool score`: a reward for every response in a file.

In: a file of responses and a model. Out: the same rows with their rewards, in a new file.
Cost: one forward pass over the unique tokens.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmtool.cli.inference import (
    InferenceOptions,
    load,
    parse_columns,
    precision_fields,
    print_precision,
    print_sharing,
    print_skipped,
    sharing_fields,
    with_ending,
)
from rmtool.cli.options import (
    RUNS,
    AllowEmptyOption,
    BadRowOption,
    ColumnOption,
    FidelityOption,
    JsonOption,
    MaxLengthOption,
    PrecisionOption,
    TemplateOption,
    TokensOption,
)
from rmtool.errors import ExitCode, RmtoolError

if TYPE_CHECKING:
    from rmtool.model.loading import LoadedModel
    from rmtool.scoring.score import ScoreSummary
    from rmtool.ui import TerminalUi


def score(
    responses: Annotated[
        Path, typer.Argument(help="JSONL, JSON, parquet or Arrow file: rows with prompt and response(s), or messages.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Run folder, checkpoint folder or Hub id. "
            "[default: $RMTOOL_MODEL, else the newest run, else allenai/Llama-3.1-Tulu-3-8B-RM]"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Output file, .jsonl, .json (each also as .gz) or .parquet. "
            "[default: INPUT.scored.jsonl next to the input]"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    column: ColumnOption = None,
    precision: PrecisionOption = "auto",
    fidelity: FidelityOption = None,
    max_length: MaxLengthOption = None,
    on_long: Annotated[
        str, typer.Option(help="What to do with conversations longer than max length: error or truncate_prompt.")
    ] = "error",
    allow_empty: AllowEmptyOption = False,
    on_bad_row: BadRowOption = "fail",
    tokens_per_pack: TokensOption = 8192,
    chat_template: TemplateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score the responses in a file with a reward model."""
    options = InferenceOptions(
        *(precision, max_length, on_long, allow_empty, tokens_per_pack, chat_template, on_bad_row),
        parse_columns(column),
        fidelity,
    )
    options.check(("error", "truncate_prompt"))
    from rmtool.ui import redirect_output

    with redirect_output() as ui:
        summary = _score(responses, model, output, options, overwrite, as_json, ui)
    if summary.nonfinite or summary.skipped_rows:
        raise SystemExit(ExitCode.PARTIAL)


def _score(
    source: Path,
    model: str | None,
    output: Path | None,
    options: InferenceOptions,
    overwrite: bool,
    as_json: bool,
    ui: TerminalUi,
) -> ScoreSummary:
    from rmtool.checkpoint import default_model, resolve_checkpoint

    model = model or default_model(RUNS)
    ui.say(f"model: {model}")
    output = output or with_ending(source, ".scored.jsonl")
    output = Path(os.path.realpath(output)) if output.is_symlink() else output  # a rename would replace the link
    _check_output(source, output, overwrite)
    rejects = options.rejects(output, [str(source)])
    from rmtool.scoring.score import score_file

    loaded = load(resolve_checkpoint(model, None, ui), options, ui)
    with rejects:
        given = (source, output, loaded, options.tokens_per_pack, rejects, ui, options.row_options())
        summary = score_file(*given, options.fidelity)
    print_skipped(rejects, ui)
    _print_summary(model, output, loaded, summary, as_json, ui)
    print_precision(loaded, summary.fidelity, options.fidelity, ui)
    print_sharing(loaded, ui)
    return summary


def _print_summary(
    model: str, output: Path, loaded: LoadedModel, summary: ScoreSummary, as_json: bool, ui: TerminalUi
) -> None:
    from rmtool.ui import print_json

    if summary.unread_fields:
        ui.say(f"unread fields: {', '.join(summary.unread_fields)}")
    if summary.nonfinite:
        ui.say(f"note: {summary.nonfinite:,} rewards are NaN or inf, written as null")
    if summary.converted:
        names = ", ".join(summary.converted)
        ui.say(f"note: dates are written as text, bytes as base64, NaN and inf as null (fields: {names})")
    if as_json:
        more = precision_fields(loaded, summary.fidelity) | sharing_fields(loaded.padded_reason)
        print_json({"model": model, "output": str(output), **vars(summary), **more}, ui)
    else:
        responses = f"{summary.responses:,} response{'s' * (summary.responses != 1)}"
        ui.result(f"scored {responses} in {summary.rows:,} row{'s' * (summary.rows != 1)}: {output}")


def _check_output(source: Path, output: Path, overwrite: bool) -> None:
    from rmtool.checkpoint import check_writable
    from rmtool.data.rows import require_file
    from rmtool.scoring.output import require_supported

    require_file(str(source))
    if output.exists() and not output.is_file():  # a rename would replace a device, such as /dev/null
        raise RmtoolError("E0601", f"{output} is not a file", "pass a file name with --output")
    require_supported(output)
    if output.exists() and output.resolve() == source.resolve():
        raise RmtoolError("E0601", f"the output is the input: {output}", "pass a different --output")
    if output.exists() and not overwrite:
        raise RmtoolError("E0601", f"output exists: {output}", "pass a different --output, or --overwrite")
    check_writable(output)
