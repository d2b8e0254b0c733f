"""Complete runs as a user types them: the debug recipe, and processes that fail, die or are stopped."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import PROGRAM, ROOT, Lines, group_members, pair_rows, until, write_jsonl

from rmtool import checkpoint, recipe
from rmtool.data import rejects
from rmtool.dataset import report
from rmtool.errors import RmtoolError, Stopped
from rmtool.launch import supervise as launch
from rmtool.launch.run_folder import LOCK_FILE, clear_folder, lock_folder, prepare_folder
from rmtool.launch.stop_request import StopRequest
from rmtool.launch.supervise import Ranks
from rmtool.launch.watch import HANG_S, FailureMonitor, find_workers
from rmtool.planning.plan import Plan, make_plan
from rmtool.training import tracking
from rmtool.training import worker_status as status
from rmtool.training.run_files import LOG_FILE, RESULTS, move_to_previous
from rmtool.training.worker_status import Status


def shell(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def debug_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("debug")
    return folder, shell("train", "--recipe", "debug", cwd=folder)


def test_the_debug_recipe_learns_what_depends_on_the_prompt(
    debug_run: Any, rmtool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shown = debug_run
    assert shown.returncode == 0, shown.stderr
    assert "Traceback" not in shown.stderr
    assert all(word in shown.stderr for word in ("Plan: debug", "Training: ", "eval/rm: accuracy"))
    log = (folder / "runs/debug/train.log").read_text()
    assert all(word in log for word in ("Data ", "Training: 130/130 steps", "eval/rm: accuracy"))
    assert "checkpoint: runs/debug/model" in shown.stdout
    result = json.loads(shell("eval", "runs/debug", "--json", cwd=folder).stdout)
    assert result["pairs"] == 200
    assert result["eval/rm/accuracy"] >= 0.90
    rows = [json.loads(line) for line in (folder / "runs/debug/held_out.jsonl").read_text().splitlines()]
    prompts = [row["chosen"][:-1] for row in rows]
    shuffled = [
        {side: prompts[(index + 1) % len(rows)] + [row[side][-1]] for side in ("chosen", "rejected")}
        for index, row in enumerate(rows)
    ]
    # Rows are in the file's order, which is mixed; a shift by one gives every pair another pair's prompt.
    data = write_jsonl(folder / "shuffled.jsonl", shuffled)
    monkeypatch.chdir(folder)
    assert json.loads(rmtool("eval", "runs/debug", "--data", data, "--json").out)["eval/rm/accuracy"] <= 0.60


def test_a_finished_run_is_not_overwritten(debug_run: Any, rmtool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = debug_run
    before = (folder / "runs/debug/model/model.safetensors").stat().st_mtime_ns
    monkeypatch.chdir(folder)
    shown = rmtool("train", "--recipe", "debug")
    assert (shown.code, shown.error) == (6, "E0601")
    assert (folder / "runs/debug/model/model.safetensors").stat().st_mtime_ns == before


def test_score_after_training_needs_no_model_named(debug_run: Any) -> None:
    folder, _ = debug_run
    source = shutil.copy(ROOT / "recipes/debug/responses.jsonl", folder / "responses.jsonl")
    shown = shell("score", source, cwd=folder)
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr.startswith("model: runs/debug/model")
    rows = [json.loads(line) for line in (folder / "responses.scored.jsonl").read_text().splitlines()]
    best = [row for row in rows if str(row["id"]).endswith("best-is-first")]
    assert best
    assert all(row["best"] == 0 for row in best)


def test_what_was_trained_can_be_pushed(debug_run: Any) -> None:
    folder, _ = debug_run
    shown = shell("push", "runs/debug", "me/rm", "--dry-run", cwd=folder)
    assert shown.returncode == 0, shown.stderr
    sent = {line.split()[0] for line in (shown.stdout + shown.stderr).splitlines() if line.startswith("  ")}
    assert sent == {path.name for path in (folder / "runs/debug/model").iterdir()}


def test_a_worker_that_fails_or_dies_is_reported_by_the_launcher(causal_lm: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(8))
    flags = ["--recipe", "smollm2-135m", "--model", causal_lm, "--data", data, "--set", "data.holdout=0"]
    failed = shell("train", *flags, "--set", "data.max_length=5", cwd=tmp_path)
    assert (failed.returncode, "error[E0305]" in failed.stderr) == (3, True)
    assert "pairs.jsonl:" in failed.stderr
    assert not (tmp_path / "runs/smollm2-135m/model").exists()
    # A module of the same name before the real one makes the process die without a message.
    (tmp_path / "liger_kernel.py").write_text("")
    (tmp_path / "accelerate.py").write_text("import os\nos._exit(9)\n")
    died = shell("train", *flags, cwd=tmp_path)
    assert died.returncode == 8
    assert "error[E0801]: the training process ended with exit code 9 and reported no error" in died.stderr
    assert "launch.log" in died.stderr
    log = (tmp_path / "runs/smollm2-135m/train.log").read_text()
    assert "error[E0801]: the training process ended with exit code 9" in log
    assert "memory" not in died.stderr


def children(pid: int) -> list[int]:
    """Child processes, each of which leads its own session."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if group_members(child)]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_leaves_no_process_and_can_be_run_again(number: int, code: int, tmp_path: Path) -> None:
    command = [PROGRAM, "train", "--recipe", "debug", "--set", "train.epochs=100"]
    # A shell that runs the tests in the background has them ignore Ctrl-C, and every program they start.
    running = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = tmp_path / "runs/debug/metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)
    if number == signal.SIGTERM:
        second = shell("train", "--recipe", "debug", cwd=tmp_path)
        assert (second.returncode, "error[E0602]" in second.stderr) == (6, True)
    sessions = children(running.pid)
    assert sessions
    running.send_signal(number)
    assert running.wait(30) == code
    until(lambda: not any(group_members(session) for session in sessions))
    assert b"Traceback" not in running.stdout.read()
    assert not (tmp_path / "runs/debug/model").exists()
    if number == signal.SIGKILL:
        again = shell("train", "--recipe", "debug", "--set", "train.max_steps=2", cwd=tmp_path)
        assert again.returncode == 0, again.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGKILL, "was killed by the system (SIGKILL)"), (signal.SIGSEGV, "crashed (SIGSEGV)")]
)
def test_a_single_process_that_dies_is_reported_by_its_signal(number: int, words: str, tmp_path: Path) -> None:
    command = [PROGRAM, "train", "--recipe", "debug", "--set", "train.epochs=100"]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "runs/debug"
    until(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size > 0)
    os.kill(json.loads((folder / "rank-0.json").read_text())["pid"], number)
    shown = running.communicate(timeout=60)[1]
    assert running.returncode == 8
    assert f"error[E0801]: the training process {words}" in shown
    assert "rank-0.log" in shown


