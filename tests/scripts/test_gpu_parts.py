"""gpu.sh on a CPU: parts that fail, are skipped, or are left to the next call, and what their JSON files hold."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import benchlib
import gpu_parts
import pytest
from helpers import ROOT


def gpu_sh(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts" / "bench" / "gpu.sh"), str(out), "--device", "cpu", *arguments]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})


def report(out: Path, part: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / f"{part}.json").read_text(encoding="utf-8"))
    assert content["part"] == part
    assert content["environment"]["date"]
    return content


@pytest.mark.slow
def test_parts_that_fail_are_skipped_and_continue(tmp_path: Path) -> None:
    first = gpu_sh(tmp_path, "--part", "kernel", "--part", "step-liger", "--limit", "0.5")
    assert first.returncode == 1, first.stderr
    failed = report(tmp_path, "kernel")
    assert failed["status"] == "failed"
    assert "was stopped after 0.5 s" in failed["why"]
    skipped = report(tmp_path, "step-liger")
    assert skipped["status"] == "skipped"
    assert skipped["results"][0]["reason"]
    (tmp_path / "kernel.json").unlink()
    written = (tmp_path / "step-liger.json").stat().st_mtime_ns
    second = gpu_sh(tmp_path, "--part", "kernel", "--part", "step-liger", "--part", "step")
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "step-liger.json").stat().st_mtime_ns == written
    kernel, step = (report(tmp_path, part)["results"] for part in ("kernel", "step"))
    assert [result["ok"] for result in kernel] == [True] * 4
    assert all(0 < result["error"] < 1e-2 for result in kernel)
    assert [result["event"] for result in step] == ["model", "prepared", "warm_up", "synchronizations", "profile"]
    assert len(step[-1]["table"]) == 20
    assert step[-1]["table"][0]["ms"] > 0


def test_a_result_that_is_not_ok_fails_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the parts after it run."""

    class FakeSession:
        def run(self, part: str, spec: dict[str, Any], on_event: Any, limit: float) -> None:
            on_event({"event": "check", "error": 0.5, "ok": part != "kernel"})

    monkeypatch.setattr(benchlib, "session", lambda *_: contextlib.nullcontext(FakeSession()))
    parts = ["--part", "kernel", "--part", "precision"]
    assert gpu_parts.main(gpu_parts.parse([str(tmp_path), "--device", "cpu", *parts])) == 1
    assert report(tmp_path, "kernel")["status"] == "failed"
    assert report(tmp_path, "precision")["status"] == "ok"


def test_every_part_has_a_worker_and_unknown_ones_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    args = gpu_parts.parse(["out", "--model", str(ROOT / "recipes" / "debug" / "model")])
    assert set(args.parts) == set(gpu_parts.WORKERS)
    with pytest.raises(SystemExit):
        gpu_parts.parse(["out", "--part", "train-2b"])
    assert "unknown part: train-2b" in capsys.readouterr().err


def test_a_command_with_two_processes_on_the_device_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for nvidia-smi: another user's process is there from the start, two more come with the command."""
    events, shown = list[dict[str, Any]](), tmp_path / "processes"
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho 1, other\ncat {shown} 2>/dev/null\nprintf '2, python\\n3, python\\n' > {shown}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(gpu_parts, "emit", lambda event, **values: events.append(values))
    gpu_parts.run_command("train", ["train", "--help"], cuda=True)
    assert events[0]["exit_code"] == 0
    assert events[0]["processes"] == ["2, python", "3, python"]
    assert not events[0]["ok"]
