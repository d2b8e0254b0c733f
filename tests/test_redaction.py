"""Access tokens get nowhere: not on the terminal, not into a log, a run folder, a checkpoint or a tracker.

In every test, conftest.py searches what is written, printed and sent for the canaries of canary.py; here they are put
where they do not belong, and the search itself is tested.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import canary
import pytest
from canary import GIVEN_TOKEN, HF_TOKEN, LOGIN_TOKEN, NETRC_KEY, WANDB_KEY
from helpers import PROGRAM, ROOT, pair_rows, write_jsonl
from hub_stub import StubHub

from rmtool.hub.card import model_card
from rmtool.redaction import has_token, redact

RECIPE = "model: {{path: base}}\ndata: {{train: [pairs.jsonl]}}\ntrain: {{batch_size: 4, learning_rate: 1e-4}}\n{}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"token {GIVEN_TOKEN}!", "token hf_***!"),
        (f"https://user:{GIVEN_TOKEN}@host/path", "https://***@host/path"),
        ("proxy http://name:pass-word@host:3128/ refused", "proxy http://***@host:3128/ refused"),
        (f"{HF_TOKEN} {WANDB_KEY}", "*** ***"),
        (f"{LOGIN_TOKEN} {NETRC_KEY}", "*** ***"),
        ("wandb_v1_" + "a1B2_" * 12, "wandb_v1_***"),
        ("hf_datasets, s3://bucket/a:b, 12:30 me@host", "hf_datasets, s3://bucket/a:b, 12:30 me@host"),
    ],
)
def test_what_is_redacted(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_values_with_which_nobody_is_logged_in_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "short")
    assert redact("a short text") == "a short text"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "HF_TOKEN_PATH", "NETRC"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nowhere")
    assert redact(f"{WANDB_KEY} {NETRC_KEY}") == f"{WANDB_KEY} {NETRC_KEY}"


def test_what_a_recipe_may_not_contain() -> None:
    assert all(map(has_token, (GIVEN_TOKEN, f"https://{GIVEN_TOKEN}@hub", WANDB_KEY, LOGIN_TOKEN, NETRC_KEY)))
    assert not has_token("data/hf_UltraFeedbackBinarizedCleaned/train.jsonl")  # a folder's name


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("train --set hub.token={}", "E0204"),
        ("train --set {}=1", "E0204"),
        ("train --set {}", "E0206"),
        ("train --set train.seed={}", "E0205"),
        ("train --set name={}", "E0205"),
        ("train --set data.train=[https://{}@host/x]", "E0205"),
        ("train --model {}", "E0205"),
        ("train --recipe {}", "E0201"),
        ("train --token {}", None),
        ("train --token={}", None),
        ("train {}", None),
        ("train --nodes {}", None),
        ("train --set hub.token={} --json", "E0204"),
        ("score rows.jsonl --model {}", "E0201"),
        ("eval {}", "E0404"),
        ("eval {} --json", "E0404"),
        ("push {} a/b", "E0404"),
        ("push m {}", "E0404"),
    ],
)
def test_a_token_on_the_command_line(rmtool: Any, line: str, error: str | None) -> None:
    shown = rmtool(*line.format(GIVEN_TOKEN).split())
    assert shown.code
    assert shown.error == error
    assert GIVEN_TOKEN not in shown.out + shown.err
    assert list(Path().iterdir()) in ([], [Path("rmtool.log")])


@pytest.mark.parametrize(
    ("recipe", "error"),
    [
        (RECIPE.format(f"hub: {{token: {GIVEN_TOKEN}}}"), "E0204"),
        (RECIPE.format(f"{GIVEN_TOKEN}: 1"), "E0204"),
        (RECIPE.format(f"name: {GIVEN_TOKEN}"), "E0205"),
        (RECIPE.format(f"hub: {{repo_id: [{GIVEN_TOKEN}]}}"), "E0205"),
        (RECIPE.format("").replace("pairs.jsonl", f"{{path: x, revision: {GIVEN_TOKEN}}}"), "E0204"),
        (f"model: *{GIVEN_TOKEN}", "E0202"),
        (f"{GIVEN_TOKEN}: 1\n{GIVEN_TOKEN}: 2", "E0202"),
        (GIVEN_TOKEN, "E0202"),
    ],
)
def test_a_token_in_a_recipe(rmtool: Any, outside: Path, recipe: str, error: str) -> None:
    (outside / "r.yaml").write_text(recipe)
    for options in ((), ("--dry-run",), ("--json",)):
        shown = rmtool("train", "--recipe", outside / "r.yaml", *options)
        assert shown.error in (error, "E0204")
        assert GIVEN_TOKEN not in shown.out + shown.err
    assert not Path("runs").exists()


def test_a_token_in_the_launch_command(rmtool: Any, outside: Path, causal_lm: Path) -> None:
    data = write_jsonl(Path("pairs.jsonl"), pair_rows(8))
    given = ("--model", causal_lm, "--data", data, "--set", "data.holdout=0", "--output", outside / GIVEN_TOKEN)
    shown = rmtool("train", *given, "--dry-run")
    assert shown.code == 0, shown.err
    assert "hf_***" in shown.out
    json.loads(rmtool("train", *given, "--dry-run", "--json").out)


@pytest.mark.parametrize("body", [b'{"error": "bad token %s"}', b"<html>%s</html>"])
def test_a_token_in_an_error_of_the_hub(rmtool: Any, model: Path, stub: StubHub, body: bytes) -> None:
    for status in (401, 403, 500):
        stub.fail("create", status, body=body % GIVEN_TOKEN.encode())
        assert rmtool("push", model, "me/x").code in (2, 7)


def test_a_token_in_a_bug(rmtool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError(f"secret {GIVEN_TOKEN}")

    monkeypatch.setattr("rmtool.dataset.split.resolve_sources", fail)
    shown = rmtool("train")
    assert shown.error == "E7001"
    assert "ZeroDivisionError: secret hf_***" in shown.err
    assert "ZeroDivisionError: secret hf_***" in (tmp_path / "rmtool.log").read_text()


def test_a_token_in_a_manifest_is_not_in_the_model_card(model: Path) -> None:
    facts = {"base_model": f"a/{GIVEN_TOKEN}", "train_data": [f"a/b:{WANDB_KEY}"], "settings": {"x": LOGIN_TOKEN}}
    card = model_card(model, "me/x", facts)
    assert not canary.leaks(card.encode())


def test_a_token_in_a_traceback_on_the_terminal() -> None:
    code = f"""if True:
        import sys
        from rmtool.cli import main
        def fail(*_, **__):
            sys.stderr.write("a library prints {GIVEN_TOKEN}")
            raise ZeroDivisionError("secret {GIVEN_TOKEN}")
        main.app = fail
        main.main([])"""
    environment = os.environ | {"RMTOOL_DEBUG": "1"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert shown.returncode == 70
    assert "a library prints hf_***" in shown.stderr
    assert shown.stderr.count("ZeroDivisionError: secret hf_***") == 2


@pytest.mark.slow
def test_a_token_in_an_error_of_a_training_process(tmp_path: Path) -> None:
    code = f"""if True:
        import sys
        from rmtool.training import worker
        def fail(*_):
            print("printed {{GIVEN_TOKEN}}")
            raise {{error}}
        worker.load_recipe = fail
        sys.argv = ["", {str(tmp_path)!r}]
        worker.main()"""
    user = "worker.RmtoolError('E0201', 'no {GIVEN_TOKEN}', 'no {GIVEN_TOKEN}', found='{GIVEN_TOKEN}')"
    for error, code_ in (("ZeroDivisionError('secret {GIVEN_TOKEN}')", 70), (user, 2)):
        given = code.replace("{{error}}", error).replace("{error}", error)
        given = given.replace("{{GIVEN_TOKEN}}", GIVEN_TOKEN).replace("{GIVEN_TOKEN}", GIVEN_TOKEN)
        shown = subprocess.run([sys.executable, "-c", given], capture_output=True, cwd=ROOT)
        assert shown.returncode == code_, shown.stderr
        assert "printed hf_***" in (tmp_path / "rank-0.log").read_text()
    assert json.loads((tmp_path / "rank-0.json").read_text())["error"]["message"] == "no hf_***"


@pytest.mark.slow
def test_a_whole_run_leaves_no_token(causal_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of wandb, too, which may hold the command line, the environment and the git remote."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(12))
    command = [PROGRAM, "train", "--model", causal_lm, "--data", data, "--set", "data.holdout=4"]
    command += ["--set", "train.max_steps=2", "--set", "track.wandb=true"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "debug"
    names = {"config.yaml", "plan.json", "train.log", "rank-0.log", "metrics.jsonl", "wandb", "model"}
    assert names <= {path.name for path in run.iterdir()}
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert not canary.leaks_in_files(tmp_path, set())


LEAKING = """
import os, subprocess, sys
import canary
def test_file(tmp_path):
    (tmp_path / "x").write_bytes(b"\\0" * 10_000 + canary.HF_TOKEN.encode())
