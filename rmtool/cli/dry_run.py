"""`rmtool train --dry-run`: the plan, the launch commands, the data report and the estimates, without training.

In: a plan and a run folder. Out: tables or JSON on stdout; the data report in the run folder.
Cost: reads and tokenizes the data (both into the cache); runs the model on fake tensors, which have no memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rmtool.errors import ExitCode, RmtoolError, first_line
from rmtool.ui import SilentUi, TerminalUi, Ui, print_json

if TYPE_CHECKING:
    from rmtool.config import Recipe
    from rmtool.dataset.report import DataReport
    from rmtool.planning.estimate import ResourceEstimate
    from rmtool.planning.plan import Plan
    from rmtool.tokenization.tokenized_dataset import TokenizedDataset


def print_dry_run(plan: Plan, output: Path, as_json: bool, ui: TerminalUi) -> None:
    """Print the plan and, where data and model can be loaded, the data report and the estimated resources."""
    if as_json:
        estimate = _estimate_run(plan, output, SilentUi())
        report = estimate.report.as_dict() if estimate.report else None
        resources = estimate.resources.as_dict() if estimate.resources else None
        missing = {"not_estimated": estimate.missing} if estimate.missing else {}
        print_json({"plan": plan.as_dict(), "resources": resources, "report": report, **missing}, ui)
    else:
        ui.table(f"Plan: {plan.recipe.name}", ("", ""), plan.rows(), numeric_from=2)
        for node, command in enumerate(plan.commands):
            ui.result(f"\n# node {node}: the command that rmtool train starts\n{command}")
        estimate = _estimate_run(plan, output, ui)
        if estimate.report:
            ui.table("Data", ("", ""), estimate.report.rows(), numeric_from=2)
            ui.result(f"length histograms: {_lengths_place(output)}")
        if estimate.resources:
            ui.table("Estimated resources", ("", ""), estimate.resources.rows(), numeric_from=2)
        if estimate.missing:
            ui.result(f"not estimated: {estimate.missing}")
    if estimate.report and estimate.report.skipped_rows:
        raise SystemExit(ExitCode.PARTIAL)  # as the run would end


def _lengths_place(output: Path) -> str:
    from rmtool.dataset.report import LENGTHS_FILE
    from rmtool.launch.run_folder import is_finished

    if is_finished(output):
        return f"not written, {output} contains a finished run; pass a different --output"
    return str(output / LENGTHS_FILE)


@dataclass(frozen=True)
class _DryRunEstimate:
    """The data report and the estimated resources; `missing` names what could not be estimated, and why."""

    report: DataReport | None
    resources: ResourceEstimate | None
    missing: str


def _estimate_run(plan: Plan, output: Path, ui: Ui) -> _DryRunEstimate:
    """Read the data and run the model on fake tensors.

    Writes the data report to `output`, unless that contains a finished run.
    """
    from rmtool.checkpoint import resolve_checkpoint
    from rmtool.recipe import resolve

    recipe = plan.recipe
    try:
        source = resolve_checkpoint(resolve(recipe.model.path), recipe.model.revision, ui, weights=False)
    except RmtoolError as error:
        if error.exit_code != ExitCode.REMOTE:
            raise
        return _DryRunEstimate(None, None, f"lengths, memory, time (cannot load {recipe.model.path}: {error.what})")
    if plan.pairs is None:
        resources, why = _estimate_memory(recipe, source, None, plan.steps)
        hub = "lengths, time (a Hub dataset is loaded when training starts)"
        return _DryRunEstimate(None, resources, "; ".join(filter(None, (hub, why))))
    return _estimate_with_data(recipe, source, output, ui)


def _estimate_with_data(recipe: Recipe, source: Path, output: Path, ui: Ui) -> _DryRunEstimate:
    from rmtool.data.rejects import Rejects
    from rmtool.dataset.batches import count_pairs
    from rmtool.dataset.report import build_report, example, write_report
    from rmtool.dataset.split import load_split
    from rmtool.launch.run_folder import is_finished, prepare_folder
    from rmtool.model.loading import training_encoder
    from rmtool.training.schedule import Schedule, require_reachable

    train = recipe.train
    encoder, notices = training_encoder(recipe, source)
    for notice in notices:
        ui.say(notice)
    with Rejects(Path(os.devnull) if recipe.data.on_bad_row == "skip" else None) as rejects:
        split = load_split(recipe, encoder, rejects, ui)
    report = build_report(split, train.batch_size, train.seed)
    ui.say(f"example conversation: {example(encoder, split.train.metadata[0], split.train.groups[0])}")
    if not is_finished(output):
        prepare_folder(output, overwrite=False)
        write_report(report, split.train, output)
    steps = Schedule(recipe, count_pairs(split.train.metadata)).steps
    require_reachable(train, steps)
    return _DryRunEstimate(report, *_estimate_memory(recipe, source, split.train, steps))


def _estimate_memory(
    recipe: Recipe, source: Path, data: TokenizedDataset | None, steps: int | None
) -> tuple[ResourceEstimate | None, str]:
    """Estimate the resources, or say why that is not possible."""
    from rmtool.planning.estimate import estimate_resources

    try:
        return estimate_resources(recipe, source, data, steps), ""
    except RuntimeError as error:  # the kernels of some mixture-of-experts models
        return None, f"memory, time (the model does not support fake tensors: {first_line(error)})"
