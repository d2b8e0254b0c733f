"""A script that counts what waits for a device, without one: `python device_traffic.py`; writes a JSON object.

Tensors are fake, on a device whose backend is Python: shapes and devices are those of a GPU, and nothing is computed.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from transformers import AutoModelForSequenceClassification, LlamaConfig

from rmtool.config import DataConfig, ModelConfig, Recipe, TrainConfig
from rmtool.data.record import PairMetadata
from rmtool.dataset.batches import BatchItem
from rmtool.dist import DistInfo
from rmtool.errors import Place
from rmtool.model.classifier import disable_dropout
from rmtool.model.reward_model import RewardModel
from rmtool.model.rewards import compute_rewards
from rmtool.tokenization.response_group import build_group
from rmtool.training.engine import Engine
from rmtool.training.optim import build_optimizer
from rmtool.training.step import Trainer, training_step
from rmtool.ui import SilentUi

ATEN = torch.ops.aten
WAITS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default, ATEN.equal.default}
INDEXING = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN.index_select.default}


class Backend(_DummyBackendModule):  # type: ignore[misc]
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Traffic(TorchDispatchMode):
    """Counts copies between devices and waits for values, by operator; every value is 1."""

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake, self.counts = fake, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(torch.Tensor, self.fake_of, (args, kwargs or {}))
        given = {each.device.type for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        masks = [each for each in tree_leaves(args[1:]) if isinstance(each, torch.Tensor) and each.dtype == torch.bool]
        if "gpu" in given and (func in WAITS or (func in INDEXING and masks)):
            self.counts[f"wait in {func}"] += 1
        if func is ATEN._local_scalar_dense.default:
            return 1.0
        result = func(*args, **kwargs)
        made = {each.device.type for each in tree_leaves(result) if isinstance(each, torch.Tensor)}
        if len(given | made) > 1 and func in {ATEN._to_copy.default, ATEN.copy_.default, *INDEXING}:
            target = "gpu" if "gpu" in made else "cpu"
            blocking = "" if kwargs.get("non_blocking") else "blocking "
            self.counts[f"{blocking}copy to {target} in {func}"] += 1
        return result

    def fake_of(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.fake.from_tensor(tensor) if type(tensor) is torch.Tensor else tensor


TRAIN = TrainConfig(8, 1e-3, tokens_per_pack=40, use_margins=True)


class FakeEvent:
    def __init__(self, device: torch.device):
        assert device.type == "gpu"

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        traffic.counts["wait for an event"] += 1


def build_model() -> RewardModel:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    classifier = AutoModelForSequenceClassification.from_config(config)
    disable_dropout(classifier)
    model = RewardModel(classifier, 0)
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(torch.empty(value.shape, device="gpu:0"))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="gpu:0")
    model.share_prompts(True)
    return model.train()


def build_batch(pairs: int) -> list[BatchItem]:
    """Pairs of 20 unique tokens each."""
    return [
        BatchItem(
            PairMetadata(Place("x", index), 0, ((0, 1),), (0.5,), None, 1.0),
            build_group([[index + 3] * 10 + [1] * 5, [index + 3] * 10 + [2] * 5]),
            ((0, 1, 0.5),),
        )
        for index in range(pairs)
    ]


def step_traffic(model: RewardModel, packs: int) -> dict[str, int]:
    recipe = Recipe(
        "x", ModelConfig("x"), DataConfig(("x",)), TrainConfig(8, 1e-3, tokens_per_pack=40, use_margins=True)
    )
    accelerator = Accelerator(cpu=True)
    accelerator.state.device = torch.device("gpu:0")
    engine = Engine(accelerator, model, model, build_optimizer(model, recipe.train), 1.0)
    trainer = Trainer.start(recipe, engine, SilentUi(), Path("none"))
    training_step(trainer, build_batch(2 * packs), 1e-3, 1)
    return counted(lambda: training_step(trainer, build_batch(2 * packs), 1e-3, 2))


def scoring_traffic(model: RewardModel, packs: int) -> dict[str, int]:
    groups = [item.group for item in build_batch(2 * packs)]
    return counted(lambda: compute_rewards(model, groups, 40, SilentUi(), dist=DistInfo(0, 1, valueless)))


def valueless(rewards_N: torch.Tensor) -> Any:
    """A sum over ranks; fake tensors cannot become arrays."""
    return SimpleNamespace(numpy=lambda: np.zeros(len(rewards_N)))


def counted(run: Callable[[], object]) -> dict[str, int]:
    before = traffic.counts.copy()
    run()
    return dict(traffic.counts - before)


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend("gpu", Backend())
    torch.Event = FakeEvent  # type: ignore[assignment, misc]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Traffic(fake) as traffic:
        model = build_model()
        kinds = {"step": step_traffic, "scoring": scoring_traffic}
        found = {kind: {packs: of(model, packs) for packs in (2, 5)} for kind, of in kinds.items()}
    sys.stdout.write(json.dumps(found) + "\n")
