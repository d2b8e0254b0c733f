"""Shared fixtures: tiny models with the tokenizer of the debug recipe, built once; no network, no terminal."""

from __future__ import annotations

import os
import shutil
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # One core for each test process and its children: threads of two processes that wait for each other on the same
    # cores are ten times slower.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
if os.environ.get("ATEN_CPU_CAPABILITY") in ("default", "avx2"):
    # To look like an older CPU, oneDNN must, too: where it has bf16 instructions that torch's own code may not use,
    # torch's attention fails ("pack_vnni2 is only supported when avx512 is supported").
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1")

import canary  # first: it sets where login files are
from advice import impossible
from helpers import DEBUG_MODEL, Shown, save_reward_model, tiny_config
from hub_stub import TOKEN, StubHub

from rmtool.packages import hub_http

HEARD, SEARCHED = canary.Heard(), set[tuple[Any, ...]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the quick tests, unless -m chooses others or a test is named by its node id."""
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    left_out = [item for item in items if any(map(item.get_closest_marker, ("slow", "chaos", "real", "gpu")))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def pytest_configure(config: pytest.Config) -> None:
    canary.listen(HEARD, [pytest.CaptureFixture])


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(canary.LOGIN, ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Search what a test printed, and what its fixtures did: a leak is a failure of the test, or of its teardown."""
    report = yield
    HEARD.hear("printed", *(text for _, text in report.sections))
    found = HEARD.take()
    if report.passed and found:
        report.outcome, report.longrepr = "failed", f"canary tokens leaked: {found}"
    return report


@pytest.fixture(autouse=True)
def _no_leaks(tmp_path: Path) -> Iterator[None]:
    yield
    HEARD.leaks += canary.leaks_in_files(tmp_path, SEARCHED)


@pytest.fixture(scope="session", autouse=True)
def _no_leaks_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Search what fixtures of sessions and modules wrote."""
    yield
    assert not canary.leaks_in_files(tmp_path_factory.getbasetemp(), SEARCHED)


@pytest.fixture
def outside() -> Iterator[Path]:
    """A folder that is not searched for canary tokens: for files that have one."""
    with tempfile.TemporaryDirectory(prefix="rmtool-outside-") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMTOOL_LOG", str(tmp_path / "rmtool.log"))
    monkeypatch.setenv("RMTOOL_CACHE", str(tmp_path / "cache"))
    for name in ("RMTOOL_MODEL", "RMTOOL_EVENTS", "RMTOOL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", canary.HF_TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", canary.WANDB_KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEBUG_MODEL)


@pytest.fixture(scope="session")
def causal_lm(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Folder of a tiny causal LM, without a score head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("causal_lm")
    LlamaForCausalLM(LlamaConfig(**tiny_config(len(tokenizer)))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Folder of a tiny reward model that rmtool did not write (no manifest)."""
    from transformers import LlamaConfig

    return save_reward_model(tmp_path_factory.mktemp("checkpoint"), LlamaConfig, tokenizer, seed=1)


@pytest.fixture(params=[False, True], ids=["as the CPU rounds", "every part rounded"])
def rounded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Half precision as this CPU computes it, and with products rounded equally coarsely on every CPU."""
    if request.param:
        from rounding import round_forwards

        round_forwards(monkeypatch)
    return bool(request.param)


@pytest.fixture
def rmtool(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command in this process, in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    from rmtool.cli import main as cli

    def run(*arguments: str | Path) -> Shown:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        assert not impossible(str(arguments[0]), err)
        return Shown(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StubHub]:
    """A local Hub, and an empty cache for what is downloaded from it."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with StubHub() as stub:
        # The library reads its environment when it is imported, which an earlier test may have done.
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", stub.url)
        template = stub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
        # No TLS here; loading the CA certificates would take 60 ms per push.
        core = hub_http().__name__.replace("httpx", "httpcore")
        monkeypatch.setattr(f"{core}.default_ssl_context", lambda **_: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        yield stub
        HEARD.leaks += stub.leaks()


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "m")


hypothesis_settings.register_profile("rmtool", deadline=None)  # machines that run tests are shared and noisy
hypothesis_settings.load_profile("rmtool")
