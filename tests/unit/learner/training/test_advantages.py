"""From rewards to advantages."""

from __future__ import annotations

import numpy as np
import pytest

from learner.batch.advantages import STD_EPSILON, group_advantages


def test_worked_advantages() -> None:
    assert group_advantages([1, 0, 0, 1]).tolist() == [0.5, -0.5, -0.5, 0.5]


def test_advantages_over_std() -> None:
    std = np.std([1, 0, 0, 1], ddof=1)
    expected = np.array([0.5, -0.5, -0.5, 0.5]) / (std + STD_EPSILON)
    np.testing.assert_allclose(group_advantages([1, 0, 0, 1], divide_by_std=True), expected, rtol=1e-15)


@pytest.mark.parametrize("divide_by_std", [False, True])
def test_equal_rewards_give_exact_zeros(divide_by_std: bool) -> None:
    """0.1 seven times has a mean that differs from 0.1 by a rounding."""
    rewards = [0.1] * 7
    assert float(np.mean(rewards)) != 0.1
    assert group_advantages(rewards, divide_by_std=divide_by_std).tolist() == [0.0] * 7
    assert group_advantages([3.0], divide_by_std=divide_by_std).tolist() == [0.0]
