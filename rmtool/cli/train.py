"""`rmtool train`: options and recipe resolved, then plan, launch and result.

In: a recipe and options that override it. Out: a run folder with a checkpoint; with --dry-run, the plan and estimates.
Cost: the training.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmtool.cli.inference import sharing_fields
from rmtool.cli.options import RUNS, JsonOption, SetOption
from rmtool.errors import ExitCode, RmtoolError

if TYPE_CHECKING:
    from rmtool.config import Recipe
    from rmtool.launch.launcher_env import LauncherEnv
    from rmtool.launch.stop_request import StopRequest
    from rmtool.planning.plan import Plan
    from rmtool.ui import TerminalUi


def train(
    recipe: Annotated[
        str, typer.Option(help="A bundled recipe (debug, smollm2-135m, tulu3-8b) or a .yaml file.")
    ] = "debug",
    model: Annotated[str | None, typer.Option(help="Base model: a Hub id or folder. Overrides model.path.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Training data: a file or Hub dataset (owner/name[:split]). Can be repeated. Overrides data.train."
        ),
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(help="Eval data: a file or Hub dataset. Can be repeated. Overrides data.eval and data.holdout."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder. [default: runs/RECIPE]")] = None,
    set_: SetOption = None,
    on_bad_row: Annotated[
        str | None,
        typer.Option(help="What to do with invalid rows: fail, or skip (writes them to rejects.jsonl; exit code 1)."),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Reuse a run folder with a finished run, which is moved to previous/ (replacing the run there).",
        ),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Do not resume an interrupted run: move it to previous/ (replacing the run there), start at step 1.",
        ),
    ] = False,
    time_limit: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="Stop in time before this is over, e.g. 3h55m: save a snapshot and exit with 75; the same command "
            "resumes. Overrides train.time_limit.",
        ),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Number of nodes. Run the command once on each.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Number of GPUs (processes) per node.")] = None,
    node_rank: Annotated[int | None, typer.Option(min=0, help="Rank of this node, starting at 0.")] = None,
    main_address: Annotated[
        str | None, typer.Option(help="Hostname or IP address of node 0 (torchrun: --master-addr).")
    ] = None,
    main_port: Annotated[int | None, typer.Option(min=1, max=65535, help="A free port on node 0.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the plan, launch commands, data report and resource estimates, without training. "
            "Writes the data report to the run folder, too.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a reward model on preference pairs, as configured by a recipe.

    The loss in train/rm/loss is the recipe's, with margins, label smoothing and centering; eval/rm/loss is plain
    Bradley-Terry. On several nodes, run it once on each; node count, rank and address are options, or come from Slurm
    or torchrun environment variables.
    """
    from rmtool.launch.stop_request import StopRequest

    with StopRequest() as request:  # before the slower imports: a signal waits until the run folder is known
        from rmtool.launch.launcher_env import detect_launcher_env, refuse_ambiguous_world_size
        from rmtool.recipe import load_recipe, parse_set, seconds_of

        env = detect_launcher_env(os.environ)
        if nodes is None:
            refuse_ambiguous_world_size(env, os.environ)
        overrides = _launch_overrides(env, nodes, gpus_per_node, main_address, main_port)
        overrides += _data_overrides(model, data, eval_data, on_bad_row)
        overrides += [("train.time_limit", time_limit)] if time_limit is not None else []
        overrides += [parse_set(text) for text in set_ or []]  # last, so that --set takes precedence
        resolved = load_recipe(recipe, overrides)
        node = _node_rank(env, node_rank, resolved, dry_run)
        launcher = env.source if (nodes, gpus_per_node) == (None, None) else ""
        folder, limit = output or RUNS / resolved.name, resolved.train.time_limit
        request.limit(seconds_of(limit) if limit else None)
        request.at_once(None if dry_run else folder)
        _train(resolved, folder, node, launcher, request, overwrite, restart, dry_run, as_json)


def _launch_overrides(
    env: LauncherEnv, nodes: int | None, gpus_per_node: int | None, main_address: str | None, main_port: int | None
) -> list[tuple[str, Any]]:
    """Return recipe overrides from the options, and from the environment where an option is not set."""
    given = (
        ("nodes", nodes, env.nodes),
        ("gpus_per_node", gpus_per_node, env.gpus_per_node),
        ("main_address", main_address, env.main_address),
        ("main_port", main_port, env.main_port),
    )
    values = ((f"launch.{name}", found if option is None else option) for name, option, found in given)
    return [(key, value) for key, value in values if value is not None]


