"""Mistakes made on purpose: each must make the check of `test_invariance.py` fail and the trial at load refuse.

A mutant is installed where the production code is joined: at what `pack` returns, at the attention function that
transformers calls, or at the kernel that reads the layout on a GPU (here with a plain function in the kernel's place).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_invariance import Pool, check_many, draw, pool
from transformers import AttentionInterface

from rmtool import attention
from rmtool import model as models
from rmtool.model import choose_layout
from rmtool.packing import NO_PARENT, PackedBatch, PackLayout

Mutate = Callable[[PackedBatch], PackedBatch]
Patch = pytest.MonkeyPatch


def packed_seeds(pool: Pool, count: int) -> list[tuple[int, int]]:
    """Seeds of batches that are packed."""
    seeds = [(5, index) for index in range(8 * count)]
    return [seed for seed in seeds if draw(pool, seed).shared][:count]


def require_red(pool: Pool) -> None:
    """The check that batches are held to fails, and the trial at load says that the rewards differ."""
    with pytest.raises(AssertionError, match=r"a reward differs|changed their order"):
        check_many(pool, packed_seeds(pool, 4))
    assert "differ" in (choose_layout(pool.model, pool.model, 512) or "")


def require_green(pool: Pool) -> None:
    check_many(pool, packed_seeds(pool, 4))
    assert choose_layout(pool.model, pool.model, 512) is None


# ---------------------------------------------------------------------------------------- mutants of what `pack` gives


def per_token(batch: PackedBatch, nodes: list[bool]) -> torch.Tensor:
    return torch.tensor(nodes).repeat_interleave(torch.tensor(batch.layout.lengths))


def with_parents(batch: PackedBatch, parents: list[int]) -> PackedBatch:
    """The same tokens with other paths, the whole layout in agreement."""
    layout = batch.layout
    starts = layout.cu_seqlens_q.tolist()
    keys: list[list[int]] = []
    for node, parent in enumerate(parents):
        own = list(range(starts[node], starts[node + 1]))
        keys.append(own if parent == NO_PARENT else keys[parent] + own)
    ends = torch.tensor([0, *(len(path) for path in keys)]).cumsum(0).int()
    changed: PackLayout = replace(
        layout,
        parents=tuple(parents),
        cu_seqlens_k=ends,
        kv_index=torch.tensor([key for path in keys for key in path]),
        max_k=max(len(path) for path in keys),
    )
    return replace(batch, layout=changed)


def late_after_a_prompt(batch: PackedBatch) -> PackedBatch:
    late = per_token(batch, [parent != NO_PARENT for parent in batch.layout.parents])
    return replace(batch, position_ids=batch.position_ids + late)


def late_after_two_prefixes(batch: PackedBatch) -> PackedBatch:
    parents = batch.layout.parents
    late = per_token(batch, [parent != NO_PARENT and parents[parent] != NO_PARENT for parent in parents])
    return replace(batch, position_ids=batch.position_ids + late)


def read_one_token_early(batch: PackedBatch) -> PackedBatch:
    early = (batch.reward_index - 1).clamp_min(0)
    return replace(batch, reward_index=early, layout=replace(batch.layout, read_index=early.unique()))


def read_the_next_response(batch: PackedBatch) -> PackedBatch:
    return replace(batch, reward_index=batch.reward_index.roll(1))


def last_layer_elsewhere(batch: PackedBatch) -> PackedBatch:
    """The last layer is computed one token early, and read where it should be."""
    early = (batch.layout.read_index - 1).clamp_min(0).unique()
    return replace(batch, layout=replace(batch.layout, read_index=early))


def shortest(batch: PackedBatch, nodes: list[int]) -> int | None:
    return min(nodes, key=lambda node: batch.layout.lengths[node], default=None)


def another_parent(batch: PackedBatch) -> PackedBatch:
    """One node reads on after the node that stands before its prefix."""
    parents = list(batch.layout.parents)
    node = shortest(batch, [node for node, parent in enumerate(parents) if parent > 0])
    if node is not None:
        parents[node] -= 1
    return with_parents(batch, parents)


def leaked_sibling(batch: PackedBatch) -> PackedBatch:
    """One response sees another response of its prompt."""
    parents = list(batch.layout.parents)
    sibling = {
        node: parents.index(parent)
        for node, parent in enumerate(parents)
        if parent != NO_PARENT and parents.index(parent) < node
    }
    node = shortest(batch, list(sibling))
    if node is not None:
        parents[node] = sibling[node]
    return with_parents(batch, parents)


def leaked_neighbour(batch: PackedBatch) -> PackedBatch:
    """One text sees the text before it in the pack."""
    parents = list(batch.layout.parents)
    node = shortest(batch, [node for node, parent in enumerate(parents) if node and parent == NO_PARENT])
    if node is not None:
        parents[node] = node - 1
    return with_parents(batch, parents)


PACKS: tuple[Mutate, ...] = (
    late_after_a_prompt,
    late_after_two_prefixes,
    read_one_token_early,
    read_the_next_response,
    last_layer_elsewhere,
    another_parent,
    leaked_sibling,
    leaked_neighbour,
)


def install_pack(monkeypatch: Patch, mutate: Mutate) -> None:
    real = models.pack
    monkeypatch.setattr(models, "pack", lambda trees: mutate(real(trees)))


@pytest.mark.parametrize("family", ["llama", "mistral_window"])
@pytest.mark.parametrize("mutate", PACKS, ids=lambda mutate: mutate.__name__)
def test_a_wrong_pack_is_caught(monkeypatch: Patch, mutate: Mutate, family: str) -> None:
    require_green(pool(family))
    install_pack(monkeypatch, mutate)
    require_red(pool(family))


def test_paths_that_are_written_anew_change_nothing(monkeypatch: Patch) -> None:
    """What the mutants of paths share is not itself a mutant."""
    install_pack(monkeypatch, lambda batch: with_parents(batch, list(batch.layout.parents)))
    require_green(pool("llama"))


# ------------------------------------------------------------------------------------------- mutants of the attention


def install_attention(monkeypatch: Patch, function: Callable[..., Any]) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, function)


@pytest.mark.parametrize("change", [None, -1, 1], ids=["dropped", "one_shorter", "one_longer"])
def test_a_wrong_sliding_window_is_caught(monkeypatch: Patch, change: int | None) -> None:
    windowed = pool("mistral_window")
    require_green(windowed)

    def wrong(*args: Any, sliding_window: int, **kwargs: Any) -> Any:
        window = None if change is None else sliding_window + change
        return attention.packed_attention(*args, sliding_window=window, **kwargs)

    install_attention(monkeypatch, wrong)
    require_red(windowed)


@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_one_wrong_key_is_caught(monkeypatch: Patch, family: str) -> None:
    """In each pack, the last token but one has the key and value of the last one."""

    def wrong(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if key.shape[2] > 1:
            order = torch.arange(key.shape[2])
            order[-2] = order[-1]
            key, value = key[:, :, order], value[:, :, order]
        return attention.packed_attention(module, query, key, value, *args, **kwargs)

    require_green(pool(family))
    install_attention(monkeypatch, wrong)
    require_red(pool(family))


# ------------------------------------------------------------------------- mutants of the layout that the kernel reads


def plain_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What `varlen_attn` computes, by its documents: sequence by sequence, the last query at the last key."""
    outputs = []
    for (q0, q1), (k0, k1) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
        assert (q1 - q0, k1 - k0) <= (max_q, max_k)
        ago = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        allowed = (ago >= -window_size[1]) & ((ago <= window_size[0]) | (window_size[0] < 0))
        parts = (part.transpose(0, 1) for part in (q[q0:q1], k[k0:k1], v[k0:k1]))
        one = F.scaled_dot_product_attention(*parts, attn_mask=allowed, scale=scale, enable_gqa=enable_gqa)
        outputs.append(one.transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def kernel_path(monkeypatch: Patch) -> None:
    """Batches run through the one-kernel path."""

    def one_call(module: Any, query: Any, key: Any, value: Any, mask: None, **given: Any) -> Any:
        window, packed = given.get("sliding_window"), given["packed"]
        return attention._varlen(query, key, value, given["scaling"], window, packed), None

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_kernel)
    install_attention(monkeypatch, one_call)


def one_wrong_key_index(batch: PackedBatch) -> PackedBatch:
    """The last node's last key but one stands in the pack where its last one does."""
    index = batch.layout.kv_index.clone()
    if len(index) > 1:
        index[-2] = index[-1]
    return replace(batch, layout=replace(batch.layout, kv_index=index))


@pytest.mark.usefixtures("kernel_path")
@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_one_wrong_key_index_is_caught_where_one_kernel_reads_them(monkeypatch: Patch, family: str) -> None:
    require_green(pool(family))
    install_pack(monkeypatch, one_wrong_key_index)
    require_red(pool(family))


@pytest.mark.usefixtures("kernel_path")
def test_a_leaked_sibling_is_caught_where_one_kernel_reads_the_layout(monkeypatch: Patch) -> None:
    install_pack(monkeypatch, leaked_sibling)
    require_red(pool("llama"))


@pytest.mark.usefixtures("kernel_path")
def test_a_dropped_window_is_caught_where_one_kernel_gets_it(monkeypatch: Patch) -> None:
    def boundless(*args: Any, window_size: tuple[int, int], **kwargs: Any) -> torch.Tensor:
        return plain_kernel(*args, window_size=(-1, 0), **kwargs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", boundless)
    require_red(pool("mistral_window"))
