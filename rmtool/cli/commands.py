"""What each command does, once its words are parsed: find the model, do the work, show the result.

Row 4 of the design, beside `cli`, which parses; kept apart because this half imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmtool.config import Recipe, Source
from rmtool.data.rejects import REJECTS_FILE, Rejects, require_free
from rmtool.errors import ExitCode, Place, RmtoolError
from rmtool.recipe import resolve
from rmtool.ui import SilentUi, TerminalUi, Ui, captured, print_json

if TYPE_CHECKING:
    from rmtool.data.sources import Selection
    from rmtool.dataset.report import DataReport
    from rmtool.evaluation.evaluate import EvalResult
    from rmtool.model.loading import Loaded
    from rmtool.planning.estimate import Forecast
    from rmtool.planning.plan import Plan
    from rmtool.tokenization.encoder import Encoded

RUNS = Path("runs")
DEFAULT_EVAL_DATA = "allenai/reward-bench:filtered"


@dataclass(frozen=True)
class Sample:
    """One pair and its two rewards."""

    prompt: str
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float


@dataclass(frozen=True)
class Reading:
    """How eval and score read conversations; None follows the checkpoint's manifest."""

    precision: str | None
    max_length: int | None
    on_long: str | None
    allow_empty: bool
    tokens_per_pack: int
    chat_template: str | None
    on_bad_row: str = "fail"
    columns: tuple[tuple[str, str], ...] = ()

    def rejects(self, beside: Path, inputs: Sequence[str]) -> Rejects:
        """Where bad rows of the inputs go: `beside` with the ending .rejects.jsonl, or into the error.

        Raises:
            RmtoolError: E0601 a file of the user's has that name.
        """
        if self.on_bad_row != "skip":
            return Rejects()
        path = _ending(beside, ".rejects.jsonl")
        require_free(path, inputs)
        return Rejects(path)

    def check(self, on_long: tuple[str, ...]) -> None:
        if self.precision not in (None, "fp32", "bf16"):
            raise RmtoolError("E0206", f"--precision {self.precision} is unknown", "use fp32 or bf16")
        if self.on_bad_row not in ("fail", "skip"):
            raise RmtoolError("E0206", f"--on-bad-row {self.on_bad_row} is unknown", "use fail or skip")
        if self.on_long not in (None, *on_long):
            raise RmtoolError("E0206", f"--on-long {self.on_long} is unknown", f"use one of {', '.join(on_long)}")


def train_command(
    recipe: Recipe, output: Path, *, overwrite: bool, dry_run: bool, as_json: bool, node: int = 0, told_by: str = ""
) -> None:
    from rmtool.dataset.split import sources_of
    from rmtool.launch import supervise as launch
    from rmtool.planning.plan import make_plan

    with captured() as ui:
        if recipe.hub.repo_id and not dry_run:
            from rmtool.hub.push import check_ready

            check_ready(recipe.hub.repo_id)
        inputs = sources_of((*recipe.data.train, *recipe.data.eval))
        require_free(output / REJECTS_FILE, [source.path for source in inputs])
        plan = make_plan(recipe, output, node, told_by)
        if not dry_run:
            launch.prepare_folder(output, overwrite)
        if dry_run:
            _show_plan(plan, output, as_json, ui)
            return
        ui.facts(f"Plan: {recipe.name}", plan.rows())
        launch.run(plan, ui, overwrite)
        if node:
            ui.say(f"node {node} is done; node 0 writes the checkpoint")
            return
        manifest = launch.final_manifest(output)
        metrics = launch.final_metrics(output, manifest)
        if recipe.hub.repo_id:
            from rmtool.hub.push import push_checkpoint

            ui.say(push_checkpoint(output / "model", recipe.hub.repo_id, private=not recipe.hub.public, ui=ui))
        if as_json:
            print_json({"output": str(output), "metrics": metrics, **_sharing_fields(manifest.padded_reason)}, ui)
        else:
            _show_result(output, metrics, manifest.padded_reason, ui)
    if (output / REJECTS_FILE).exists():
        raise SystemExit(ExitCode.SET_ASIDE)


