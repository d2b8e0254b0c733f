"""A tracker never ends, delays or changes a run, whatever wandb, its settings and the disk do."""

from __future__ import annotations

import base64
import io
import json
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import canary
import psutil
import pytest
from wandb_host import WandbHost, silent_port

from rmtool.config import TrackConfig
from rmtool.errors import RmtoolError
from rmtool.launch.watch import find_workers
from rmtool.training import tracker_process, tracking
from rmtool.training.tracking import Tracker, draw_curves, read_metrics
from rmtool.training.wandb_process import PROBE_S
from rmtool.training.worker_status import LAUNCHER
from rmtool.ui import TerminalUi

ROWS = [{"step": step, "train/rm/loss": 0.5**step} for step in (1, 2, 3)]
STEPS = [f"logged {row['step']} {row['train/rm/loss']}" for row in ROWS]
HANG = "import time; time.sleep(600)"
WORKING = """
import os

class Run:
    disabled, offline, url, resumed, step = False, False, "https://host/run", False, 0
    def log(self, row, step):
        print("logged", step, row["train/rm/loss"])
    def finish(self, exit_code):
        print("finished", exit_code)

class settings:
    mode, http_proxy, https_proxy, x_extra_http_headers, insecure_disable_ssl = "online", None, None, None, False
    base_url = os.environ["WANDB_BASE_URL"]

def setup():
    import types
    return types.SimpleNamespace(settings=settings)

def Settings(**settings):
    return settings

class api:
    api_key = "key"

def Table(columns, data):
    return [dict(zip(columns, row)) for row in data]

def teardown(code):
    print("teardown")

def init(**given):
    print("init", given["project"], given["name"], given["config"]["name"], given.get("mode"))
    Run.offline = Run.offline or given.get("mode") == "offline"
    return Run()
"""


def use_stub(monkeypatch: pytest.MonkeyPatch, folder: Path, stub: str) -> None:
    (folder / "stub").mkdir()
    (folder / "stub" / "wandb.py").write_text(stub)
    monkeypatch.setenv("PYTHONPATH", f"{folder / 'stub'}:{os.environ.get('PYTHONPATH', '')}")


@pytest.fixture
def host() -> Iterator[WandbHost]:
    with WandbHost() as host:
        yield host
        assert not [seen.path for seen in host.seen if canary.leaks(seen.path.encode() + seen.body)]


@pytest.fixture
def track(host: WandbHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Track three steps with a stub of wandb, or with the real one; return the notices, and what wandb printed."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", host.url)

    def start(
        stub: str | None = None,
        outcome: str = "completed",
        before: Any = lambda process: None,
        finish_s: int = 60,
        resumed: str | None = None,
        **given: Any,
    ) -> list[str]:
        # Long enough for the import of wandb on a busy machine, where the test does not need the end of the wait.
        monkeypatch.setattr(tracking, "FINISH_S", 1 if HANG in (stub or "") else finish_s)
        if stub is not None:
            use_stub(monkeypatch, tmp_path, stub)
        err = io.StringIO()
        ui, recipe = TerminalUi(io.StringIO(), err), {"name": "debug"}
        tracker = Tracker(tmp_path, TrackConfig(**{"wandb": True, **given}), recipe, ui, resumed is not None, resumed)
        if not resumed:
            tracker.log(ROWS[0])
        [process] = tracker.processes
        before(process.process)
        for row in ROWS[1:]:
            tracker.log(row)
        tracker.close(outcome)
        assert read_metrics(tmp_path) == ROWS
        return err.getvalue().splitlines()

    return start


def test_a_run_reaches_wandb_with_its_name_config_steps_and_outcome(track: Any, capfd: Any) -> None:
    assert track(WORKING) == ["wandb: https://host/run"]
    steps = [f"logged {row['step']} {row['train/rm/loss']}" for row in ROWS]
    assert capfd.readouterr().err.splitlines() == ["init rmtool debug debug None", *steps, "finished 0"]


@pytest.mark.parametrize(("given", "shown"), [({}, "env run"), ({"project": "own", "name": "mine"}, "own mine")])
def test_the_environment_names_project_and_run_where_the_recipe_does_not(
    track: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], shown: str
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "env")
    monkeypatch.setenv("WANDB_NAME", "run")
    track(WORKING, **given)
    assert f"init {shown} debug" in capfd.readouterr().err


