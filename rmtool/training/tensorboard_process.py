"""TensorBoard in a process of its own (`follower.py`).

In: the recipe, plan and system figures, and rows of metrics. Out: event files in RUN/tensorboard: a scalar per metric,
and the rest as text.
Cost: the import of torch, and a write per step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rmtool.training.eval_samples import COLUMNS, read_samples
from rmtool.training.follower import STARTED, Say, follow_run


class EventFiles:
    """The event files of a run."""

    def __init__(self, writer: Any, logged: int, folder: Path):
        self.writer, self.first, self.folder = writer, logged + 1, folder

    def log(self, row: dict[str, Any]) -> None:
        step = int(row["step"])
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, step)
        if "eval/rm/loss" in row:
            samples = [dict(zip(COLUMNS, sample, strict=True)) for sample in read_samples(self.folder, step)]
            self.writer.add_text("eval/samples", "\n\n".join(map(_as_text, samples)), step)
        self.writer.flush()  # waits until it is written, and raises if it is not

    def finish(self, completed: bool) -> None:
        self.writer.close()


def _as_text(value: object) -> str:
    """Return JSON as Markdown that shows it as it is."""
    return "\n".join(f"    {line}" for line in json.dumps(value, indent=1, ensure_ascii=False).splitlines())


def start(given: dict[str, Any], say: Say) -> EventFiles:
    """Open the event files, and say where they are. Steps that are taken again replace those of earlier files."""
    from torch.utils.tensorboard import SummaryWriter

    folder, logged = Path(given["folder"]), given["logged"]
    writer = SummaryWriter(str(folder), purge_step=logged + 1 if logged else None)
    for name, value in given["texts"].items():
        writer.add_text(name, _as_text(value), logged)
    writer.flush()
    say(STARTED, f"TensorBoard: tensorboard --logdir {folder}")
    return EventFiles(writer, logged, Path(given["metrics"]).parent)


if __name__ == "__main__":
    follow_run("TensorBoard", start)
