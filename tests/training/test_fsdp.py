"""FSDP2 on models with more than linear layers: the gradients of the unsharded model, or an error.

One rank: hooks and sharded parameters are those of several.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from helpers import FAMILIES, GROUPS, TINY, build, gradients, relative

from rmtool.config import LoraConfig, TrainConfig
from rmtool.errors import RmtoolError
from rmtool.model.loading import add_adapters
from rmtool.training import fsdp
from rmtool.training.optim import build_optimizer

TRAIN = TrainConfig(batch_size=4, learning_rate=1e-3)
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
CONVOLUTIONS = hf.Qwen3_5TextConfig(**TINY, **LINEAR, layer_types=["linear_attention", "full_attention"])


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("config", "adapted"),
    [(FAMILIES["gpt_neox"], ()), (CONVOLUTIONS, ()), (FAMILIES["llama"], ("embed_tokens", "q_proj"))],
    ids=["gpt_neox", "qwen3_5", "adapters"],
)
def test_gradients_are_those_of_the_whole_model(config: Any, adapted: tuple[str, ...], one_rank: None) -> None:
    """Layers of qwen3_5 read the weights of their convolutions, and peft's those of its embeddings, without a call."""
    whole, sharded = build(config), build(config)
    for model in (whole, sharded):
        if adapted:
            torch.manual_seed(0)
            add_adapters(model.classifier, LoraConfig(rank=4, targets=adapted))
    expected = gradients(whole, whole(whole.collate(GROUPS)))
    fsdp.shard(sharded, build_optimizer(sharded, TRAIN), torch.device("cpu"))
    found = gradients(sharded, sharded(sharded.collate(GROUPS)))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        full: Any = found[name]
        assert relative(full.full_tensor() if hasattr(full, "full_tensor") else full, gradient) < 1e-5, name


def test_layers_that_share_weights_are_refused() -> None:
    model = build(hf.LlamaConfig(**TINY))
    layers = model.backbone.layers
    layers[1].mlp = layers[0].mlp
    with pytest.raises(RmtoolError, match="its layers share weights") as refused:
        fsdp.shard(model, build_optimizer(model, TRAIN), torch.device("cpu"))
    assert refused.value.id == "E0406"