def test_a_failure_during_the_run_is_reported_once(track: Any) -> None:
    broken = WORKING.replace("return settings", "raise OSError('x')")
    assert track(broken, before=lambda process: process.wait(20)) == ["cannot start wandb, metrics.jsonl only: x"]


@pytest.mark.parametrize(("there", "steps"), [("True, 3", ["logged 3 0.125"]), ("False, 0", STEPS[1:])])
def test_a_resumed_run_goes_on_in_wandb(track: Any, tmp_path: Path, capfd: Any, there: str, steps: list[str]) -> None:
    """From the step that wandb does not have yet; offline, where it cannot know, from the step of the snapshot."""
    (tmp_path / tracking.METRICS_FILE).write_text(json.dumps(ROWS[0]) + "\n")
    stub = WORKING.replace('run", False, 0', f'run", {there}')
    track(stub.replace('given.get("mode")', 'given["id"], given["resume"]'), resumed="abc")
    assert capfd.readouterr().err.splitlines() == ["init rmtool debug debug abc allow", *steps, "finished 0"]


def test_rows_that_come_later_are_logged(track: Any, capfd: Any) -> None:
    track(WORKING, before=lambda process: time.sleep(2))
    assert capfd.readouterr().err.splitlines()[-2:] == ["logged 3 0.125", "finished 0"]


def test_what_wandb_prints_and_says_is_redacted(track: Any, capfd: Any) -> None:
    """It goes into the log of the rank, and onto the terminal."""
    token = f"'hf_' + {canary.GIVEN_TOKEN[3:]!r}"  # in two parts, as the stub is a file of the test
    leaking = WORKING.replace("return Run()", f"print({token}); raise OSError({token})")
    assert track(leaking.replace('"online"', '"offline"')) == ["cannot start wandb, metrics.jsonl only: hf_***"]
    assert "hf_***\n" in capfd.readouterr().err


