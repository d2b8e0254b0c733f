"""The reward model: a transformers `*ForSequenceClassification` with one label, read at each response's last token.

In: a folder with a causal LM (to train) or with a checkpoint that has its score head (to use). Out: a `RewardModel`,
whose forward takes a `Batch` and returns rewards, float32[N]; backbone and head run inside that one forward, so that
engines which gather parameters by hooks see both. What is inside stays an ordinary transformers model.
Cost: the weights, once; choosing the layout takes a few short forwards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rmtool.model.bf16_emulation import wide_products
from rmtool.model.classifier import HEAD, ScoreHead, _shape, is_matrix
from rmtool.packing import attention
from rmtool.packing.last_layer import read_last_layer_sparsely
from rmtool.packing.pack_layout import Batch, PackedBatch, pack, pad
from rmtool.tokenization.pack_plan import plan_packs
from rmtool.tokenization.response_group import ResponseGroup

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class RewardModel(nn.Module):
    """Rewards of packed or padded batches.

    Args:
        classifier: a `*ForSequenceClassification` with a bias-free one-row `score` head.
        pad_id: what fills the right side of padded batches.
        precision: "fp32", or "bf16" or "fp16" for autocast around the backbone. The head always runs in the dtype of
            its weights without autocast: in bfloat16 rewards near 4 would be 0.03 apart.
    """

    def __init__(self, classifier: PreTrainedModel, pad_id: int, precision: str = "fp32"):
        super().__init__()
        self.classifier = classifier
        self.pad_id = pad_id
        self.precision = precision
        self.stock_attention = classifier.config._attn_implementation
        self.shares_prompts = False
        read_last_layer_sparsely(self.backbone)
        getattr(classifier, HEAD).__class__ = ScoreHead

    @property
    def backbone(self) -> PreTrainedModel:
        return getattr(self.classifier, self.classifier.base_model_prefix)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, batch: Batch) -> torch.Tensor:
        """Rewards float32[N], in the order in which `pack` or `pad` laid the responses."""
        # Its cache would keep a copy of every weight until the forward's end; none is used twice.
        half = torch.autocast(
            self.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32", cache_enabled=False
        )
        with half, self.products():
            states = self._last_states(batch)
        with torch.autocast(self.device.type, enabled=False):
            head = getattr(self.classifier, HEAD)
            return head(states.to(next(head.parameters()).dtype))[:, 0].float()

    def products(self) -> AbstractContextManager[Any]:
        """A block that backwards run in, as forwards do: see `products.py`."""
        return wide_products(self.device, self.precision)

    def _last_states(self, batch: Batch) -> torch.Tensor:
        """Hidden states of each response's last token, [N, hidden]."""
        if isinstance(batch, PackedBatch):
            output = self.backbone(
                input_ids=batch.input_ids, position_ids=batch.position_ids, packed=batch.layout, use_cache=False
            )
            return output.last_hidden_state[0, batch.reward_index]
        output = self.backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        rows = torch.arange(len(batch.reward_index), device=batch.reward_index.device)
        return output.last_hidden_state[rows, batch.reward_index]

    def share_prompts(self, shares: bool) -> None:
        """Switch between packed batches (True) and padded ones (False)."""
        self.shares_prompts = shares
        self.classifier.set_attn_implementation(attention.NAME if shares else self.stock_attention)

    def collate(self, groups: Sequence[ResponseGroup]) -> Batch:
        """The batch that this model's layout wants, on its device."""
        batch = pack(groups) if self.shares_prompts else pad(groups, self.pad_id)
        return batch.to(self.device)

    def plan(self, groups: Sequence[ResponseGroup], max_tokens: int, world_size: int = 1) -> list[list[int]]:
        """`plan_packs` for this model's layout."""
        return plan_packs(groups, max_tokens, world_size, not self.shares_prompts, self.key_cost)

    @functools.cached_property
    def key_cost(self) -> float:
        """What a token asks of attention for each key, in parts of what it asks of the linear layers: 4 hidden flops
        a layer, of 2 flops a weight (Kaplan et al., arXiv 2001.08361, table 1).
        """
        config = self.backbone.config.get_text_config()
        return 2 * config.hidden_size * config.num_hidden_layers / max(self.active_matmul_params, 1)

    @property
    def active_matmul_params(self) -> int:
        """Numbers of the backbone's matrices that a token meets: not the embedding's, which is looked up; of the
        experts, those that it is sent to.
        """
        config = self.backbone.config.get_text_config()
        weights = -config.vocab_size * config.hidden_size
        for name, parameter in self.backbone.named_parameters():
            shape = _shape(parameter)
            if ".experts." in name and len(shape) == 3:  # experts x rows x columns
                weights += getattr(config, "num_experts_per_tok", shape[0]) * math.prod(shape[1:])
            elif is_matrix(parameter):
                weights += math.prod(shape)
        return weights


# ---------------------------------------------------------------------------------------------------- building
