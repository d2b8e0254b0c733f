"""Checkpoints of a training run: the last one, or the best one so far.

In: an `Engine`, its recipe and encoder. Out: `model/` in the run folder; until the run ends, the best checkpoint is
`best-step-N/`.
Cost per checkpoint: one `Engine.full_state_dict` and one write of the model.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rmtool.checkpoint import Manifest, public_name, read_manifest, write_folder, write_manifest
from rmtool.config import Recipe
from rmtool.errors import RmtoolError
from rmtool.model.checkpoint_fidelity import checkpoint_fidelity
from rmtool.model.out_of_memory import unless_out_of_memory
from rmtool.model.precision import PRECISIONS, compute_precision
from rmtool.model.weights import meta_copy
from rmtool.packages import version_of
from rmtool.recipe import as_dict, as_source
from rmtool.tokenization.encoder import Encoder
from rmtool.tokenization.response_group import ResponseGroup
from rmtool.training.engine import Engine, eval_precision
from rmtool.training.progress import Best
from rmtool.training.worker_status import BEST_PREFIX
from rmtool.ui import Ui


@dataclass
class CheckpointWriter:
    """Writer of a run's checkpoints. All ranks must call its methods; the main process writes.

    In: metrics of the checkpoint. Out: an ordinary transformers checkpoint with a manifest.
    """

    folder: Path
    recipe: Recipe
    engine: Engine
    encoder: Encoder
    manifest: Manifest  # without metrics
    kept: set[str] = field(default_factory=set)  # names of the best checkpoints that snapshots need

    def best_folder(self, best: Best) -> Path:
        """Return the folder of the best checkpoint so far; until the first one, it does not exist."""
        return self.folder / f"{BEST_PREFIX}{best.step}"

    def save_best(self, best: Best) -> None:
        """Write the best checkpoint so far, and delete the one before, unless a snapshot needs it."""
        folder = self.best_folder(best)
        self._save(folder.name, best.metrics)
        if self.engine.accelerator.is_main_process:
            self.delete_best_but({*self.kept, folder.name})

    def delete_best_but(self, names: set[str]) -> None:
        """Delete the other best checkpoints."""
        for folder in self.folder.glob(f"{BEST_PREFIX}*"):
            if folder.name not in names:
                shutil.rmtree(folder)

    def finish(self, metrics: dict[str, float], best: Best) -> None:
        """Write `model/`: the weights of the last step, or the best checkpoint where the recipe keeps that."""
        if self.recipe.train.keep == "last":
            self._save("model", metrics)
        elif self.engine.accelerator.is_main_process:
            self.best_folder(best).rename(self.folder / "model")
        if self.engine.accelerator.is_main_process:
            self.delete_best_but(set())

    def measure_fidelity(self, groups: Sequence[ResponseGroup], ui: Ui) -> None:
        """Add to the manifest of `model/` how far its rewards of these responses are from fp32, where memory allows."""
        if self.engine.accelerator.is_main_process:
            folder, tokens = self.folder / "model", self.recipe.train.tokens_per_pack
            try:
                found = unless_out_of_memory(functools.partial(checkpoint_fidelity, folder, groups, tokens))
            except RmtoolError as error:  # a run with a checkpoint is complete
                ui.say(f"fidelity of the checkpoint not measured: {error.what}")
                return
            if found:
                fields = {name: fidelity.as_dict() for name, fidelity in found.items()}
                manifest = read_manifest(folder)
                assert manifest is not None
                write_manifest(folder, replace(manifest, fidelity=fields))
            for name, fidelity in (found or {}).items():
                ui.say(f"fidelity ({name}): {fidelity}")

    def _save(self, name: str, metrics: dict[str, float]) -> None:
        dtype = PRECISIONS[self.recipe.train.save_dtype]
        weights = self.engine.full_state_dict(dtype)
        if weights is None:
            return
        classifier = meta_copy(self.engine.model.classifier, dtype)

        def fill(target: Path) -> None:
            classifier.save_pretrained(target, state_dict=weights)
            self.encoder.tokenizer.save_pretrained(target)
            write_manifest(target, replace(self.manifest, metrics=metrics))

        write_folder(self.folder / name, fill)


def build_manifest(recipe: Recipe, encoder: Encoder, fingerprint: str, padded_reason: str | None) -> Manifest:
    """Build the manifest of this run's checkpoints, without metrics."""
    packages = ("rmtool", "torch", "transformers", "accelerate", "peft")
    return Manifest(
        fingerprint=fingerprint,
        max_length=encoder.max_length,
        precision=compute_precision(recipe.train.precision),
        on_long=encoder.on_long,
        on_empty=encoder.on_empty,
        recipe=recipe.name,
        base_model=public_name(recipe.model.path),
        train_data=[public_name(as_source(source).path) for source in recipe.data.train],
        padded_reason=padded_reason,
        settings=as_dict(recipe)["train"] | {"lora": as_dict(recipe)["lora"]},
        eval_precision=eval_precision(recipe),
        versions={name: version for name in packages if (version := version_of(name))},
    )
