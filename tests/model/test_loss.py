"""The losses against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from rmtool.model.loss import bradley_terry


def test_the_loss_is_minus_log_sigmoid_of_the_difference_less_the_margin() -> None:
    chosen, rejected, margin = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.0])
    expected = [-math.log(1 / (1 + math.exp(-(c - r - m)))) for c, r, m in ((2, 1, 0.5), (-1, 3, 0))]
    torch.testing.assert_close(bradley_terry(chosen, rejected, margin), torch.tensor(expected))
    assert bradley_terry(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(math.log(2))


def test_the_loss_stays_finite_for_huge_differences() -> None:
    assert bradley_terry(torch.tensor([-1e4]), torch.tensor([1e4])).item() == pytest.approx(2e4)


def test_a_column_of_rewards_would_broadcast_and_is_refused() -> None:
    with pytest.raises(AssertionError):
        bradley_terry(torch.zeros(3, 1), torch.zeros(3, 1))
    with pytest.raises(AssertionError):
        bradley_terry(torch.zeros(3), torch.zeros(3), torch.zeros(3, 1))