@pytest.mark.slow
def test_a_launcher_killed_at_once_leaves_no_process(tmp_path: Path) -> None:
    running = subprocess.Popen([PROGRAM, "train", "--recipe", "debug"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    until(lambda: (tmp_path / "runs/debug/accelerate.yaml").exists())
    until(lambda: bool(children(running.pid)))
    sessions = children(running.pid)
    running.kill()
    running.wait()
    until(lambda: not any(group_members(session) for session in sessions))


@pytest.mark.slow
def test_overwriting_moves_the_old_run_and_other_programs_settings_do_not_matter(debug_run: Any) -> None:
    folder, _ = debug_run
    shutil.copytree(folder / "runs/debug", folder / "runs/other", ignore=shutil.ignore_patterns(".*"))
    old = (folder / "runs/other/model/model.safetensors").read_bytes()
    environment = {**os.environ, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    command = [
        PROGRAM,
        "train",
        "--recipe",
        "debug",
        "--output",
        "runs/other",
        "--overwrite",
        "--set",
        "train.max_steps=1",
    ]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "runs/other/previous/model/model.safetensors").read_bytes() == old
    first, again = (
        json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[0])
        for name in ("runs/debug", "runs/other")
    )
    assert again["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)


def test_all_files_of_a_finished_run_are_moved(tmp_path: Path) -> None:
    """Every file that a run writes; an older rejects.jsonl must not pass for this run's."""
    files = [tracking.METRICS_FILE, tracking.CURVES_FILE, report.REPORT_FILE, report.LENGTHS_FILE]
    files += [checkpoint.HELD_OUT_FILE, rejects.REJECTS_FILE, recipe.CONFIG_FILE, LOG_FILE]
    files += [tracking.PLAN_FILE, tracking.SAMPLES_FILE, tracking.TENSORBOARD]
    for name in ("model/model.safetensors", *files, "mine.txt", "previous/old"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    move_to_previous(tmp_path, RESULTS, replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "previous"]
    moved = tmp_path / "previous"
    assert sorted(path.name for path in moved.iterdir()) == sorted(["model", *files])
    assert all((moved / name).read_text() == name for name in files)
    (tmp_path / rejects.REJECTS_FILE).write_text("of a run that failed")
    (tmp_path / "best-step-7").mkdir()
    assert move_to_previous(tmp_path, RESULTS, replace=False) == tmp_path / "previous-2"
    assert (tmp_path / "previous-2" / "best-step-7").is_dir()  # days may have gone into it
    assert not (tmp_path / rejects.REJECTS_FILE).exists()
    assert (moved / rejects.REJECTS_FILE).read_text() == rejects.REJECTS_FILE
    assert move_to_previous(tmp_path, RESULTS, replace=False) is None


def test_the_run_folder_is_checked_without_torch() -> None:
    """Its import takes a second, and a mistake in the data should show before."""
    script = "import sys, rmtool.launch.run_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def run_later(script: str, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **variables}
    return subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)


def test_workers_are_found_without_their_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 1.0)
    mark = {status.LAUNCHER: str(os.getpid())}
    forks = "import os, time\nif os.fork(): os._exit(0)\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    orphan, other = run_later(forks, **mark), run_later("import time; time.sleep(60)", **{status.LAUNCHER: "1"})
    assert orphan.stdout
    pid = int(orphan.stdout.readline())
    orphan.wait()
    assert [process.pid for process in find_workers()] == [pid]
    os.kill(pid, signal.SIGSTOP)  # it takes no SIGTERM now
    launch._stop(orphan)
    assert find_workers() == []
    other.kill()
    other.wait()


def test_a_process_that_is_stopped_before_it_has_started_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmtool.launch.watch.HANG_S", 0.5)
    sleeper = run_later("import time; time.sleep(60)", **{status.LAUNCHER: str(os.getpid())})
    monitor = FailureMonitor(tmp_path, 1)
    try:
        started = time.monotonic()
        until(lambda: monitor.poll() is not None or time.monotonic() - started > 3)
        assert monitor.poll() is None
        sleeper.send_signal(signal.SIGSTOP)
        until(lambda: monitor.poll() is not None, 10)
        failure = monitor.poll()
        assert failure
        assert (failure.status, failure.stopped) == (None, True)
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_process_that_is_stopped_for_a_moment_is_none(tmp_path: Path) -> None:
    sleeper = run_later("import time; time.sleep(60)")
    monitor = FailureMonitor(tmp_path, 1)
    try:
        sleeper.send_signal(signal.SIGSTOP)
        until(lambda: status.process_state(sleeper.pid) == "stopped", 10)
        monitor.scanned = 0.0
        assert monitor.poll() is None
        monitor.stopped_since[sleeper.pid] -= HANG_S
        monitor.scanned = 0.0
        assert monitor.poll()
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_process_that_ended_well_while_it_was_looked_at_is_no_failure(tmp_path: Path) -> None:
    gone = run_later("")
    gone.wait()
    status.mark_exited(tmp_path, 0, 0, None)
    monitor, seen = FailureMonitor(tmp_path, 1), Status(0, gone.pid)
    assert monitor._ended(seen) is None
    (tmp_path / "rank-0.json").write_text(json.dumps(vars(seen)))
    assert monitor._ended(seen)


def test_files_that_rmtool_did_not_write_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / report.REPORT_FILE).touch()  # a dry run writes it
    prepare_folder(tmp_path, False)
    (tmp_path / tracking.METRICS_FILE).touch()
    with pytest.raises(RmtoolError) as caught:
        prepare_folder(tmp_path, True)
    assert (caught.value.id, tracking.METRICS_FILE in caught.value.what) == ("E0601", True)
    (tmp_path / tracking.METRICS_FILE).unlink()
    (tmp_path / "best-step-4").mkdir()
    with pytest.raises(RmtoolError, match="best-step-4"):
        prepare_folder(tmp_path, True)
    (tmp_path / LOCK_FILE).touch()
    prepare_folder(tmp_path, False)


