"""What each command does, once its words are parsed: find the model, do the work, show the result.

Row 4 of the design, beside `cli`, which parses; kept apart because this half imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rmtool.config import Recipe
from rmtool.errors import ExitCode, Place, RmtoolError
from rmtool.ui import TerminalUi, captured, print_json

if TYPE_CHECKING:
    from rmtool.loading import Loaded

RUNS = Path("runs")
DEFAULT_EVAL_DATA = "allenai/reward-bench:filtered"


@dataclass(frozen=True)
class Reading:
    """How eval and score read conversations; None follows the checkpoint's manifest."""

    precision: str | None
    max_length: int | None
    on_long: str | None
    allow_empty: bool
    tokens_per_pack: int
    chat_template: str | None

    def check(self, on_long: tuple[str, ...]) -> None:
        if self.precision not in (None, "fp32", "bf16"):
            raise RmtoolError("E0206", f"--precision {self.precision} is unknown", "use fp32 or bf16")
        if self.on_long not in (None, *on_long):
            raise RmtoolError("E0206", f"--on-long {self.on_long} is unknown", f"use one of {', '.join(on_long)}")


def train_command(recipe: Recipe, output: Path, *, overwrite: bool, dry_run: bool, as_json: bool) -> None:
    from rmtool import launch
    from rmtool.plan import make_plan

    with captured() as ui:
        if recipe.hub.repo_id and not dry_run:
            from rmtool.hub import check_ready

            check_ready(recipe.hub.repo_id)
        plan = make_plan(recipe, output)
        if not dry_run:
            launch.prepare_folder(output, overwrite)
        if as_json and dry_run:
            print_json({"plan": plan.as_dict()}, ui)
            return
        ui.table(f"Plan: {recipe.name}", ("", ""), plan.rows(), numeric_from=2, to_stderr=not dry_run)
        if dry_run:
            for node, command in enumerate(plan.commands):
                ui.result(f"\n# node {node}\n{command}")
            return
        launch.run(plan, ui, overwrite)
        metrics = launch.final_metrics(output)
        if recipe.hub.repo_id:
            from rmtool.hub import push_checkpoint

            ui.say(push_checkpoint(output / "model", recipe.hub.repo_id, private=not recipe.hub.public, ui=ui))
        if as_json:
            print_json({"output": str(output), "metrics": metrics}, ui)
            return
        ui.table("Result", ("metric", "value"), [(name, f"{value:.4f}") for name, value in metrics.items()])
        ui.result(f"checkpoint: {output / 'model'}\ncurves:     {output / 'curves.png'}")


def _load(folder: Path, reading: Reading, ui: TerminalUi) -> Loaded:
    """The model as eval and score both use it; what the user should know of it is said."""
    from rmtool.loading import load_for_use

    loaded = load_for_use(
        folder,
        precision=reading.precision,
        max_length=reading.max_length,
        on_long=reading.on_long,
        on_empty="keep" if reading.allow_empty else None,
        chat_template=reading.chat_template,
    )
    for notice in loaded.notices:
        ui.say(f"note: {notice}")
    return loaded


def eval_command(model: str, data: list[str] | None, samples: int, reading: Reading, *, as_json: bool) -> None:
    reading.check(("error", "drop", "truncate_prompt"))
    with captured() as ui:
        from rmtool.checkpoint import resolve_checkpoint
        from rmtool.data.encode import encode_all
        from rmtool.data.formats import preference_record
        from rmtool.data.rows import read_all
        from rmtool.evaluate import evaluate

        folder = resolve_checkpoint(model, None, ui)
        sources = data or _default_eval_data(folder)
        ui.say(f"model: {folder}\ndata:  {', '.join(sources)}")
        with ui.progress("Reading", None, "rows") as bar:
            records = read_all(sources, preference_record, bar.advance)
        loaded = _load(folder, reading, ui)
        with ui.progress("Tokenising", len(records), "pairs") as bar:
            encoded = encode_all(loaded.encoder, records, "keep", bar.advance)
        if not encoded.records:
            raise RmtoolError("E0302", "no pair is left to evaluate", "raise --max-length", Place(", ".join(sources)))
        with ui.progress("Evaluating", len(encoded.records), "pairs") as bar:
            result = evaluate(loaded.model, encoded.records, encoded.trees, reading.tokens_per_pack, bar, samples)
        if as_json:
            print_json(
                {"model": str(folder), "data": sources, **result.as_dict(), "set_aside": dict(encoded.counts)}, ui
            )
        else:
            _show_eval(ui, result)
        for reason, count in encoded.counts.items():
            ui.say(f"note: {count} pairs {reason}")
    if encoded.counts["long"]:
        raise SystemExit(ExitCode.SET_ASIDE)


