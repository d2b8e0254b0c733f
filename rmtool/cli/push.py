"""`rmtool push`: a checkpoint published to the Hugging Face Hub.

In: a checkpoint folder. Out: one commit in a Hub repository, whose URL is printed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rmtool.errors import RmtoolError


def push(
    checkpoint: Annotated[str, typer.Argument(help="A run folder or a checkpoint folder.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hugging Face Hub, owner/name.")],
    public: Annotated[bool, typer.Option("--public", help="Make the repository public. [default: private]")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files without uploading them.")] = False,
) -> None:
    """Publish a checkpoint to the Hugging Face Hub."""
    from rmtool.ui import redirect_output

    with redirect_output() as ui:
        from rmtool.checkpoint import resolve_checkpoint
        from rmtool.hub.push import push_checkpoint

        if not Path(checkpoint).exists():
            hint = "pass a run folder or a checkpoint folder"
            raise RmtoolError("E0404", f"checkpoint not found: {checkpoint}", hint)
        folder = resolve_checkpoint(checkpoint, None, ui)
        url = push_checkpoint(folder, repo_id, private=not public, ui=ui, dry_run=dry_run)
        if url:
            ui.result(url)
