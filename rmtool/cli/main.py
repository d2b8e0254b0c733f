"""The entry point: registers the commands, prints errors and exits with their codes.

In: command-line arguments. Out: an exit code; errors are printed here, in one form.
Cost: importing the commands imports typer and nothing else, so that `rmtool --help` is fast; the commands import torch
and transformers when they run.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated

import typer

from rmtool import __version__
from rmtool.cli.eval import eval_
from rmtool.cli.options import in_words_of
from rmtool.cli.push import push
from rmtool.cli.score import score
from rmtool.cli.train import train
from rmtool.errors import ExitCode, RmtoolError, Stopped, first_line
from rmtool.redaction import redact, redacted_output

# torch's allocator then grows its segments: packs of many lengths would leave gaps between fixed ones. Processes that
# `train` starts inherit it; torch reads it when it allocates on a GPU for the first time.
_ALLOCATOR = "PYTORCH_ALLOC_CONF", "expandable_segments:True"
_ALLOCATOR_NAMES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}
# How long threads of OpenMP spin before they sleep. Where others use the same cores, they take time from those they
# wait for: a step took up to 65 times as long beside a program with as many threads, with this 3.4 times
# (scripts/bench/SPEED.md). torch reads it when it is imported; processes that `train` starts inherit it.
_SPINNING = "GOMP_SPINCOUNT", "5000"
_SPINNING_NAMES = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}

_TILDE = re.compile(r"^(--[a-z-]+=)?(~.*)", re.DOTALL)  # a shell leaves it in quotes, and in --option=~/path

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
    try:
        Path.home()
    except RuntimeError as error:  # libraries would make a folder named ~ in the working directory
        what = "cannot find the home folder: $HOME is not set"
        raise RmtoolError("E0501", what, "set HOME to a writable folder") from error


def _expand(path: re.Match[str]) -> str:
    return (path[1] or "") + os.path.expanduser(path[2])


def main(arguments: list[str] | None = None) -> None:
    """Run a command. All errors are printed here, in one form, and nothing with an access token."""
    with redacted_output():
        _main(arguments)


def _main(arguments: list[str] | None) -> None:
    for setting, names in ((_ALLOCATOR, _ALLOCATOR_NAMES), (_SPINNING, _SPINNING_NAMES)):
        if not names & os.environ.keys():  # nothing set by the user
            os.environ.update([setting])
    arguments = [_TILDE.sub(_expand, each) for each in (sys.argv[1:] if arguments is None else arguments)]
    # As an exception, so that children are stopped and temporary files removed on the way out.
    for number in (signal.SIGTERM, signal.SIGUSR1):  # until `train` has its own handlers
        signal.signal(number, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app(arguments, standalone_mode=True)
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # a closed pipe, which must not look like skipped rows
            sys.exit(128 + signal.SIGPIPE)
        raise
    except RmtoolError as error:
        _show(error, arguments)
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n" if str(stopped) else "")
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        sys.exit(ExitCode.INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - a bug: its traceback goes to the log file
        _show(_full_disk(error) or _log_bug(error), arguments)


def _full_disk(error: Exception) -> RmtoolError | None:
    """Return the error for a disk that is full, where stdout or a temporary file is."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = f"cannot write {error.filename or 'the output'}: {error.strerror}"
        return RmtoolError("E0502", what, "free disk space")
    return None


def _log_bug(bug: Exception) -> RmtoolError:
    """Write the traceback of a bug to the log file, and return the error that names the file."""
    from rmtool.ui import log_path, open_log

    what = f"internal error: {type(bug).__name__}: {first_line(bug)}"
    try:
        with open_log() as log:
            start = f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} rmtool {__version__}: {what}\n"
            log.write(redact(start + traceback.format_exc()).encode("utf-8", "backslashreplace"))
    except (RmtoolError, OSError):  # no log file: only the terminal is left
        traceback.print_exc()
        return RmtoolError("E7001", what, "report it with the traceback above")
    return RmtoolError("E7001", what, f"see the traceback in {log_path()} and report it")


def _show(error: RmtoolError, arguments: list[str]) -> None:
    """Print an error in the words of the command, with its traceback if RMTOOL_DEBUG=1, and exit with its code."""
    from rmtool.ui import TerminalUi, print_json

    if os.environ.get("RMTOOL_DEBUG") == "1":
        traceback.print_exc()
    reword = functools.partial(in_words_of, arguments[0] if arguments else "")
    error.what, error.hint, error.rows = reword(error.what), reword(error.hint), tuple(map(reword, error.rows))
    ui = TerminalUi()
    if "--json" in arguments:
        with contextlib.suppress(OSError):  # stdout may be what failed
            print_json({"error": error.as_dict()}, ui)
    ui.error(error)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