def _show_plan(plan: Plan, output: Path, as_json: bool, ui: TerminalUi) -> None:
    """The plan and, where data and model are at hand, the report on the data and what the run will take."""
    if as_json:
        seen = _look_ahead(plan, output, SilentUi())
        report = seen.report.as_dict() if seen.report else None
        ahead = seen.forecast.as_dict() if seen.forecast else None
        why = {"why": seen.missing} if seen.missing else {}
        print_json({"plan": plan.as_dict(), "forecast": ahead, "report": report, **why}, ui)
        _end_dry_run(seen.report)
        return
    ui.table(f"Plan: {plan.recipe.name}", ("", ""), plan.rows(), numeric_from=2)
    for node, command in enumerate(plan.commands):
        ui.result(f"\n# node {node}: what rmtool train runs there, once it has written the run folder\n{command}")
    seen = _look_ahead(plan, output, ui)
    if seen.report:
        ui.table("Data", ("", ""), seen.report.rows(), numeric_from=2)
        ui.result(f"lengths: {_lengths_place(output)}")
    if seen.forecast:
        ui.table("Per step and device", ("", ""), seen.forecast.rows(), numeric_from=2)
    if seen.missing:
        ui.result(f"not known yet: {seen.missing}")
    _end_dry_run(seen.report)


def _lengths_place(output: Path) -> str:
    from rmtool.dataset.report import LENGTHS_FILE
    from rmtool.launch.supervise import is_finished

    if is_finished(output):
        return f"no picture, {output} holds a finished run, which a dry run leaves as it is; name another --output"
    return str(output / LENGTHS_FILE)


def _end_dry_run(report: DataReport | None) -> None:
    """As the run would: with 1 where bad rows are set aside."""
    if report and report.rejected:
        raise SystemExit(ExitCode.SET_ASIDE)


@dataclass(frozen=True)
class _Ahead:
    """What can be known before a run; `missing` says what could not, and why."""

    report: DataReport | None
    forecast: Forecast | None
    missing: str


def _look_ahead(plan: Plan, output: Path, ui: Ui) -> _Ahead:
    """Read the data, and run the model on tensors without memory. Writes the report, with the picture of the lengths,
    unless a finished run has its own there.
    """
    from rmtool.checkpoint import resolve_checkpoint
    from rmtool.dataset.batches import count_pairs, plan_steps
    from rmtool.dataset.report import build_report, example, write_report
    from rmtool.dataset.split import load_split
    from rmtool.launch.supervise import is_finished, prepare_folder
    from rmtool.model.loading import training_encoder

    recipe, train = plan.recipe, plan.recipe.train
    try:
        source = resolve_checkpoint(resolve(recipe.model.path), recipe.model.revision, ui, weights=False)
    except RmtoolError as error:
        if error.exit_code != ExitCode.REMOTE:
            raise
        return _Ahead(None, None, f"lengths, memory and time: {recipe.model.path} is not at hand ({error.what})")
    if plan.pairs is None:
        seen, why = _foresee(recipe, source, None, plan.steps)
        hub = "lengths and time: a dataset is on the Hub, and is loaded when training starts"
        return _Ahead(None, seen, "; ".join(filter(None, (hub, why))))
    encoder, _ = training_encoder(recipe, source)
    with Rejects(Path(os.devnull) if recipe.data.on_bad_row == "skip" else None) as rejects:
        split = load_split(recipe, encoder, rejects, ui)
    report = build_report(split, train.batch_size, train.seed)
    ui.say(f"an example: {example(encoder, split.train.labels[0], split.train.trees[0])}")
    if not is_finished(output):
        prepare_folder(output, overwrite=False)
        write_report(report, split.train, output)
    steps = plan_steps(train.epochs, train.max_steps, count_pairs(split.train.labels), train.batch_size)
    return _Ahead(report, *_foresee(recipe, source, split.train, steps))


