"""Mutation tests: each mistake must fail the check of random batches, and the checks at load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from mutants import (
    ATTENTION,
    HALF_ONLY,
    KERNEL,
    PACKS,
    Mutant,
    Patch,
    install_kernel,
    install_pack,
    parents_of,
    with_parents,
)
from random_batches import Pool, check_many, draw, pool

from rmtool.model.layout_choice import choose_layout

FAMILIES = ("llama", "mistral_window")


def visible(mutants: Sequence[Mutant]) -> list[Any]:
    """Each mutant with the families that it changes."""
    pairs = [(mutant, family) for mutant in mutants for family in FAMILIES]
    return [
        pytest.param(mutant, family, id=f"{mutant.name}-{family}")
        for mutant, family in pairs
        if family == "mistral_window" or not mutant.windowed
    ]


def packed_seeds(pool: Pool, count: int) -> list[tuple[int, int]]:
    """Seeds of batches that are packed."""
    seeds = [(5, index) for index in range(8 * count)]
    return [seed for seed in seeds if draw(pool, seed).shared][:count]


def refusal(pool: Pool) -> str:
    return choose_layout(pool.model, pool.model, 512).reason or ""


def require_red(pool: Pool) -> None:
    """The check of batches fails, and the probe at load finds changed rewards."""
    with pytest.raises(AssertionError, match=r"a reward differs|changed their order"):
        check_many(pool, packed_seeds(pool, 4))
    assert "prefix sharing changes its rewards" in refusal(pool)


def require_green(pool: Pool) -> None:
    check_many(pool, packed_seeds(pool, 4))
    assert refusal(pool) == ""


@pytest.mark.parametrize(("mutant", "family"), visible((*PACKS, *ATTENTION)))
def test_a_mistake_is_caught(monkeypatch: Patch, mutant: Mutant, family: str) -> None:
    require_green(pool(family))
    mutant.install(monkeypatch)
    require_red(pool(family))


def test_paths_that_are_rebuilt_change_nothing(monkeypatch: Patch) -> None:
    """What the mutants of paths share is not itself a mutant."""
    install_pack(lambda batch: with_parents(batch, parents_of(batch.layout)), monkeypatch)
    require_green(pool("llama"))


@pytest.mark.parametrize(("mutant", "family"), visible(KERNEL))
def test_a_mistake_is_caught_in_the_layout_of_one_kernel(monkeypatch: Patch, mutant: Mutant, family: str) -> None:
    with monkeypatch.context() as sound:
        install_kernel(sound)
        require_green(pool(family))
    mutant.install(monkeypatch)
    require_red(pool(family))


# ---------------------------------------------------------------------------------------------------- half precision


@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_model_shares_prompts_in_half_precision(family: str, precision: str, monkeypatch: Patch) -> None:
    model = pool(family).model
    monkeypatch.setattr(model, "precision", precision)
    assert refusal(pool(family)) == ""


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("mutant", HALF_ONLY, ids=lambda mutant: mutant.name)
def test_what_only_half_precision_gets_wrong_is_caught(mutant: Mutant, precision: str, monkeypatch: Patch) -> None:
    windowed = pool("mistral_window")
    mutant.install(monkeypatch)
    assert refusal(windowed) == ""
    monkeypatch.setattr(windowed.model, "precision", precision)
    assert "half-precision packed attention is off" in refusal(windowed)
