"""Response groups, packs and plans: properties for any input."""

from __future__ import annotations

import itertools
import tempfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmtool.packing.packs import pack, pad
from rmtool.tokenization.pack_plan import KEYS_PER_TOKEN, plan_inference_packs, plan_packs
from rmtool.tokenization.response_group import Ids, ResponseGroup, Window, build_group, prefix_order
from rmtool.tokenization.token_store import TokenStore

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=5)


@given(SEQUENCES)
def test_a_group_returns_its_sequences(sequences: list[list[int]]) -> None:
    group = build_group(sequences)
    assert [ids.tolist() for ids in group.sequences()] == sequences
    assert all(len(response) for response in group.responses)


@given(SEQUENCES)
def test_the_prefix_is_the_longest_that_leaves_each_response_a_token(sequences: list[list[int]]) -> None:
    group = build_group(sequences)
    longer = len(group.prompt) + 1
    shared = len({tuple(ids[:longer]) for ids in sequences}) == 1 and all(len(ids) > longer for ids in sequences)
    assert len(sequences) == 1 or not shared
    assert group.unique_tokens <= sum(map(len, sequences))


@given(st.lists(SEQUENCES, min_size=1, max_size=4))
def test_a_pack_holds_every_distinct_prefix_once_and_the_end_of_every_sequence(drawn: list[list[list[int]]]) -> None:
    batch = pack([build_group(sequences_) for sequences_ in drawn])
    layout, ids, positions = batch.layout, batch.input_ids[0], batch.position_ids[0]
    sequences = [sequence for sequences_ in drawn for sequence in sequences_]
    prefixes = {tuple(sequence[: length + 1]) for sequence in sequences for length in range(len(sequence))}
    assert len(ids) == sum(layout.lengths) == len(prefixes)
    assert all(path == (*layout.paths[path[-2]], node) for node, path in enumerate(layout.paths) if len(path) > 1)
    assert all(path[-1] == node for node, path in enumerate(layout.paths))
    ends = (layout.cu_seqlens_q[1:] - 1).tolist()
    for sequence, last in zip(sequences, batch.reward_index.tolist(), strict=True):
        node = ends.index(last)
        keys = layout.kv_index[layout.cu_seqlens_k[node] : layout.cu_seqlens_k[node + 1]]
        assert keys[-1] == last
        assert ids[keys].tolist() == sequence
        assert positions[keys].tolist() == list(range(len(keys)))