def test_a_run_folder_that_cannot_be_written_is_an_error() -> None:
    with pytest.raises(RmtoolError) as caught:
        prepare_folder(Path("/proc"), False)
    assert caught.value.id == "E0501"


def test_a_process_starts_only_while_its_launcher_lives(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from rmtool.training.worker_status import mark_started; "
        f"mark_started(Path({str(tmp_path)!r}), 0)"
    )
    gone = run_later("")
    gone.wait()
    late = run_later(script, **{status.LAUNCHER: str(gone.pid)})
    assert late.wait() == 1
    assert not list(tmp_path.iterdir())
    assert run_later(script, **{status.LAUNCHER: str(os.getpid())}).wait() == 0
    assert (tmp_path / "rank-0.json").exists()


def test_status_files_of_an_earlier_run_are_removed(tmp_path: Path) -> None:
    """The mark that the data is tokenized, too: else the other processes of a node would not wait for the first."""
    for name in ("rank-0.json", "rank-3.log", status.DATA_READ_FILE, "mine.txt"):
        (tmp_path / name).write_text("{}")
    clear_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# Processes that write what a rank does and end; nothing is trained.

RANK = """
import json, os, sys, time
folder, statuses, budget, seconds = sys.argv[1:]
for rank, status in enumerate(json.loads(statuses)):
    with open(f"{folder}/rank-{rank}.json", "w") as file:
        json.dump({"rank": rank, "pid": os.getpid(), **status}, file)
    open(f"{folder}/rank-{rank}.log", "w").close()
if budget != "none":
    with open(f"{folder}/pack-budget.json", "w") as file:
        json.dump({"tokens_per_pack": 8192, "budget": int(budget)}, file)
time.sleep(float(seconds))
"""
FULL = {"exit": 5, "error": RmtoolError("E0503", "out of memory", "a hint").as_dict()}
LOST = {"exit": 8, "error": RmtoolError("E0805", "lost", "a hint").as_dict()}


