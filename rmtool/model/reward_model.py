"""The reward model: a transformers `*ForSequenceClassification` with one label, run on packed or padded batches.

In: a classifier and response groups. Out: a `RewardModel`, whose forward takes a `Batch` and returns rewards. Backbone
and score head run inside that one forward, so that the hooks of engines that gather parameters (ZeRO-3, FSDP) fire for
both. The classifier stays an ordinary transformers model.
Cost: of a forward, the unique tokens of a pack, or all tokens of a padded batch.
Shapes: N responses, D hidden size.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from rmtool.model.classifier import HEAD, ScoreHead, full_shape, is_matrix, matrices
from rmtool.model.overflow import OverflowGuard
from rmtool.model.precision import PRECISIONS, computing_in, fp32_compute
from rmtool.packing import attention
from rmtool.packing.packs import Batch, PackedBatch, pack, pad
from rmtool.packing.transfer import to_device
from rmtool.tokenization.pack_plan import plan_packs
from rmtool.tokenization.response_group import ResponseGroup

FILLED_TO = 64  # on a GPU, tokens of a pack are a multiple of it


class RewardModel(nn.Module):
    """Rewards of packed or padded batches: `Batch` in, float32[N] out.

    Args:
        classifier: a `*ForSequenceClassification` with a bias-free one-row `score` head.
        pad_id: the token that fills the right side of padded batches.
        precision: "fp32" or "tf32", or "bf16" or "fp16" for autocast around the backbone. The head always runs in the
            dtype of its weights without autocast: in bf16, rewards near 4 would be 0.03 apart.
    """

    def __init__(self, classifier: PreTrainedModel, pad_id: int, precision: str = "fp32"):
        super().__init__()
        self.classifier = classifier
        self.pad_id = pad_id
        self.precision = precision
        self.stock_attention = classifier.config._attn_implementation
        self.shares_prompts = False
        self.compiled = "off"  # how many layers are, or why none
        self.overflow_guard = OverflowGuard(self.backbone)
        getattr(classifier, HEAD).__class__ = ScoreHead

    @property
    def backbone(self) -> PreTrainedModel:
        return getattr(self.classifier, self.classifier.base_model_prefix)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, batch: Batch) -> torch.Tensor:
        """Compute rewards, float32[N], in the order of the responses given to `pack` or `pad`."""
        with computing_in(self.precision, self.device):
            states_ND = self._last_states(batch)
        with torch.autocast(self.device.type, enabled=False):
            head = getattr(self.classifier, HEAD)
            return head(states_ND.to(next(head.parameters()).dtype))[:, 0].float()

    def _last_states(self, batch: Batch) -> torch.Tensor:
        """Hidden states of each response's last token, [N, D]."""
        if isinstance(batch, PackedBatch):
            output = self.backbone(
                input_ids=batch.input_ids, position_ids=batch.position_ids, packed=batch.layout, use_cache=False
            )
            return output.last_hidden_state[0, batch.reward_index]
        output = self.backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        rows = torch.arange(len(batch.reward_index), device=batch.reward_index.device)
        return output.last_hidden_state[rows, batch.reward_index]

    @contextlib.contextmanager
    def in_fp32(self) -> Iterator[None]:
        """Compute in fp32 inside the context, whatever the precision and the weights' dtype; not with gradients.

        Compiled layers are not used: its hooks would have them compiled again.
        """
        precision, self.precision = self.precision, "fp32"
        try:
            with fp32_compute(self.backbone), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.precision = precision

    def round_weights(self) -> None:
        """Round the matrices to the precision's dtype, on a GPU in half precision; not for a model in training."""
        dtype = PRECISIONS[self.precision]
        if self.device.type == "cuda" and dtype != torch.float32:
            for name in matrices(self.classifier):
                weight = self.classifier.get_parameter(name)
                weight.data = weight.data.to(dtype)

    def share_prompts(self, shares: bool) -> None:
        """Switch prefix sharing on (packed batches) or off (padded batches)."""
        self.shares_prompts = shares
        self.classifier.set_attn_implementation(attention.NAME if shares else self.stock_attention)

    def collate(self, groups: Sequence[ResponseGroup]) -> Batch:
        """Build the batch of these groups, packed or padded as this model wants it, on its device."""
        return to_device(self.build_batch(groups), self.device)

    def build_batch(self, groups: Sequence[ResponseGroup]) -> Batch:
        """Build the batch of these groups on the CPU."""
        # Triton compiles a kernel again for lengths that 16 divides or does not; on CPUs, which have none, more tokens
        # only cost time.
        multiple = 1 if self.device.type == "cpu" else FILLED_TO
        return pack(groups, multiple) if self.shares_prompts else pad(groups, self.pad_id)

    def plan(self, groups: Sequence[ResponseGroup], max_tokens: int, world_size: int = 1) -> list[list[int]]:
        """Plan the packs of a step with `plan_packs`, for this model's batches and attention cost."""
        return plan_packs(groups, max_tokens, world_size, not self.shares_prompts, self.key_cost)

    @functools.cached_property
    def key_cost(self) -> float:
        """Attention FLOPs of a token for each key, over its FLOPs in linear layers: per layer 4 x hidden size, over
        2 per weight (Kaplan et al., arXiv 2001.08361, table 1).
        """
        config = self.backbone.config.get_text_config()
        return 2 * config.hidden_size * config.num_hidden_layers / max(self.active_matmul_params, 1)

    @property
    def active_matmul_params(self) -> int:
        """Parameters of the backbone that a token is multiplied with: without the embedding, which is looked up, and
        of a mixture's experts only those that the token is routed to.
        """
        config = self.backbone.config.get_text_config()
        weights = -config.vocab_size * config.hidden_size
        for name, parameter in self.backbone.named_parameters():
            shape = full_shape(parameter)
            if ".experts." in name and len(shape) == 3:  # experts x rows x columns
                weights += getattr(config, "num_experts_per_tok", shape[0]) * math.prod(shape[1:])
            elif is_matrix(parameter):
                weights += math.prod(shape)
        return weights