def prefix_length(a: list[int], b: list[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def windows(arrays: Sequence[Ids]) -> Window:
    return lambda item, start, stop: arrays[item][start:stop]


@given(SEQUENCES, st.integers(0, 12), st.integers(0, 12))
def test_a_window_is_a_slice_of_the_sequence(sequences_: list[list[int]], start: int, length: int) -> None:
    group = build_group(sequences_)
    for index, ids in enumerate(sequences_):
        assert group.window(index, start, start + length).tolist() == ids[start : start + length]


@given(st.lists(st.lists(st.integers(0, 1), max_size=12), max_size=9), st.integers(0, 9), st.sampled_from((1, 4, 1024)))
def test_the_prefix_order_is_that_of_sorted_with_what_neighbors_share(
    lists: list[list[int]], same: int, window: int
) -> None:
    arrays = [np.array([1] * same + ids, dtype=np.int32) for ids in lists]
    order = sorted(range(len(arrays)), key=lambda item: (arrays[item].tolist(), item))
    lists = [arrays[item].tolist() for item in order]
    shared = [prefix_length(*two) for two in itertools.pairwise([[], *lists])]
    with (
        patch("rmtool.tokenization.response_group.SHORTEST_WINDOW", 1),
        patch("rmtool.tokenization.response_group.LONGEST_WINDOW", window),
    ):
        found = list(prefix_order(windows(arrays), len(arrays)))
    assert found == list(zip(order, shared, strict=True))


def test_planning_memory_does_not_grow_with_what_all_share() -> None:
    peaks = []
    for shared in (50, 4000):
        prefix, ends = np.arange(shared, dtype=np.int32), np.arange(40_000, dtype=np.int32).reshape(-1, 2)

        def read(item: int, start: int, stop: int, prefix: Any = prefix, ends: Any = ends) -> Ids:
            return np.concatenate((prefix, ends[item]))[start:stop]

        tracemalloc.start()
        plan_inference_packs(read, [shared + 2] * len(ends), 8192)
        peaks.append(tracemalloc.get_traced_memory()[1] / len(ends))
        tracemalloc.stop()
    assert max(peaks) < 1100
    assert peaks[1] < 3 * peaks[0]


@given(st.lists(SEQUENCES, min_size=1, max_size=4))
def test_a_padded_batch_is_right_padded(drawn: list[list[list[int]]]) -> None:
    groups = [build_group(sequences_) for sequences_ in drawn]
    batch = pad(groups, pad_id=9)
    rows = [ids.tolist() for group in groups for ids in group.sequences()]
    for row, ids, mask, last in zip(rows, batch.input_ids, batch.attention_mask, batch.reward_index, strict=True):
        assert ids[mask.bool()].tolist() == row
        assert mask.tolist() == [1] * len(row) + [0] * (len(mask) - len(row))
        assert last == len(row) - 1
        assert set(ids[~mask.bool()].tolist()) <= {9}


def cost_of(groups: list[ResponseGroup], padded: bool) -> int:
    return (pad(groups, 0) if padded else pack(groups)).input_ids.numel()


@given(st.lists(SEQUENCES, min_size=1, max_size=20), st.integers(1, 60), st.integers(1, 8), st.booleans())
def test_a_plan_is_a_partition_within_the_limit(drawn: Any, max_tokens: int, multiple: int, padded: bool) -> None:
    groups = [build_group(sequences_) for sequences_ in drawn]
    packs = plan_packs(groups, max_tokens, multiple, padded)
    assert len(packs) % multiple == 0
    assert sorted(item for items in packs for item in items) == list(range(len(groups)))
    for items in packs:
        assert len(items) <= 1 or cost_of([groups[item] for item in items], padded) <= max_tokens
    assert packs == plan_packs(groups, max_tokens, multiple, padded)


@given(st.permutations(range(12)), st.integers(1, 4))
def test_pairs_of_one_prompt_share_a_pack(order: list[int], ranks: int) -> None:
    """Four prompts with three pairs each, in any order: the prompts are computed once."""
    prompts = [[10 + index] * 30 for index in range(4)]
    groups = [build_group([[*prompts[at % 4], at, 1], [*prompts[at % 4], at, 2]]) for at in order]
    packs = plan_packs(groups, 80, ranks)
    assert sum(pack([groups[item] for item in items]).input_ids.numel() for items in packs if items) == 4 * 30 + 12 * 3


def test_groups_of_one_prompt_do_not_leave_other_ranks_idle() -> None:
    """Sixteen pairs under one long system prompt, eight ranks: each gets two."""
    groups = [build_group([[*range(2000), 5000 + at, 1], [*range(2000), 5000 + at, 2]]) for at in range(16)]
    assert [len(items) for items in plan_packs(groups, 8192, 8)] == [2] * 8


def test_a_long_prompt_with_many_short_responses_is_split_by_its_keys() -> None:
    sequences = [np.array([*range(400), at], dtype=np.int32) for at in range(900)]
    plan = plan_inference_packs(windows(sequences), [401] * 900, 1500)
    assert len(plan.packs) > 1
    for items in plan.packs:
        batch = pack([build_group([sequences[item]]) for item in items])
        assert len(batch.layout.kv_index) <= KEYS_PER_TOKEN * 1500 + 400


@pytest.mark.parametrize("prompts", [1, 40])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_pack_has_a_bounded_number_of_keys(prompts: int, ranks: int) -> None:
    """Of groups that share a long prompt, and of groups that each have many responses."""
    groups = [
        build_group([[*range(at % prompts, 400), 5000 + at, answer] for answer in range(1 if prompts == 1 else 30)])
        for at in range(120)
    ]
    packs = [[groups[item] for item in items] for items in plan_packs(groups, 2000, ranks, key_cost=1e-3) if items]
    keys = [len(pack(items).layout.kv_index) for items in packs]
    assert max(keys) <= KEYS_PER_TOKEN * 2000 + 400
    if ranks == 1:
        assert sum(keys) > 0.7 * KEYS_PER_TOKEN * 2000 * (len(keys) - 1)  # and no more packs than that needs


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=30), st.integers(1, 40), st.booleans())
def test_every_distinct_sequence_is_computed_once(sequences: list[list[int]], max_tokens: int, padded: bool) -> None:
    arrays = [np.array(ids, dtype=np.int32) for ids in sequences]
    plan = plan_inference_packs(windows(arrays), list(map(len, arrays)), max_tokens, padded)
    read = [item for items in plan.packs for item in items]
    assert sorted(sequences[item] for item in read) == sorted(map(list, {tuple(ids) for ids in sequences}))
    assert [sequences[item] for item in plan.representative] == sequences
    assert set(plan.representative.tolist()) == set(read)
    for items in plan.packs:
        assert len(items) == 1 or cost_of([build_group([sequences[item]]) for item in items], padded) <= max_tokens


