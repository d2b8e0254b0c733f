"""How often a process waits for its device, and what it does in the meantime."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import GROUPS, write_recipe
from step_ranks import start

from rmtool.data.rejects import Rejects
from rmtool.dataset.split import load_split
from rmtool.model import rewards
from rmtool.model.loading import training_encoder
from rmtool.model.out_of_memory import PackOutOfMemoryError
from rmtool.packing.packs import PackedBatch, pack, pad
from rmtool.packing.transfer import _in_one_copy
from rmtool.tokenization.response_group import build_group
from rmtool.training.trainer import train_loop
from rmtool.ui import SilentUi


@pytest.mark.slow
def test_a_pack_is_one_copy_and_a_step_is_waited_for_twice() -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("device_traffic.py")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[:2000]
    per_pack, once = {}, {}
    for kind, found in json.loads(done.stdout).items():
        two, five = (Counter(found[packs]) for packs in ("2", "5"))
        three = five - two
        per_pack[kind] = {name: count / 3 for name, count in three.items()}
        once[kind] = {name: two[name] - 2 * each for name, each in per_pack[kind].items() if two[name] != 2 * each}
        once[kind] |= {name: count for name, count in two.items() if name not in three}
    sent, got = "copy to gpu in aten._to_copy.default", "copy to cpu in aten._to_copy.default"
    assert per_pack == {"step": {sent: 1}, "scoring": {sent: 1, got: 1, "wait for an event": 1}}
    sums, norm = f"blocking {got}", "wait in aten._local_scalar_dense.default"
    assert once == {"step": {sums: 1, norm: 1}, "scoring": {}}


def test_a_batch_that_was_copied_as_one_is_the_same() -> None:
    batch = pack(GROUPS)
    there = _in_one_copy(batch, torch.device("cpu"), pinned=False)
    assert isinstance(there, PackedBatch)
    found, storages = 0, set()
    for before, after in ((batch, there), (batch.layout, there.layout)):
        for name, value in vars(before).items():
            copied = vars(after)[name]
            if isinstance(value, torch.Tensor):
                assert (copied.dtype, copied.shape) == (value.dtype, value.shape)
                assert torch.equal(copied, value), name
                assert copied.data_ptr() % 64 == 0
                storages.add(copied.untyped_storage().data_ptr())
                found += 1
            elif value is not batch.layout:
                assert copied is value
    assert (found, len(storages)) == (6, 1)
    padded = pad(GROUPS, 0)
    assert torch.equal(_in_one_copy(padded, torch.device("cpu"), pinned=False).attention_mask, padded.attention_mask)


def test_a_step_is_planned_before_the_one_before_it_is_waited_for(causal_lm: Path, tmp_path: Path) -> None:
    """Once each, and never one more than the run has; again if the pack budget was lowered in between."""
    trainer, _ = start(str(write_recipe(causal_lm, tmp_path, more=", epochs: 2, max_steps: 6")))
    split = load_split(trainer.recipe, training_encoder(trainer.recipe, causal_lm)[0], Rejects(), SilentUi())
    events, batches, plan, total = list[str](), list[Any](), trainer.plan, trainer.engine.sum

    def planned(batch: Any, tokens_per_pack: int) -> Any:
        if not batches or batches[-1] is not batch:
            batches.append(batch)
        events.append(f"plan {len(batches)} at {tokens_per_pack}")
        return plan(batch, tokens_per_pack)

    def fetched(sums: torch.Tensor) -> torch.Tensor:
        fetches = sum(event == "wait" for event in events)
        events.append("wait")
        if fetches == 2:
            trainer.tokens_per_pack = 120
        return total(sums)

    trainer.plan, trainer.engine.sum = planned, fetched  # type: ignore[method-assign]
    train_loop(trainer, split, None, SilentUi())
    before = [word for step in (2, 3, 4) for word in (f"plan {step} at 240", "wait")]
    after = ["plan 4 at 120", "plan 5 at 120", "wait", "plan 6 at 120", "wait", "wait"]
    assert events == ["plan 1 at 240", *before, *after]


class Device:
    """Stands in for a forward on a device: what is launched and waited for, and which packs it is too small for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.events, self.full = list[str](), set[str]()
        monkeypatch.setattr(rewards._Launched, "start", self.launch)

    def launch(self, model: Any, module: Any, batch: list[Any]) -> Any:
        number = sum("launch" in event for event in self.events)
        self.note(f"launch {number}")

        def fetch() -> list[float]:
            self.note(f"wait {number}")
            return [float(group.responses[0][0]) for group in batch]

        return SimpleNamespace(fetch=fetch, ranges=None)

    def note(self, event: str) -> None:
        self.events.append(event)
        if event in self.full:
            raise torch.AcceleratorError("CUDA error: out of memory")

    def rewards(self) -> list[list[float]]:
        """The rewards of four responses, each in a pack of its own, which are their first ids."""
        model: Any = SimpleNamespace(shares_prompts=True, eval=lambda: None, build_batch=list)
        return rewards.compute_rewards(model, [build_group([[first] * 9]) for first in range(4)], 9, SilentUi())


def test_a_forward_is_launched_before_the_one_before_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    assert device.rewards() == [[0.0], [1.0], [2.0], [3.0]]
    assert device.events == ["launch 0", "launch 1", "wait 0", "launch 2", "wait 1", "launch 3", "wait 2", "wait 3"]


@pytest.mark.parametrize(
    ("full", "number"),
    [({"launch 2"}, 2), ({"wait 1"}, 1), ({"wait 3"}, 3), ({"wait 1", "launch 2"}, 1)],
)
def test_the_pack_that_is_out_of_memory_is_named(full: set[str], number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of kernels may show at the next launch or later, when the rewards are waited for."""
    device = Device(monkeypatch)
    device.full = full
    with pytest.raises(PackOutOfMemoryError) as caught:
        device.rewards()
    assert caught.value.indices == [number]
