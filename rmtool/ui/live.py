"""The live view of a training run on a terminal: its last step, the curves of the whole run, and the last events.

In: the metrics of each step, as metrics.jsonl has them, and events such as evaluations and snapshots. Out: a rich
renderable, as wide as the terminal.
Cost: a few additions per step; a curve keeps at most 2 * CURVE_POINTS sums, however long the run is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

CURVE_POINTS = 32  # columns of a sparkline
WIDEST = 120  # columns of the view
RECENT_STEPS = 20  # steps in the mean that speed and remaining time are computed from
CURVE_KEYS = ("step", "train/rm/loss", "train/rm/accuracy")
_LEVELS = "▁▂▃▄▅▆▇█"

Numbers = Mapping[str, float | int | None]


@dataclass
class Curve:
    """Means of a series of any length: neighbors are merged when there are 2 * CURVE_POINTS of them."""

    sums: list[tuple[float, int]] = field(default_factory=list)
    per_point: int = 1  # values in a complete point

    def add(self, value: float) -> None:
        """Append a value."""
        if self.sums and self.sums[-1][1] < self.per_point:
            total, count = self.sums[-1]
            self.sums[-1] = (total + value, count + 1)
            return
        if len(self.sums) == 2 * CURVE_POINTS:
            pairs = zip(self.sums[::2], self.sums[1::2], strict=True)
            self.sums = [(a + b, m + n) for (a, m), (b, n) in pairs]
            self.per_point *= 2
        self.sums.append((value, 1))

    def sparkline(self) -> str:
        """Return at most CURVE_POINTS characters, from the lowest mean to the highest."""
        step = -(-len(self.sums) // CURVE_POINTS) or 1
        groups = (self.sums[at : at + step] for at in range(0, len(self.sums), step))
        means = [sum(total for total, _ in group) / sum(count for _, count in group) for group in groups]
        low, high = min(means, default=0.0), max(means, default=0.0)
        return "".join(_LEVELS[round((mean - low) / (high - low) * 7)] if high > low else _LEVELS[3] for mean in means)


@dataclass
class LiveView:
    """What is shown of a run: step `done` of `total`.

    started: time.monotonic of its first step in this process.
    events:  the last text of each kind: `evaluation`, `snapshot`
    """

    name: str
    total: int
    done: int = 0
    last: dict[str, float | int | None] = field(default_factory=dict)
    loss: Curve = field(default_factory=Curve)
    accuracy: Curve = field(default_factory=Curve)
    recent: list[tuple[float, float, float]] = field(default_factory=list)  # seconds, unique tokens, all tokens
    events: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def step(self, numbers: Numbers) -> None:
        """Show a step; values that it does not have (a skipped step) keep the ones before."""
        self.done = int(numbers["step"] or 0)
        self.last |= {key: value for key, value in numbers.items() if value is not None}
        for key, curve in zip(CURVE_KEYS[1:], (self.loss, self.accuracy), strict=True):
            if (value := numbers.get(key)) is not None:
                curve.add(value)
        unique = numbers.get("unique_tokens") or 0
        if seconds := numbers.get("step_seconds"):
            self.recent = [*self.recent[1 - RECENT_STEPS :], (seconds, unique, numbers.get("tokens") or unique)]

    def summary(self) -> str:
        """Return loss and accuracy of the last step, for a progress line."""
        named = (("loss", "train/rm/loss", ".3f"), ("acc", "train/rm/accuracy", ".2f"))
        return " ".join(f"{name} {self.last[key]:{form}}" for name, key, form in named if key in self.last)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.max_width >= 96
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        share = f"{self.done / self.total:.1%}" if self.total else ""
        steps = f"step {self.done:,} of {self.total:,} ({share})"
        bar.add_row(steps, ProgressBar(total=self.total or 1, completed=self.done), self._times())
        title = Text(f"Training {self.name}", "bold")
        width = min(options.max_width, WIDEST)
        yield Panel(Group(bar, *self._grids(wide)), title=title, title_align="left", width=width)

    def _times(self) -> str:
        elapsed = time.monotonic() - self.started
        text = f"{duration(elapsed)} elapsed"
        if self.recent and self.done < self.total:
            text += f", {duration(self._mean(0) * (self.total - self.done))} left"
        return text

    def _mean(self, column: int) -> float:
        return sum(row[column] for row in self.recent) / len(self.recent)

    def _grids(self, wide: bool) -> list[Table]:
        rows = self._rows()
        split = -(-len(rows) // 2) if wide else len(rows)
        grid = Table.grid(padding=(0, 2), expand=True)
        for _ in range(2 if wide else 1):
            grid.add_column(style="bold", no_wrap=True)
            grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        for left in range(split):
            right = rows[split + left] if split + left < len(rows) else ("", "")
            grid.add_row(*rows[left], *(right if wide else ()))
        events = Table.grid(padding=(0, 2))
        events.add_column(style="bold", no_wrap=True)
        events.add_column()
        for kind, text in self.events.items():
            events.add_row(f"last {kind}", Text(text))
        return [grid, events] if self.events else [grid]

    def _rows(self) -> list[tuple[str, str]]:
        """Labels and values, in the order of importance."""

        def value(key: str, form: str) -> str:
            number = self.last.get(key)
            return "-" if number is None else format(number, form)

        rows = [
            ("loss", f"{value('train/rm/loss', '.4f')}  {self.loss.sparkline()}"),
            ("accuracy", f"{value('train/rm/accuracy', '.4f')}  {self.accuracy.sparkline()}"),
            ("reward margin", value("train/rm/reward_margin", ".4f")),
            ("learning rate", value("train/rm/lr", ".3g")),
            ("gradient norm", value("grad_norm", ".4g")),
        ]
        seconds, unique, tokens = (self._mean(column) for column in range(3)) if self.recent else (0.0, 0.0, 0.0)
        if seconds:
            saved = f" ({1 - unique / tokens:.0%} saved by prefix sharing)" if tokens > unique else ""
            rows.append(("unique tokens", f"{unique / seconds:,.0f}/s{saved}"))
        if memory := self.last.get("peak_memory"):
            rows.append(("peak memory", f"{memory / 2**30:.1f} GiB"))
        return rows


def duration(seconds: float) -> str:
    """Return seconds as the two largest units: 42 s, 3 min 05 s, 2 h 07 min, 3 d 04 h."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02} s"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60:02} min"
    return f"{total // 86400} d {total % 86400 // 3600:02} h"
