"""What a step reports of its tokens."""

from __future__ import annotations

import math

import pytest
import torch

from learner.losses.form import Candidates, TokenTerms, TokenValues
from learner.training.statistics import candidate_statistics, token_statistics


def values(mu: list[float], pi: list[float], advantages: list[float]) -> TokenValues:
    behavior, policy = torch.tensor(mu).double().log(), torch.tensor(pi).double().log()
    return TokenValues(policy, behavior, (policy - behavior).exp(), torch.tensor(advantages).double())


def test_masked_tokens_are_described_apart_from_those_without_advantage() -> None:
    """The paper watches the mean mu, pi, r and entropy of what the mask removed."""
    tokens = values([0.1, 0.5, 0.8, 0.4], [0.6, 0.5, 0.2, 0.4], [1.0, 1.0, -1.0, 0.0])
    terms = TokenTerms(kept=torch.tensor([False, True, False, False]), weight=torch.zeros(4))
    found = token_statistics(tokens, terms, torch.tensor([1.0, 2.0, 3.0, 4.0]).double())
    assert found["masked_fraction"] == pytest.approx(2 / 3)
    assert found["masked_fraction_positive"] == pytest.approx(1 / 3)
    assert found["masked_behavior_probability_mean"] == pytest.approx(0.45)
    assert found["masked_policy_probability_mean"] == pytest.approx(0.4)
    assert found["masked_ratio_mean"] == pytest.approx((6 + 0.25) / 2)
    assert found["masked_entropy_mean"] == pytest.approx(2.0)


def test_nothing_is_said_of_masked_tokens_where_there_are_none() -> None:
    tokens = values([0.5, 0.5], [0.75, 0.2], [1.0, 1.0])
    found = token_statistics(tokens, TokenTerms(torch.tensor([True, True]), torch.ones(2)), torch.zeros(2))
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
    found = candidate_statistics([first, second], lambda tensor, _: tensor)
    assert found["topk_behavior_mass"] == pytest.approx((0.75 + 0.95 + 0.8) / 3)
    assert found["topk_policy_mass"] == pytest.approx((0.65 + 0.9 + 0.7) / 3)
    doubled = candidate_statistics([first, second], lambda tensor, _: tensor * 2)
    assert doubled == found  # two ranks that hold the same
    assert candidate_statistics([None], lambda tensor, _: tensor) == {}