@given(st.lists(SEQUENCES, min_size=1, max_size=6))
def test_a_token_store_returns_its_groups_in_any_order(drawn: list[list[list[int]]]) -> None:
    groups = [build_group(sequences_) for sequences_ in drawn]
    with tempfile.TemporaryDirectory() as folder, TokenStore(Path(folder)) as store:
        for group in groups:
            store.append(group)
        assert not list(Path(folder).iterdir())
        for index in reversed(range(len(groups))):
            assert np.array_equal(store[index].prompt, groups[index].prompt)
            assert all(map(np.array_equal, store[index].responses, groups[index].responses))
        assert [len(group.responses) for group in store] == [len(group.responses) for group in groups]


def test_lengths_and_dtypes_are_what_kernels_want() -> None:
    batch = pack([build_group([[1, 2, 3], [1, 2, 4, 5]])])
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.layout.kv_index.dtype == torch.int64
    assert batch.layout.cu_seqlens_q.dtype == batch.layout.cu_seqlens_k.dtype == torch.int32
    assert batch.layout.lengths == (2, 1, 2)
    assert batch.layout.paths == ((0,), (0, 1), (0, 2))
    assert (batch.layout.max_q, batch.layout.max_k) == (2, 4)
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3]]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_truncating_the_prompt_keeps_the_responses(count: int) -> None:
    group = build_group([[1, 2, 3, 4, 5], [1, 2, 3, 6]]).truncate_prompt(count)
    assert [ids.tolist() for ids in group.sequences()] == [[1, 2, 3, 4, 5][count:], [1, 2, 3, 6][count:]]
    assert np.array_equal(group.prompt, [1, 2, 3][count:])


@given(st.lists(st.integers(1, 400), min_size=64, max_size=200), st.integers(2, 8))
def test_ranks_cost_alike_and_no_exchange_helps(sizes: list[int], ranks: int) -> None:
    """Against the obvious bound: the heaviest rank costs at most the mean and half the costliest group more."""
    groups = [build_group([[number, *range(size)], [number, 9]]) for number, size in enumerate(sizes)]
    packs = plan_packs(groups, 10**6, ranks, key_cost=1e-3)
    costs = [sum(groups[item].unique_tokens + 1e-3 * slow_keys(groups[item]) for item in items) for items in packs]
    assert len(packs) == ranks
    largest = max(group.unique_tokens + 1e-3 * slow_keys(group) for group in groups)
    assert max(costs) <= sum(costs) / ranks * 1.005 + largest / 2


def slow_keys(group: ResponseGroup) -> int:
    """Every token attends to those before it; a prompt's tokens once per prompt."""
    asked = {tuple(ids[: at + 1]) for ids in (ids.tolist() for ids in group.sequences()) for at in range(len(ids))}
    return sum(map(len, asked))


def test_padded_packs_are_for_all_ranks() -> None:
    groups = [build_group([[row] * 30 + [1] * 20, [row] * 30 + [2] * 20]) for row in range(16)]
    assert [len(items) for items in plan_packs(groups, 2048, 8, padded=True)] == [2] * 8
    assert sum(map(bool, plan_packs(groups[:3], 2048, 8, padded=True))) == 3
