"""From rewards to advantages."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from learner.batch.advantages import STD_EPSILON, group_advantages
from leeway.config.learner import Baseline


@pytest.mark.parametrize(
    ("baseline", "divide_by_std", "expected"),
    [
        ("group-mean", False, np.array([1, -1, -1, 1]) / 2),
        ("group-mean", True, np.array([0.5, -0.5, -0.5, 0.5]) / (np.std([1, 0, 0, 1], ddof=1) + STD_EPSILON)),
        ("leave-one-out", False, np.array([2, -2, -2, 2]) / 3),
    ],
)
def test_worked_advantages(baseline: Baseline, divide_by_std: bool, expected: np.ndarray) -> None:
    found = group_advantages([1, 0, 0, 1], baseline=baseline, divide_by_std=divide_by_std)
    np.testing.assert_allclose(found, expected, rtol=1e-15)


@pytest.mark.parametrize("seed", range(5))
def test_leave_one_out_is_the_mean_of_the_others(seed: int) -> None:
    rewards = np.random.default_rng(seed).normal(size=6)
    expected = [rewards[i] - np.delete(rewards, i).mean() for i in range(6)]
    np.testing.assert_allclose(group_advantages(rewards.tolist(), baseline="leave-one-out"), expected, rtol=1e-12)


@pytest.mark.parametrize("baseline", get_args(Baseline))
@pytest.mark.parametrize("divide_by_std", [False, True])
def test_equal_rewards_give_exact_zeros(baseline: Baseline, divide_by_std: bool) -> None:
    """0.1 seven times has a mean that differs from 0.1 by a rounding."""
    rewards = [0.1] * 7
    assert float(np.mean(rewards)) != 0.1
    assert group_advantages(rewards, baseline=baseline, divide_by_std=divide_by_std).tolist() == [0.0] * 7
    assert group_advantages([3.0], baseline=baseline, divide_by_std=divide_by_std).tolist() == [0.0]
