"""What a step reports of its tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from learner.losses.form import Candidates
from learner.training.statistics import TOKEN, candidate_statistics, candidate_totals, token_statistics


def tokens(mu: list[float], pi: list[float], advantages: list[float], kept: list[bool], entropies: list[float]) -> Any:
    made = np.zeros(len(mu), TOKEN)
    made["behavior_logprob"], made["policy_logprob"] = np.log(mu), np.log(pi)
    made["ratio"] = np.array(pi) / mu
    made["advantage"], made["kept"], made["entropy"] = advantages, kept, entropies
    return made


def test_masked_tokens_are_described_apart_from_those_without_advantage() -> None:
    """The paper watches the mean mu, pi, r and entropy of what the mask removed."""
    mu, pi, advantages = [0.1, 0.5, 0.8, 0.4], [0.6, 0.5, 0.2, 0.4], [1.0, 1.0, -1.0, 0.0]
    found = token_statistics(tokens(mu, pi, advantages, [False, True, False, False], [1.0, 2.0, 3.0, 4.0]))
    assert found["masked_fraction"] == pytest.approx(2 / 3)
    assert found["masked_fraction_positive"] == pytest.approx(1 / 3)
    assert found["masked_behavior_probability_mean"] == pytest.approx(0.45)
    assert found["masked_policy_probability_mean"] == pytest.approx(0.4)
    assert found["masked_ratio_mean"] == pytest.approx((6 + 0.25) / 2)
    assert found["masked_entropy_mean"] == pytest.approx(2.0)


def test_nothing_is_said_of_masked_tokens_where_there_are_none() -> None:
    found = token_statistics(tokens([0.5, 0.5], [0.75, 0.2], [1.0, 1.0], [True, True], [0.0, 0.0]))
    assert found["masked_fraction"] == 0
    assert not [name for name in found if name.startswith("masked_") and "fraction" not in name]
    assert all(math.isfinite(number) for number in found.values())


def test_the_mass_of_recorded_candidates_counts_the_sampled_one_too() -> None:
    first = Candidates(
        torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.4, 0.25]]).log(), torch.tensor([[False, True]])
    )
    second = Candidates(
        torch.tensor([[0.9, 0.05], [0.6, 0.2]]).log(),
        torch.tensor([[0.8, 0.1], [0.5, 0.2]]).log(),
        torch.ones(2, 2) > 0,
    )
    totals = candidate_totals([first, second])
    found = candidate_statistics(totals)
    assert found["topk_behavior_mass"] == pytest.approx((0.75 + 0.95 + 0.8) / 3)
    assert found["topk_policy_mass"] == pytest.approx((0.65 + 0.9 + 0.7) / 3)
    assert candidate_statistics({name: 2 * total for name, total in totals.items()}) == found  # two equal ranks
    assert candidate_statistics(candidate_totals([None])) == {}