@pytest.fixture(scope="module")
def plan() -> Plan:
    loaded = recipe.load_recipe("debug", [("train.tokens_per_pack", 8192)])
    return make_plan(loaded, Path("nowhere"))


def run_ranks(
    plan: Plan, folder: Path, patch: pytest.MonkeyPatch, statuses: list[dict[str, Any]], budget: int | None = None,
    nodes: int = 1, processes: int = 1, signal_before: bool = False, seconds: float = 0,
) -> tuple[bool, list[str]]:  # fmt: skip
    """What `_run_processes` returns, and what it says."""
    layout = replace(plan.recipe.launch, nodes=nodes, gpus_per_node=processes)
    plan = replace(plan, output=folder, recipe=replace(plan.recipe, launch=layout), world_size=nodes * processes)
    words = [sys.executable, "-c", RANK, str(folder), json.dumps(statuses), str(budget).lower(), str(seconds)]
    patch.setattr(launch, "launch_command", lambda *_: words)
    request, ui = StopRequest(), Lines()
    if signal_before:
        patch.setattr(Ranks, "stop_if_requested", lambda self: request._receive(signal.SIGTERM, None))
    return launch._run_processes(plan, [ui], request), ui.lines  # type: ignore[arg-type]


def test_processes_of_one_node_are_started_again_with_smaller_packs(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_ranks(plan, tmp_path, monkeypatch, [FULL, LOST], 4096, processes=2)
    said = "out of memory at 8,192 tokens per pack: starting the processes again with 4,096"
    assert found == (False, [said])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"nodes": 2}, "E0503"),  # the launchers of the others would not know
        ({"signal_before": True}, "E0503"),
        ({"budget": None}, "E0503"),  # nothing would be different
        ({"budget": 8192}, "E0503"),
        ({"statuses": [{"exit": 0}, {"exit": 0}]}, None),
        ({"statuses": [{"exit": 0}], "budget": None}, "E0801"),
        ({"statuses": [LOST, LOST], "budget": None}, "E0805"),
    ],
)
def test_nothing_is_started_again_otherwise(
    change: dict[str, Any], error: str | None, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"statuses": [FULL, LOST], "budget": 4096, "processes": 2, **change}
    if error is None:
        assert run_ranks(plan, tmp_path, monkeypatch, **given) == (True, [])
        return
    with pytest.raises(RmtoolError) as caught:
        run_ranks(plan, tmp_path, monkeypatch, **given)
    assert caught.value.id == error


