"""Mistakes in the packed forward, made on purpose, to show that the checks at load notice them.

A mutant is installed where the production code is joined: at what `pack` returns, at the attention function that
transformers calls, or at the kernel that reads the layout on a GPU (here with a plain function in the kernel's place).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from rmtool.model import reward_model as models
from rmtool.packing import attention
from rmtool.packing.packs import PackedBatch, PackLayout, pack
from rmtool.packing.written_attention import AttentionParams
from rmtool.tokenization.response_group import NO_PARENT

Mutate = Callable[[PackedBatch], PackedBatch]
Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Mutant:
    """`install` puts the mistake in; `windowed`: it shows only in models with a sliding window."""

    name: str
    install: Callable[[Patch], None]
    windowed: bool = False


def install_pack(mutate: Mutate, monkeypatch: Patch) -> None:
    """`pack` returns a changed batch."""
    real = pack
    monkeypatch.setattr(models, "pack", lambda *given: mutate(real(*given)))


def install_attention(function: Callable[..., Any], monkeypatch: Patch) -> None:
    """The layers of a model that shares prompts call `function`."""
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, function)


# ------------------------------------------------------------------------------------- mutants of what `pack` returns


def per_token(batch: PackedBatch, nodes: list[bool]) -> torch.Tensor:
    return torch.tensor(nodes).repeat_interleave(torch.tensor(batch.layout.lengths))


def with_parents(batch: PackedBatch, parents: list[int]) -> PackedBatch:
    """The same tokens with other paths, the whole layout in agreement."""
    return replace(batch, layout=layout_with_parents(batch.layout, parents))


def parents_of(layout: PackLayout) -> list[int]:
    """The node before each node on its path, or NO_PARENT."""
    return [path[-2] if len(path) > 1 else NO_PARENT for path in layout.paths]


def layout_with_parents(layout: PackLayout, parents: list[int]) -> PackLayout:
    starts = layout.cu_seqlens_q.tolist()
    keys: list[list[int]] = []
    paths: list[tuple[int, ...]] = []
    for node, parent in enumerate(parents):
        own = list(range(starts[node], starts[node + 1]))
        keys.append(own if parent == NO_PARENT else keys[parent] + own)
        paths.append((node,) if parent == NO_PARENT else (*paths[parent], node))
    ends = torch.tensor([0, *(len(path) for path in keys)]).cumsum(0).int()
    return replace(
        layout,
        paths=tuple(paths),
        cu_seqlens_k=ends,
        kv_index=torch.tensor([key for path in keys for key in path]),
        max_k=max(len(path) for path in keys),
    )


def late_after_a_prompt(batch: PackedBatch) -> PackedBatch:
    late = per_token(batch, [len(path) > 1 for path in batch.layout.paths])
    return replace(batch, position_ids=batch.position_ids + late)


def late_after_two_prefixes(batch: PackedBatch) -> PackedBatch:
    late = per_token(batch, [len(path) > 2 for path in batch.layout.paths])
    return replace(batch, position_ids=batch.position_ids + late)


def reward_one_token_early(batch: PackedBatch) -> PackedBatch:
    return replace(batch, reward_index=(batch.reward_index - 1).clamp_min(0))


def reward_of_the_next_response(batch: PackedBatch) -> PackedBatch:
    return replace(batch, reward_index=batch.reward_index.roll(1))


def shortest(layout: PackLayout, nodes: list[int]) -> int | None:
    return min(nodes, key=lambda node: layout.lengths[node], default=None)


def with_wrong_parent(layout: PackLayout) -> PackLayout:
    """One node has a wrong parent: the node before its prefix in the pack."""
    parents = parents_of(layout)
    node = shortest(layout, [node for node, parent in enumerate(parents) if parent > 0])
    if node is not None:
        parents[node] -= 1
    return layout_with_parents(layout, parents)


def with_leaked_sibling(layout: PackLayout) -> PackLayout:
    """One response attends to a different response of its prompt."""
    parents = parents_of(layout)
    sibling = {
        node: parents.index(parent)
        for node, parent in enumerate(parents)
        if parent != NO_PARENT and parents.index(parent) < node
    }
    node = shortest(layout, list(sibling))
    if node is not None:
        parents[node] = sibling[node]
    return layout_with_parents(layout, parents)


def with_leaked_neighbor(layout: PackLayout) -> PackLayout:
    """One sequence attends to the sequence before it in the pack."""
    parents = parents_of(layout)
    node = shortest(layout, [node for node, parent in enumerate(parents) if node and parent == NO_PARENT])
    if node is not None:
        parents[node] = node - 1
    return layout_with_parents(layout, parents)


def wrong_parent(batch: PackedBatch) -> PackedBatch:
    return replace(batch, layout=with_wrong_parent(batch.layout))


def leaked_sibling(batch: PackedBatch) -> PackedBatch:
    return replace(batch, layout=with_leaked_sibling(batch.layout))


def leaked_neighbor(batch: PackedBatch) -> PackedBatch:
    return replace(batch, layout=with_leaked_neighbor(batch.layout))


PACKS = tuple(
    Mutant(mutate.__name__, partial(install_pack, mutate))
    for mutate in (
        late_after_a_prompt,
        late_after_two_prefixes,
        reward_one_token_early,
        reward_of_the_next_response,
        wrong_parent,
        leaked_sibling,
        leaked_neighbor,
    )
)

# ------------------------------------------------------------------------------------------- mutants of the attention


def with_window(change: int | None, *args: Any, sliding_window: int | None, **kwargs: Any) -> Any:
    """Packed attention with a wrong sliding window, or none if `change` is None."""
    wrong = None if change is None or sliding_window is None else sliding_window + change
    return attention.packed_attention(*args, sliding_window=wrong, **kwargs)


def with_one_wrong_key(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """In each pack, the last token but one has the key and value of the last one."""
    if key.shape[2] > 1:
        order = torch.arange(key.shape[2])
        order[-2] = order[-1]
        key, value = key[:, :, order], value[:, :, order]
    return attention.packed_attention(module, query, key, value, *args, **kwargs)


def with_layout(change: Callable[[PackLayout], PackLayout], *args: Any, packed: PackLayout, **kwargs: Any) -> Any:
    return attention.packed_attention(*args, packed=change(packed), **kwargs)


def in_half_only(wrong: Callable[..., Any], module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The mistake where attention runs in half precision, and none in fp32."""
    half = query.dtype in attention.HALF or torch.is_autocast_enabled(query.device.type)
    return (wrong if half else attention.packed_attention)(module, query, *args, **kwargs)