def _default_eval_data(folder: Path) -> list[str]:
    """The pairs that the run which made `folder` held out, if it lies in a run folder."""
    from rmtool.checkpoint import HELD_OUT_FILE

    held_out = folder.parent / HELD_OUT_FILE
    return [str(held_out)] if held_out.is_file() and held_out.stat().st_size else [DEFAULT_EVAL_DATA]


def _show_eval(ui: TerminalUi, result: object) -> None:
    from rmtool.evaluate import PREFIX, EvalResult
    from rmtool.metrics import METRICS, PairSums

    assert isinstance(result, EvalResult)

    def row(name: str, sums: PairSums) -> list[str]:
        return [name, f"{sums.pairs:.0f}", *(f"{value:.4f}" for value in sums.report(PREFIX).values())]

    rows = [row(name, sums) for name, sums in result.subsets.items()]
    names = [name.replace("_", " ") for name in METRICS]  # breaks at the blank on a narrow terminal
    ui.table("eval/rm", ("subset", "pairs", *names), [*rows, row("all", result.total)])
    if result.total.ties:
        ui.say(f"note: {result.total.ties:.0f} pairs have equal rewards and count as wrong")
    if result.samples:
        ui.table(
            "Sampled pairs",
            ("prompt", "chosen", "rejected", "r_chosen", "r_rejected"),
            [
                (
                    *(_shorten(text) for text in (sample.prompt, sample.chosen, sample.rejected)),
                    f"{sample.chosen_reward:.3f}",
                    f"{sample.rejected_reward:.3f}",
                )
                for sample in result.samples
            ],
            numeric_from=3,
        )


def _shorten(text: str, limit: int = 120) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def score_command(
    source: Path, model: str | None, output: Path | None, reading: Reading, *, overwrite: bool, as_json: bool
) -> None:
    reading.check(("error", "truncate_prompt"))
    with captured() as ui:
        from rmtool.checkpoint import default_model, resolve_checkpoint

        model = model or default_model(RUNS)
        ui.say(f"model: {model}")
        output = output or _scored_name(source)
        _check_output(source, output, overwrite)
        from rmtool.score import score_file

        loaded = _load(resolve_checkpoint(model, None, ui), reading, ui)
        outcome = score_file(source, output, loaded, reading.tokens_per_pack, ui)
        if outcome.truncated:
            ui.say(f"note: {outcome.truncated} rows had their prompt cut on the left")
        if outcome.nonfinite:
            ui.say(f"note: {outcome.nonfinite} rewards are not finite numbers and are null in the output")
        if as_json:
            print_json({"model": model, "output": str(output), **vars(outcome)}, ui)
        else:
            ui.result(f"{outcome.responses} responses in {outcome.rows} rows scored: {output}")
    if outcome.nonfinite:
        raise SystemExit(ExitCode.SET_ASIDE)


def _scored_name(source: Path) -> Path:
    name = source.name
    for suffix in (".gz", ".jsonl", ".json", ".parquet"):
        name = name.removesuffix(suffix)
    return source.with_name(f"{name}.scored.jsonl")


def _check_output(source: Path, output: Path, overwrite: bool) -> None:
    if not source.is_file():
        raise RmtoolError("E0201", f"there is no file {source}", "check the path")
    if output.is_dir():
        raise RmtoolError("E0601", f"{output} is a folder", "name a file in --output")
    if output.exists() and output.resolve() == source.resolve():
        raise RmtoolError("E0601", "the output is the input", "choose another --output")
    if output.exists() and not overwrite:
        raise RmtoolError("E0601", f"{output} is there already", "choose another --output, or pass --overwrite")
    probe = output.with_name(f".probe-{output.name}")
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise RmtoolError(
            "E0501", f"{output} cannot be written: {error.strerror}", "choose another --output"
        ) from error


def push_command(checkpoint: str, repo_id: str, *, public: bool, dry_run: bool) -> None:
    with captured() as ui:
        from rmtool.checkpoint import resolve_checkpoint
        from rmtool.hub import push_checkpoint

        if not Path(checkpoint).exists():
            raise RmtoolError("E0404", f"there is no checkpoint folder {checkpoint}", "name a run or checkpoint folder")
        folder = resolve_checkpoint(checkpoint, None, ui)
        url = push_checkpoint(folder, repo_id, private=not public, ui=ui, dry_run=dry_run)
        if url:
            ui.result(url)