def _foresee(recipe: Recipe, source: Path, data: Encoded | None, steps: int | None) -> tuple[Forecast | None, str]:
    """The forecast, or why there is none."""
    from rmtool.model.reward_model import first_line
    from rmtool.planning.estimate import forecast

    try:
        return forecast(recipe, source, data, steps), ""
    except RuntimeError as error:  # some experts' kernels know no tensors without memory
        return None, f"memory and time: torch cannot run this model without memory ({first_line(error)})"


def _show_result(output: Path, metrics: dict[str, float], padded_reason: str | None, ui: TerminalUi) -> None:
    from rmtool.packing.prefix_sharing import describe_sharing

    ui.table("Result", ("metric", "value"), [(name, f"{value:.4f}") for name, value in metrics.items()])
    ui.result(f"checkpoint: {output / 'model'}\ncurves:     {output / 'curves.png'}")
    if (output / REJECTS_FILE).exists():
        ui.result(f"bad rows:   {output / REJECTS_FILE}")
    ui.result(f"prefix sharing: {describe_sharing(padded_reason)}")


def _load(folder: Path, reading: Reading, ui: TerminalUi) -> Loaded:
    """The model as eval and score both use it; what the user should know of it is said."""
    from rmtool.model.loading import load_for_use

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
        from rmtool.data import record
        from rmtool.dataset.split import encode_selection, read_sources
        from rmtool.evaluation.evaluate import evaluate

        folder = resolve_checkpoint(model, None, ui)
        sources = data or _default_eval_data(folder)
        ui.say(f"model: {folder}\ndata:  {', '.join(sources)}")
        with reading.rejects(Path(Path(sources[0]).name), sources) as rejects:
            places = [Source(source) for source in sources]
            selection = read_sources(places, record.Reading(reading.columns), 0, rejects, ui)
            loaded = _load(folder, reading, ui)
            encoded = encode_selection(
                loaded.encoder, selection, on_identical="keep", kept=True, label="held-out", rejects=rejects, ui=ui
            )
            rejects.settle()
        if not encoded.labels:
            raise RmtoolError("E0302", "no pair is left to evaluate", "raise --max-length", Place(", ".join(sources)))
        with ui.progress("Evaluating", len(encoded.labels), "pairs") as bar:
            result = evaluate(loaded.model, encoded.labels, encoded.trees, reading.tokens_per_pack, bar, samples)
        shown = _samples(selection, encoded, result)
        if as_json:
            print_json(
                {
                    "model": str(folder),
                    "data": sources,
                    **result.as_dict(),
                    "samples": [vars(sample) for sample in shown],
                    "set_aside": dict(encoded.counts),
                    "rejected": rejects.count,
                    **_sharing_fields(loaded.padded_reason),
                },
                ui,
            )
        else:
            _show_eval(ui, result, shown)
        _say_rejected(rejects, ui)
        _say_sharing(loaded, ui)
    if encoded.counts["long"] or rejects.count:
        raise SystemExit(ExitCode.SET_ASIDE)


def _samples(selection: Selection, encoded: Encoded, result: EvalResult) -> list[Sample]:
    """The text and the rewards of each sampled record's first pair."""
    places = [encoded.kept[at] for at, _ in result.samples]
    records, samples = selection.take(places).records(), list[Sample]()
    for record, (at, rewards) in zip(records, result.samples, strict=True):
        winner, loser = encoded.labels[at].preferences[0]
        prompt = record.prompt[-1].content if record.prompt else ""
        chosen, rejected = (record.responses[side][-1].content for side in (winner, loser))
        samples.append(Sample(prompt, chosen, rejected, rewards[winner], rewards[loser]))
    return samples


def _say_rejected(rejects: Rejects, ui: TerminalUi) -> None:
    if rejects.count:
        ui.say(f"note: {rejects.count:,} bad rows were set aside in {rejects.path}")


