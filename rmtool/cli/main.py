"""The commands: they parse, delegate, and end with the right exit code.

Importing this module must not import torch: `rmtool --help` answers at once. What computes is imported inside the
commands, under `captured`, so that other libraries' words and bars go to a log file and the terminal is rmtool's own.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from rmtool import __version__
from rmtool.errors import ExitCode, RmtoolError

app = typer.Typer(
    name="rmtool",
    help="Train, evaluate, score with and publish reward models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: importing rich for its boxes would double the time of --help
)

RUNS = Path("runs")

SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one recipe value; repeatable.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
PrecisionOption = Annotated[str | None, typer.Option(help="fp32 or bf16. Default: as the model was trained.")]
TokensOption = Annotated[int, typer.Option(min=1, help="Unique tokens per forward; bounds memory, changes no reward.")]
MaxLengthOption = Annotated[int | None, typer.Option(min=2, help="Tokens per conversation. Default: as in training.")]
TemplateOption = Annotated[
    str | None, typer.Option(help="A chat template for a model without one: a .jinja file, or tulu.")
]


BadRowOption = Annotated[
    str, typer.Option(help="A malformed row: fail, or skip it (set aside in NAME.rejects.jsonl, exit code 1).")
]
AllowEmptyOption = Annotated[bool, typer.Option("--allow-empty", help="Accept responses without text.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"rmtool {__version__}")
        raise typer.Exit


@app.command()
def train(
    recipe: Annotated[
        str, typer.Option(help="A bundled recipe (debug, smollm2-135m, tulu3-8b) or a .yaml file.")
    ] = "debug",
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of the model to train. Overrides model.path.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="File or Hub dataset to train on; repeatable.")] = None,
    eval_data: Annotated[list[str] | None, typer.Option(help="File or Hub dataset to evaluate on; repeatable.")] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/RECIPE.")] = None,
    set_: SetOption = None,
    on_bad_row: Annotated[
        str | None, typer.Option(help="A malformed row: fail, or skip it (set aside in rejects.jsonl, exit code 1).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished run in the run folder.")] = False,
    nodes: Annotated[int | None, typer.Option(min=1, help="Run this command once on each of so many nodes.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Processes on each node, one per GPU.")] = None,
    node_rank: Annotated[int | None, typer.Option(min=0, help="Which node this is, from 0.")] = None,
    main_address: Annotated[str | None, typer.Option(help="Name or address of node 0.")] = None,
    main_port: Annotated[int | None, typer.Option(min=1, max=65535, help="A free port on node 0.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the launch commands, and stop.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a reward model from preference pairs, as a recipe says.

    On several nodes, run it once on each; nodes and addresses come from Slurm's or torchrun's variables, or as options.
    """
    from rmtool import recipe as recipes
    from rmtool.launch.launcher_env import find_site, require_told

    site = find_site(os.environ)
    if nodes is None:
        require_told(site, os.environ)
    overrides: list[tuple[str, Any]] = []
    for name, told, given in (
        ("nodes", site.nodes, nodes),
        ("processes_per_node", site.processes_per_node, gpus_per_node),
        ("main_address", site.main_address, main_address),
        ("main_port", site.main_port, main_port),
    ):
        if (value := told if given is None else given) is not None:
            overrides.append((f"launch.{name}", value))
    if model:
        overrides += [("model.path", model), ("model.weights", "pretrained")]
    if data:
        overrides.append(("data.train", data))
    if eval_data:
        overrides += [("data.eval", eval_data), ("data.holdout", 0)]
    if on_bad_row:
        overrides.append(("data.on_bad_row", on_bad_row))
    overrides += [recipes.parse_set(text) for text in set_ or []]  # last: what is written out wins
    resolved = recipes.load_recipe(recipe, overrides)
    from rmtool.cli.commands import train_command

    node = site.node_rank if node_rank is None else node_rank
    if node is None and resolved.launch.nodes > 1 and not dry_run:
        hint = "pass --node-rank, or --nodes 1 to train on this one alone"
        raise RmtoolError("E0207", f"{resolved.launch.nodes} nodes, and which of them this is, is not known", hint)
    if node and node_rank is None and node >= resolved.launch.nodes:
        what = f"{site.told_by} says that this is node {node}, and the recipe is for {resolved.launch.nodes}"
        raise RmtoolError("E0207", what, "leave out --nodes, or start it on fewer nodes; --node-rank 0 to run it here")
    where = output or RUNS / resolved.name
    train_command(
        resolved,
        where,
        overwrite=overwrite,
        dry_run=dry_run,
        as_json=as_json,
        node=node or 0,
        told_by=site.told_by if (nodes, gpus_per_node) == (None, None) else "",
    )


