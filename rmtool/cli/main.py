"""The entry point: registers the commands, and ends each with the right exit code.

In: command-line arguments. Out: an exit code; errors are printed here, in one form. Cost: importing the commands
imports typer and no more, so that `rmtool --help` answers at once. What computes is imported inside the commands.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Annotated

import typer

from rmtool import __version__
from rmtool.cli.eval import eval_
from rmtool.cli.push import push
from rmtool.cli.score import score
from rmtool.cli.train import train
from rmtool.errors import ExitCode, RmtoolError

app = typer.Typer(
    name="rmtool",
    help="Train and evaluate reward models, score responses, and publish checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: importing rich for its boxes would double the time of --help
)
app.command()(train)
app.command(name="eval")(eval_)
app.command()(score)
app.command()(push)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"rmtool {__version__}")
        raise typer.Exit


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
    """Print an error and exit with its code."""
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