WINDOWS: dict[str, Callable[..., Any]] = {
    "window_dropped": partial(with_window, None),
    "window_one_shorter": partial(with_window, -1),
    "window_one_longer": partial(with_window, 1),
}
LAYOUTS: dict[str, Callable[..., Any]] = {
    "one_wrong_key": with_one_wrong_key,
    "wrong_parent": partial(with_layout, with_wrong_parent),
    "leaked_sibling": partial(with_layout, with_leaked_sibling),
    "leaked_neighbor": partial(with_layout, with_leaked_neighbor),
}
ATTENTION = (
    *(Mutant(name, partial(install_attention, wrong), windowed=True) for name, wrong in WINDOWS.items()),
    Mutant("one_wrong_key", partial(install_attention, with_one_wrong_key)),
)
# What only a kernel of half precision gets wrong: in fp32 the same model is sound.
HALF_ONLY = tuple(
    Mutant(f"{name}_in_half_only", partial(install_attention, partial(in_half_only, wrong)), name in WINDOWS)
    for name, wrong in (WINDOWS | LAYOUTS).items()
)

# ------------------------------------------------------------------------- mutants of the layout that the kernel uses


def plain_kernel(*args: Any, enable_gqa: bool = False, **given: Any) -> torch.Tensor:
    """What `varlen_attn` computes since torch 2.12, by its documents; fewer key heads must be asked for."""
    assert enable_gqa or args[0].shape[1] == args[1].shape[1]
    return plain_kernel_of_2_11(*args, **given)


def plain_kernel_of_2_11(
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
) -> torch.Tensor:
    """The same with the signature of torch 2.11: sequence by sequence, the last query at the last key."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    assert q.shape[-1] % 8 == 0
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert all(part.is_contiguous() for part in (q, k, v))
    outputs = []
    for (q0, q1), (k0, k1) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
        assert q1 - q0 <= max_q
        assert k1 - k0 <= max_k
        ago = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        allowed = (ago >= -window_size[1]) & ((ago <= window_size[0]) | (window_size[0] < 0))
        parts = (part.transpose(0, 1) for part in (q[q0:q1], k[k0:k1], v[k0:k1]))
        one = F.scaled_dot_product_attention(*parts, attn_mask=allowed, scale=scale, enable_gqa=True)
        outputs.append(one.transpose(0, 1))
    return torch.cat(outputs)


def install_kernel(monkeypatch: Patch, kernel: Callable[..., Any] = plain_kernel) -> None:
    """Batches run through the one-kernel path of `attention.py`, with `kernel` in the kernel's place."""

    def one_call(module: Any, query: Any, key: Any, value: Any, mask: None, **given: Any) -> Any:
        params = AttentionParams(given["scaling"], given.get("sliding_window"))
        return attention._varlen(query, key, value, params, given["packed"]), None

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    install_attention(one_call, monkeypatch)


def one_wrong_key_index(batch: PackedBatch) -> PackedBatch:
    """The last two keys of the last node have the same position in the pack."""
    index = batch.layout.kv_index.clone()
    if len(index) > 1:
        index[-2] = index[-1]
    return replace(batch, layout=replace(batch.layout, kv_index=index))


def boundless(*args: Any, window_size: tuple[int, int], enable_gqa: bool = False, **given: Any) -> torch.Tensor:
    return plain_kernel(*args, window_size=(-1, 0), enable_gqa=enable_gqa, **given)


def _install_kernel_with(mutate: Mutate, monkeypatch: Patch) -> None:
    install_kernel(monkeypatch)
    install_pack(mutate, monkeypatch)


KERNEL = (
    Mutant("one_wrong_key_index_in_the_kernel", partial(_install_kernel_with, one_wrong_key_index)),
    Mutant("leaked_sibling_in_the_kernel", partial(_install_kernel_with, leaked_sibling)),
    Mutant("window_dropped_in_the_kernel", partial(install_kernel, kernel=boundless), windowed=True),
)
MUTANTS = (*PACKS, *ATTENTION, *HALF_ONLY, *KERNEL)