def _data_overrides(
    model: str | None, data: list[str] | None, eval_data: list[str] | None, on_bad_row: str | None
) -> list[tuple[str, Any]]:
    overrides: list[tuple[str, Any]] = []
    if model:
        overrides += [("model.path", model), ("model.weights", "pretrained")]
    if data:
        overrides.append(("data.train", data))
    if eval_data:
        overrides += [("data.eval", eval_data), ("data.holdout", 0)]
    if on_bad_row:
        overrides.append(("data.on_bad_row", on_bad_row))
    return overrides


def _node_rank(env: LauncherEnv, node_rank: int | None, recipe: Recipe, dry_run: bool) -> int:
    """Return the rank of this node.

    Raises:
        RmtoolError: E0207 when it is not set, or out of range.
    """
    nodes = recipe.launch.nodes
    node = env.node_rank if node_rank is None else node_rank
    if node is None and nodes > 1 and not dry_run:
        what = f"the recipe uses {nodes} nodes, but the rank of this node is not set"
        raise RmtoolError("E0207", what, "pass --node-rank, or --nodes 1 to train on this node only")
    if node and node_rank is None and node >= nodes:
        what = f"node rank {node} (from {env.source}) is out of range for {nodes} nodes"
        raise RmtoolError("E0207", what, "remove --nodes, or start fewer nodes, or pass --node-rank 0 to run it here")
    return node or 0


def _train(
    recipe: Recipe,
    output: Path,
    node: int,
    launcher: str,
    request: StopRequest,
    overwrite: bool,
    restart: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    from rmtool.data.rejects import REJECTS_FILE, require_free
    from rmtool.ui import SilentUi, redirect_output

    with redirect_output() as ui:
        from rmtool.cli.dry_run import print_dry_run
        from rmtool.dataset.split import resolve_sources
        from rmtool.launch import supervise
        from rmtool.launch.run_folder import prepare_folder, refuse_finished
        from rmtool.planning.plan import make_plan

        if not dry_run:
            _check_push(recipe)
            refuse_finished(output, overwrite)
        inputs = resolve_sources((*recipe.data.train, *recipe.data.eval))
        require_free(output / REJECTS_FILE, [source.path for source in inputs])
        plan = make_plan(recipe, output, node, launcher, SilentUi() if as_json else ui)
        if dry_run:
            print_dry_run(plan, output, as_json, ui)
            return
        prepare_folder(output, overwrite)
        ui.facts(f"Plan: {recipe.name}", plan.rows())
        supervise.run(plan, ui, request, overwrite, restart)
        if node:
            ui.say(f"node {node} is done; node 0 writes the checkpoint")
            return
        _finish(plan, output, as_json, ui)
    if (output / REJECTS_FILE).exists():
        raise SystemExit(ExitCode.PARTIAL)


def _check_push(recipe: Recipe) -> None:
    """Check before the training that its result can be pushed, if it is to be."""
    if recipe.hub.repo_id:
        from rmtool.hub.push import check_ready

        check_ready(recipe.hub.repo_id)


def _finish(plan: Plan, output: Path, as_json: bool, ui: TerminalUi) -> None:
    """Push the checkpoint if `hub.repo_id` is set, and print the result."""
    from rmtool.launch.run_folder import final_manifest, final_metrics
    from rmtool.ui import print_json

    manifest = final_manifest(output)
    metrics = final_metrics(output, manifest)
    hub = plan.recipe.hub
    if hub.repo_id:
        from rmtool.hub.push import push_checkpoint

        ui.say(push_checkpoint(output / "model", hub.repo_id, private=not hub.public, ui=ui))
    if as_json:
        print_json({"output": str(output), "metrics": metrics, **sharing_fields(manifest.padded_reason)}, ui)
    else:
        print_result(output, metrics, manifest.padded_reason, ui)


def print_result(output: Path, metrics: dict[str, float], padded_reason: str | None, ui: TerminalUi) -> None:
    """Print the final metrics, and the paths of the checkpoint, curves and skipped rows."""
    from rmtool.data.rejects import REJECTS_FILE
    from rmtool.packing.prefix_sharing import describe_sharing
    from rmtool.training.tracking import CURVES_FILE

    ui.table("Result", ("metric", "value"), [(name, f"{value:.4f}") for name, value in metrics.items()])
    ui.result(f"checkpoint: {output / 'model'}")
    if (output / CURVES_FILE).exists():
        ui.result(f"curves:     {output / CURVES_FILE}")
    if (output / REJECTS_FILE).exists():
        ui.result(f"skipped rows: {output / REJECTS_FILE}")
    ui.result(f"prefix sharing: {describe_sharing(padded_reason)}")