@app.command(name="eval")
def eval_(
    model: Annotated[str, typer.Argument(help="A run folder, a checkpoint folder or a Hub id.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="File or Hub dataset (owner/name:split). Default: the pairs that the model's run held out."),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="OURS=THEIRS", help="Read a field under another name, prompt=question; repeatable."),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Sampled pairs to show.")] = 5,
    precision: PrecisionOption = None,
    max_length: MaxLengthOption = None,
    on_long: Annotated[
        str | None, typer.Option(help="A pair over the limit: error, drop or truncate_prompt. Default: as in training.")
    ] = None,
    allow_empty: AllowEmptyOption = False,
    on_bad_row: BadRowOption = "fail",
    tokens_per_pack: TokensOption = 8192,
    chat_template: TemplateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Report the eval/rm/* metrics on held-out pairs, per subset too."""
    from rmtool.cli.commands import Reading, eval_command
    from rmtool.recipe import parse_column

    columns = tuple(parse_column(text) for text in column or [])
    reading = Reading(precision, max_length, on_long, allow_empty, tokens_per_pack, chat_template, on_bad_row, columns)
    eval_command(model, data, samples, reading, as_json=as_json)


@app.command()
def score(
    responses: Annotated[Path, typer.Argument(help="JSONL rows with prompt and response(s), or messages.")],
    model: Annotated[
        str | None, typer.Option(help="Default: $RMTOOL_MODEL, else the newest run, else the Tulu 3 model.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Default: responses.scored.jsonl beside the input.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    precision: PrecisionOption = None,
    max_length: MaxLengthOption = None,
    on_long: Annotated[str, typer.Option(help="A conversation over the limit: error or truncate_prompt.")] = "error",
    allow_empty: AllowEmptyOption = False,
    on_bad_row: BadRowOption = "fail",
    tokens_per_pack: TokensOption = 8192,
    chat_template: TemplateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add a reward to every response of a JSONL file."""
    from rmtool.cli.commands import Reading, score_command

    reading = Reading(precision, max_length, on_long, allow_empty, tokens_per_pack, chat_template, on_bad_row)
    score_command(responses, model, output, reading, overwrite=overwrite, as_json=as_json)


@app.command()
def push(
    checkpoint: Annotated[str, typer.Argument(help="A run folder or a checkpoint folder.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hugging Face Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make the repository public.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, and stop.")] = False,
) -> None:
    """Publish a checkpoint to the Hugging Face Hub."""
    from rmtool.cli.commands import push_command

    push_command(checkpoint, repo_id, public=public, dry_run=dry_run)


def main(arguments: list[str] | None = None) -> None:
    """Run a command; errors are shown once, here, in one form."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # As an exception, so that children are stopped and temporary files removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app(arguments, standalone_mode=True)
    except RmtoolError as error:
        _show(error, arguments)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        sys.exit(ExitCode.INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - a bug: said in one form, with where to look
        what = f"a bug in rmtool: {type(error).__name__}: {error}"
        _show(RmtoolError("E7001", what, "run again with RMTOOL_DEBUG=1 and report what it shows"), arguments)


def _show(error: RmtoolError, arguments: list[str]) -> None:
    """Say what is wrong, and end with its exit code."""
    from rmtool.ui import TerminalUi, print_json

    if os.environ.get("RMTOOL_DEBUG") == "1":
        traceback.print_exc()
    ui = TerminalUi()
    if "--json" in arguments:
        print_json({"error": error.as_dict()}, ui)
    ui.error(error)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