def _say_sharing(loaded: Loaded, ui: TerminalUi) -> None:
    """Last, so that a slow run shows why it was slow."""
    if loaded.padded_reason:
        from rmtool.packing.prefix_sharing import describe_sharing

        ui.say(f"note: prefix sharing: {describe_sharing(loaded.padded_reason)}")


def _sharing_fields(reason: str | None) -> dict[str, Any]:
    """The `--json` form."""
    return {"prefix_sharing": reason is None, "padded_reason": reason}


def _default_eval_data(folder: Path) -> list[str]:
    """The pairs that the run which made `folder` held out, if it lies in a run folder."""
    from rmtool.checkpoint import HELD_OUT_FILE

    held_out = folder.parent / HELD_OUT_FILE
    return [str(held_out)] if held_out.is_file() and held_out.stat().st_size else [DEFAULT_EVAL_DATA]


def _show_eval(ui: TerminalUi, result: EvalResult, samples: list[Sample]) -> None:
    from rmtool.evaluation.evaluate import PREFIX
    from rmtool.evaluation.metrics import METRICS, PairSums

    def row(name: str, sums: PairSums) -> list[str]:
        return [name, f"{sums.pairs:.0f}", *(f"{value:.4f}" for value in sums.report(PREFIX).values())]

    rows = [row(name, sums) for name, sums in result.subsets.items()]
    names = [name.replace("_", " ") for name in METRICS]  # breaks at the blank on a narrow terminal
    ui.table("eval/rm", ("subset", "pairs", *names), [*rows, row("all", result.total)])
    if result.total.ties:
        ui.say(f"note: {result.total.ties:.0f} pairs have equal rewards and count as wrong")
    if samples:
        ui.table(
            "Sampled pairs",
            ("prompt", "chosen", "rejected", "r_chosen", "r_rejected"),
            [
                (
                    *(_shorten(text) for text in (sample.prompt, sample.chosen, sample.rejected)),
                    f"{sample.chosen_reward:.3f}",
                    f"{sample.rejected_reward:.3f}",
                )
                for sample in samples
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
        aside = reading.rejects(output, [str(source)])
        from rmtool.scoring.score import score_file

        loaded = _load(resolve_checkpoint(model, None, ui), reading, ui)
        with aside as rejects:
            outcome = score_file(source, output, loaded, reading.tokens_per_pack, rejects, ui)
        _say_rejected(rejects, ui)
        if outcome.truncated:
            ui.say(f"note: {outcome.truncated} rows had their prompt cut on the left")
        if outcome.nonfinite:
            ui.say(f"note: {outcome.nonfinite} rewards are not finite numbers and are null in the output")
        if as_json:
            sharing = _sharing_fields(loaded.padded_reason)
            print_json({"model": model, "output": str(output), **vars(outcome), **sharing}, ui)
        else:
            ui.result(f"{outcome.responses} responses in {outcome.rows} rows scored: {output}")
        _say_sharing(loaded, ui)
    if outcome.nonfinite or outcome.rejected:
        raise SystemExit(ExitCode.SET_ASIDE)


def _scored_name(source: Path) -> Path:
    return _ending(source, ".scored.jsonl")


def _ending(path: Path, ending: str) -> Path:
    """`path` with another ending in place of a data file's."""
    name = path.name
    for suffix in (".gz", ".jsonl", ".json", ".parquet"):
        name = name.removesuffix(suffix)
    return path.with_name(name + ending)


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
        from rmtool.hub.push import push_checkpoint

        if not Path(checkpoint).exists():
            raise RmtoolError("E0404", f"there is no checkpoint folder {checkpoint}", "name a run or checkpoint folder")
        folder = resolve_checkpoint(checkpoint, None, ui)
        url = push_checkpoint(folder, repo_id, private=not public, ui=ui, dry_run=dry_run)
        if url:
            ui.result(url)
