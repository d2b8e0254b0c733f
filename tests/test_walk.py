"""The way of a pair, from its line to its gradient: the files that CONTRIBUTING lists, and no others."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate import Accelerator
from helpers import ROOT, pair_rows, write_jsonl

from rmtool.data.rejects import Rejects
from rmtool.dataset.batches import epoch_steps
from rmtool.dataset.split import load_split
from rmtool.model.loading import training_encoder, training_model
from rmtool.recipe import load_recipe
from rmtool.training.engine import Engine
from rmtool.training.optim import build_optimizer
from rmtool.training.step import Trainer, training_step
from rmtool.ui import SilentUi

MOST_FILES = 14
# Called on the way, but leave a pair as it is.
BESIDE = {
    "config.py": "settings",
    "packages.py": "versions",
    "packing/transfer.py": "copies to the device",
    "training/training_pack.py": "labels beside the batch",
    "recipe.py": "settings",
    "ui/__init__.py": "progress",
    "data/file_kinds.py": "which reader a file needs",
    "data/rejects.py": "invalid rows",
    "data/fields.py": "names of columns, and unread ones",
    "data/field_names.py": "names of columns, and unread ones",
    "data/notations.py": "messages and transcripts in other notations",
    "data/messages.py": "messages in lists",
    "data/layouts.py": "which format a row has",
    "data/pairs.py": "rows that are grouped by prompt",
    "data/sources.py": "which rows of which source",
    "data/record_store.py": "a store: in and out",
    "data/cache_files.py": "a store: in and out",
    "dataset/cache.py": "a store: in and out",
    "tokenization/token_store.py": "a store: in and out",
    "dataset/split.py": "training set and eval set",
    "tokenization/template_check.py": "what the chat template leaves out",
    "tokenization/tokenized_dataset.py": "what became of each record",
    "evaluation/metrics.py": "metrics",
    "packing/attention.py": "called by transformers' layers",
    "packing/node_attention.py": "called by transformers' layers",
    "packing/written_attention.py": "called by transformers' layers",
    "model/classifier.py": "names of weights",
    "model/precision.py": "autocast",
    "model/out_of_memory.py": "a pack that does not fit",
    "training/engine.py": "one call for each engine",
    "training/nonfinite.py": "a step with NaN or inf",
    "training/pack_budget.py": "a pack that does not fit",
}


def listed() -> list[str]:
    """The files of CONTRIBUTING's section, in order."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## The way of a pair")[2]
    return re.findall(r"^\d+\. `rmtool/(\S+)`", section.partition("\n## ")[0], re.MULTILINE)


def test_contributing_lists_the_files_that_a_pair_goes_through(causal_lm: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(4))
    overrides = [("model.path", str(causal_lm)), ("model.weights", "pretrained"), ("data.train", [str(data)])]
    recipe = load_recipe("debug", [*overrides, ("data.eval", []), ("data.holdout", 0)])
    encoder, _ = training_encoder(recipe, causal_lm)
    model, _ = training_model(recipe, causal_lm, encoder)
    model.share_prompts(True)
    engine = Engine.prepare(Accelerator(cpu=True), model, build_optimizer(model, recipe.train), 1.0)
    called = set[str]()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(f"{ROOT / 'rmtool'}/"):
            called.add(file.removeprefix(f"{ROOT / 'rmtool'}/"))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        split = load_split(recipe, encoder, Rejects(), SilentUi())
        batch = next(epoch_steps(split.train.metadata, split.train.groups, 0, 0, 4))
        training_step(Trainer.start(recipe, engine, SilentUi(), tmp_path), batch, 1e-3, 1)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    way = listed()
    assert len(way) == len(set(way)) <= MOST_FILES
    assert called - BESIDE.keys() == set(way)
