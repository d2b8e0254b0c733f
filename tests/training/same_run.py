"""Whether two runs ended alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EVERY_TIME = ("step_seconds", "peak_memory")  # metrics that differ in every run


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in EVERY_TIME} for row in found]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def assert_same_run(folder: Path, other: Path) -> None:
    """Bit-identical weights; every step once, with the same metrics; the same files, and nothing left over."""
    assert weights(folder) == weights(other)
    assert rows(folder) == rows(other)
    assert [row["step"] for row in rows(folder)] == list(range(1, len(rows(other)) + 1))
    for name in ("held_out.jsonl", "eval_samples.jsonl", "report.json", "model/config.json"):
        texts = [(each / name).read_text().replace(str(each.parent), "") for each in (folder, other)]
        assert texts[0] == texts[1]
    assert (folder / "curves.png").exists()
    left = {path.name for path in folder.iterdir()} - {path.name for path in other.iterdir()}
    # A run that was killed before its first snapshot is in previous/.
    assert {name for name in left if not name.startswith("previous")} <= {"said.log"}
    assert not (folder / "snapshots").exists()