def test_name(tmp_path):
    (tmp_path / canary.GIVEN_TOKEN).mkdir()
    (tmp_path / canary.GIVEN_TOKEN / "x").touch()
def test_print():
    print(canary.WANDB_KEY)
def test_process_to_the_terminal():
    subprocess.run([sys.executable, "-c", "import os; print(os.environ['HF_TOKEN'])"])
def test_process_to_the_test():
    subprocess.run([sys.executable, "-c", "import os; print(os.environ['HF_TOKEN'])"], capture_output=True)
def test_captured(capfd):
    os.write(2, canary.LOGIN_TOKEN.encode())
    capfd.readouterr()
def test_captured_and_not_read(capfd):
    os.write(2, canary.LOGIN_TOKEN.encode())
def test_clean(tmp_path):
    (tmp_path / "x").write_text("hf_")
"""


@pytest.mark.slow
def test_a_test_that_leaks_fails(outside: Path) -> None:
    (outside / "test_leaking.py").write_text(LEAKING)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-c", ROOT / "pyproject.toml", "--rootdir", outside]
    command += ["--basetemp", outside / "temp", "--tb=no", "--show-capture=no", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    shown = subprocess.run(
        [*command, outside / "test_leaking.py"], capture_output=True, text=True, cwd=outside, env=environment
    )
    bad = {line.split("::")[1].split()[0] for line in shown.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))}
    assert bad == set(re.findall(r"def (test_\w+)", LEAKING)) - {"test_clean"}, shown.stdout


def test_the_search_finds_a_canary(outside: Path) -> None:
    known: set[Any] = set()
    (outside / "a").mkdir()
    (outside / "a" / "x").write_bytes(b"x" * 5000 + HF_TOKEN.encode() + b"y")
    assert len(canary.leaks_in_files(outside, known)) == 1
    assert not canary.leaks_in_files(outside, known)  # searched already
    heard = canary.Heard()
    heard.hear("a test", "text", None, WANDB_KEY, GIVEN_TOKEN.encode())
    assert len(heard.take()) == 2


def test_the_stub_hub_tells_what_was_sent() -> None:
    with StubHub() as hub:
        for url in (hub.url, hub.storage):
            headers = {"Authorization": f"Bearer {HF_TOKEN}"}
            for path in ("/api/repos/create", f"/api/{HF_TOKEN}"):
                request = urllib.request.Request(url + path, b'{"name": "x"}', headers, method="POST")
                with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request):
                    pass
        # The Hub's path with a token, and each request to the storage, whose header and path count separately.
        assert len(hub.leaks()) == 4