def test_without_a_key_it_is_offline_and_a_setting_of_wandb_stays(track: Any, capfd: Any) -> None:
    track(WORKING.replace('api_key = "key"', "api_key = None"))
    assert "debug offline" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("stub", "notice"),
    [
        ("raise ImportError('broken')", "cannot start wandb, metrics.jsonl only: broken"),
        ("raise SystemExit(3)", "cannot start wandb, metrics.jsonl only: 3"),
        ("import os; os._exit(3)", "wandb ended, metrics.jsonl only"),
        ("import os; os.abort()", "wandb ended, metrics.jsonl only"),
        (HANG, "wandb did not start within 1 s of the end of the run, metrics.jsonl only"),
        (
            WORKING + "import atexit, time; atexit.register(time.sleep, 60)",  # as wandb's own, without a network
            "wandb: https://host/run",
        ),
        (
            WORKING.replace("return Run()", "raise RuntimeError('a\\n b')"),
            "cannot start wandb, metrics.jsonl only: a b",
        ),
        (WORKING.replace("return Run()", HANG), "wandb did not start within 1 s of the end of the run, metrics.jsonl"),
        (WORKING.replace('print("logged"', "raise KeyError(7) or (0"), "cannot log to wandb, metrics.jsonl only: 7"),
        (WORKING.replace('print("finished"', "raise OSError(5"), "cannot finish the wandb run, metrics.jsonl only"),
    ],
)
def test_wandb_may_raise_exit_or_hang_anywhere(track: Any, stub: str, notice: str) -> None:
    notices = track(stub)
    assert notice in notices[-1]
    assert len([line for line in notices if "metrics.jsonl only" in line]) == ("://" not in notice)
    assert not [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


def test_an_upload_that_takes_long_goes_on_without_the_run_for_some_time(
    track: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "UPLOAD_S", 3)
    stub = WORKING.replace('print("finished", exit_code)', HANG)
    notices = track(stub, before=lambda process: select.select([process.stdout], [], [], 60))
    assert notices == ["wandb: https://host/run", "wandb goes on in the background, for at most 3 s"]
    for child in psutil.Process().children():
        child.wait(20)


def test_the_launcher_does_not_end_trackers_with_the_ranks(track: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the last steps of a run that leaves early are not logged, and no upload goes on."""
    monkeypatch.setenv(LAUNCHER, str(os.getpid()))
    found = []
    track(WORKING, before=lambda process: found.append((process.poll(), find_workers())))
    assert found == [(None, [])]


def test_a_process_that_does_not_start_is_reported_while_the_run_goes_on(
    track: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_process, "START_S", 0)
    assert track(HANG) == ["wandb did not start within 0 s, metrics.jsonl only"]


def test_a_failed_run_does_not_wait_and_wandb_learns_that_it_failed(track: Any, tmp_path: Path) -> None:
    stub = WORKING.replace('print("finished", exit_code)', f"open('{tmp_path}/code', 'w').write(str(exit_code))")
    assert track(stub, "failed") == []
    [child] = psutil.Process().children()
    child.wait(30)
    assert (tmp_path / "code").read_text() == "1"


@pytest.mark.parametrize(
    ("settings", "notice"),
    [
        ({"WANDB_MODE": "ofline"}, "cannot start wandb, metrics.jsonl only: WANDB_MODE=ofline is not valid"),
        ({"WANDB_MODE": "disabled"}, "wandb: disabled by its settings"),
        ({"WANDB_API_KEY": "malformed"}, "wandb: offline (WANDB_API_KEY invalid: API key must have 40+ characters"),
        ({"WANDB_MODE": "offline"}, "wandb: offline (WANDB_MODE=offline); upload later with `wandb sync "),
        ({"WANDB_MODE": "offline", "WANDB_PROJECT": "a/b#"}, "cannot start wandb, metrics.jsonl only: Invalid project"),
        ({"WANDB_MODE": "offline", "WANDB_DIR": "/proc/no"}, "wandb: offline"),
    ],
    ids=str,
)
def test_settings_of_wandb(track: Any, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], notice: str) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    [shown] = track()
    assert shown.startswith(notice)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(401, "API key refused, HTTP 401"), (403, "API key refused, HTTP 403"), (502, "HTTP 502"), (404, ""), (302, "")],
)
def test_wandb_is_offline_where_its_host_refuses_the_key(
    track: Any, host: WandbHost, capfd: Any, answer: int, reason: str
) -> None:
    host.status = answer
    [shown] = track(WORKING)
    assert ("debug offline" in capfd.readouterr().err) == bool(reason)
    if reason:
        assert shown.startswith(f"wandb: offline ({host.url}: {reason}); upload later with `wandb sync ")
    else:
        assert shown == "wandb: https://host/run"
    [seen] = host.seen
    assert (seen.path, seen.authorization) == ("/graphql", "Basic " + base64.b64encode(b"api:key").decode())


@pytest.mark.parametrize(
    ("url", "reason"), [("http://127.0.0.1:9", "Connection refused"), ("http://[", "InvalidURL")], ids=str
)
def test_wandb_is_offline_where_its_host_cannot_be_reached(
    track: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch, url: str, reason: str
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", url)
    [shown] = track(WORKING)
    assert shown.startswith(f"wandb: offline ({url}: {reason}); upload later with `wandb sync ")
    assert "debug offline" in capfd.readouterr().err


def test_a_proxy_of_the_environment_is_asked(track: Any, host: WandbHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://no.invalid")
    monkeypatch.setenv("http_proxy", host.url)
    assert track(WORKING) == ["wandb: https://host/run"]
    assert [seen.path for seen in host.seen] == ["http://no.invalid/graphql"]


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["silent", "one byte a second"])
def test_a_silent_host_is_asked_for_three_seconds(track: Any, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """Not for each read: the host that never ends its answer is not waited for."""
    assert PROBE_S <= 3
    with silent_port(late) as port:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        [shown] = track(WORKING, finish_s=30)
    assert f"127.0.0.1:{port}: no answer within 3 s" in shown


@pytest.mark.parametrize("later", [401, 0], ids=["refuses", "silent"])
def test_a_host_that_fails_after_the_first_request(
    track: Any, host: WandbHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: int
) -> None:
    """The real wandb; its run would be called in use if it were started again in the same session."""
    host.later = later
    (tmp_path / tracking.METRICS_FILE).write_text(json.dumps(ROWS[0]) + "\n")
    monkeypatch.setattr(tracking, "WANDB_TIMEOUT_S", 1)
    monkeypatch.setenv("WANDB_API_KEY", canary.WANDB_KEY)
    [shown] = track(resumed="abc")
    assert shown.startswith("wandb: offline (")
    assert f"upload later with `wandb sync {tmp_path}/wandb/offline-run-*`" in shown
    assert list(tmp_path.glob("wandb/offline-run-*-abc/*.wandb"))


def strict_tracker(folder: Path, **given: bool) -> Tracker:
    return Tracker(folder, TrackConfig(strict=True, **given), {"name": "x"}, TerminalUi(io.StringIO(), io.StringIO()))


@pytest.mark.parametrize(
    ("stub", "failure"),
    [
        (WORKING, None),
        (WORKING.replace('"online"', '"offline"').replace("disabled, offline", "offline, disabled"), None),
        (
            WORKING.replace('api_key = "key"', "api_key = None").replace(" = False, False", " = False, True"),
            "no API key",
        ),
        ("raise ImportError('broken')", "metrics.jsonl only: broken"),
        ("import os; os._exit(3)", "wandb ended"),
        (HANG, "wandb did not start"),
    ],
    ids=["online", "offline as told", "offline for want of a key", "raises", "exits", "hangs"],
)
def test_a_strict_run_does_not_begin_without_its_tracker(
    track: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: str, failure: str | None
) -> None:
    """Being offline is a failure, unless wandb's settings say so."""
    monkeypatch.setattr(tracker_process, "START_S", 2 if stub == HANG else 60)
    use_stub(monkeypatch, tmp_path, stub)
    tracker = strict_tracker(tmp_path, wandb=True)
    if failure is None:
        tracker.require_started()
        tracker.close()
        tracker.require_logged()
        return
    with pytest.raises(RmtoolError) as caught:
        tracker.require_started()
    assert (caught.value.id, caught.value.exit_code) == ("E0702", 7)
    assert failure in caught.value.what
    tracker.close("failed")
    for child in psutil.Process().children():
        child.wait(20)


@pytest.mark.parametrize(
    ("stub", "failure"),
    [
        (WORKING.replace('print("logged"', "raise KeyError(7) or (0"), "cannot log to wandb, metrics.jsonl only: 7"),
        (
            WORKING.replace('print("finished", exit_code)', HANG),
            "wandb did not finish within 1 s of the end of the run",
        ),
        (WORKING.replace('print("finished", exit_code)', "os._exit(0)"), "wandb did not finish"),
    ],
    ids=["raises", "uploads for too long", "exits"],
)
def test_a_strict_run_ends_with_what_its_tracker_could_not_do(
    track: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: str, failure: str
) -> None:
    use_stub(monkeypatch, tmp_path, stub)
    tracker = strict_tracker(tmp_path, wandb=True)
    tracker.require_started()
    monkeypatch.setattr(tracking, "UPLOAD_S", 1 if HANG in stub else 30)
    tracker.log(ROWS[0])
    tracker.close()
    with pytest.raises(RmtoolError, match=failure) as caught:
        tracker.require_logged()
    assert caught.value.id == "E0702"
    assert str(tmp_path / "model") in caught.value.hint
    tracker.track = TrackConfig()
    tracker.require_logged()


def test_a_disk_without_space_for_metrics_costs_no_row(tmp_path: Path) -> None:
    """The run goes on, the failure is said once, and the rows are written when there is space again."""
    err = io.StringIO()
    tracker = Tracker(tmp_path, TrackConfig(), {"name": "x"}, TerminalUi(io.StringIO(), err))
    tracker.log(ROWS[0])
    file, tracker.file = tracker.file, open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - closed below
    tracker.log(ROWS[1])
    tracker.log(ROWS[2])
    assert err.getvalue() == "cannot write metrics.jsonl, trying again after each step: No space left on device\n"
    with open(tmp_path / tracking.METRICS_FILE, "a") as torn:
        torn.write(json.dumps(ROWS[1])[:9])
    assert read_metrics(tmp_path) == ROWS[:1]
    os.truncate(tmp_path / tracking.METRICS_FILE, file.tell())
    tracker.file.close()
    tracker.file = file
    tracker.close()
    assert read_metrics(tmp_path) == ROWS


def test_curves_are_drawn_with_any_backend_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "unknown")
    (tmp_path / tracking.METRICS_FILE).write_text(json.dumps(ROWS[0]) + "\n")
    assert draw_curves(tmp_path).exists()