@pytest.mark.timeout(60)
def test_processes_that_hang_after_one_has_failed_are_ended(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "PATIENCE_S", 0.5)
    monkeypatch.setattr(launch, "GRACE_S", 2.0)
    with pytest.raises(RmtoolError) as caught:
        run_ranks(plan, tmp_path, monkeypatch, [FULL, {}], processes=2, seconds=1000)
    assert caught.value.id == "E0503"
    assert find_workers() == []


@pytest.mark.parametrize(
    ("statuses", "nodes", "code"),
    [
        ([{"exit": 75}, {"exit": 75}], 1, 75),
        ([{"exit": 130}, {"exit": 130}], 1, 130),
        ([{"exit": 143}, {"exit": 143}], 1, 143),  # the recipe turns snapshots off
        ([LOST, LOST], 2, 143),  # the other node has left before there was something to save
        ([LOST, LOST], 1, None),
    ],
)
def test_ranks_that_were_asked_to_stop_have_not_failed(
    statuses: list[dict[str, Any]],
    nodes: int,
    code: int | None,
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(Stopped if code else RmtoolError) as caught:
        run_ranks(plan, tmp_path, monkeypatch, statuses, nodes=nodes, processes=2, signal_before=True)
    assert getattr(caught.value, "exit_code", None) == (code or 8)


@pytest.mark.parametrize(
    ("statuses", "again", "passed_on"),
    [
        ([{"saves": True}, {"saves": True}], False, True),
        ([{"saves": True}, {"exit": 75}], False, True),
        ([{"saves": True}, {"saves": True}], True, False),
        ([{"saves": True}, {"saves": False}], False, False),
        ([{"saves": True}], False, False),  # the other one has hardly begun
    ],
)
def test_a_request_is_passed_on_where_all_ranks_save(
    statuses: list[dict[str, Any]], again: bool, passed_on: bool, plan: Plan, tmp_path: Path
) -> None:
    rank = run_later("import time; time.sleep(60)")
    try:
        for number, status_ in enumerate(statuses):
            (tmp_path / f"rank-{number}.json").write_text(json.dumps({"rank": number, "pid": rank.pid, **status_}))
        layout = replace(plan.recipe.launch, gpus_per_node=2)
        two = replace(plan, output=tmp_path, recipe=replace(plan.recipe, launch=layout))
        request, ui = StopRequest(), Lines()
        ranks = Ranks(two, rank, FailureMonitor(tmp_path, 2), request, [ui])  # type: ignore[arg-type]
        ranks.stop_if_requested()
        request._receive(signal.SIGTERM, None)
        request.again = again
        if not passed_on:
            with pytest.raises(Stopped):
                ranks.stop_if_requested()
            assert rank.poll() is None
            return
        ranks.stop_if_requested()
        ranks.stop_if_requested()
        assert rank.wait(10) == -signal.SIGTERM
        assert ui.lines == ["SIGTERM: finishing the step, then saving a snapshot (send it again to stop at once)"]
    finally:
        rank.kill()
        rank.wait()


@pytest.mark.parametrize("repo_id", [None, "me/rm"])
def test_a_run_defers_signals_and_takes_them_again_for_the_push(
    repo_id: str | None, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After out of memory, the folder is made ready again: the snapshots are kept, and old status files removed."""
    plan = replace(plan, output=tmp_path, recipe=replace(plan.recipe, hub=replace(plan.recipe.hub, repo_id=repo_id)))
    called: list[str] = []
    monkeypatch.setattr(launch, "begin", lambda plan, restart, ui: called.append(f"begin, restart: {restart}"))
    ended = iter([False, True])
    monkeypatch.setattr(launch, "_run_processes", lambda *_: (called.append("run"), next(ended))[1])
    with StopRequest() as request:
        for name in ("defer", "at_once"):
            monkeypatch.setattr(request, name, lambda *_, name=name: called.append(name))
        launch.run(plan, Lines(), request, restart=True)  # type: ignore[arg-type]
    assert called == [
        *("begin, restart: True", "defer", "run", "begin, restart: False", "run"),
        *(["at_once"] if repo_id else []),
    ]


def test_a_run_that_finished_before_the_lock_is_not_replaced(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / checkpoint.MANIFEST).write_text("{}")
    with pytest.raises(RmtoolError) as caught:
        launch.run(replace(plan, output=tmp_path), Lines(), StopRequest())  # type: ignore[arg-type]
    assert caught.value.id == "E0601"
    assert "snapshots" not in caught.value.hint
    (tmp_path / "snapshots").mkdir()  # kept, or the process was killed before it deleted them
    with pytest.raises(RmtoolError) as caught:
        prepare_folder(tmp_path, False)
    assert f"the run no longer needs {tmp_path / 'snapshots'}" in caught.value.hint


def test_a_folder_is_locked_by_one_process(tmp_path: Path) -> None:
    ui = Lines()
    with lock_folder(tmp_path, ui):
        with pytest.raises(RmtoolError) as caught, lock_folder(tmp_path, ui):
            pass
        assert caught.value.id == "E0602"
    with lock_folder(tmp_path, ui):
        pass
    assert not ui.lines


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_without(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    ui = Lines()
    with lock_folder(tmp_path, ui):
        pass
    (line,) = ui.lines
    assert line.startswith(f"note: cannot lock {tmp_path} ({os.strerror(code)})")


COMPILED = ("train", "--recipe", "debug", "--set", "train.compile=true", "--set", "train.max_steps=3")


@pytest.mark.slow
def test_compiled_layers_train_as_others_do(tmp_path: Path) -> None:
    """Inductor's own kernels, on the debug recipe: the same metrics."""
    losses = []
    for arguments in (COMPILED, (*COMPILED, "--set", "train.compile=false")):
        folder = tmp_path / str(len(losses))
        folder.mkdir()
        shown = shell(*arguments, cwd=folder)
        assert shown.returncode == 0, shown.stderr
        assert re.findall(r"compiled layers +│ (\S+)", shown.stderr) == ["off" if losses else "2"]
        rows = [json.loads(line) for line in (folder / "runs/debug/metrics.jsonl").read_text().splitlines()]
        losses.append([[row["train/rm/loss"], row["grad_norm"]] for row in rows])
    assert len(losses[0]) == 3
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.slow
def test_without_a_compiler_the_error_names_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    shown = shell(*COMPILED, cwd=tmp_path)
    assert shown.returncode == 5
    assert "E0504" in shown.stderr
    assert "train.compile=false" in shown.stderr
