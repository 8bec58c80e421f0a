from __future__ import annotations

import math

import numpy as np
import pytest

from leeway.conformance.statistics import (
    FALSE_ALARM,
    FrequencyTest,
    claimed_cells,
    distance,
    freedman_bound,
    g_statistic,
    miscalibration,
    tempered,
)

CLAIMED = np.array([0.4, 0.25, 0.2, 0.1, 0.05])
VOCAB_SIZE = 9


def test_g_is_the_log_likelihood_ratio() -> None:
    counts = np.array([6, 4, 0])
    expected = 2 * (6 * math.log(6 / 5) + 4 * math.log(4 / 3))
    assert g_statistic(counts, np.array([0.5, 0.3, 0.2])) == pytest.approx(expected)
    assert g_statistic(np.array([5, 3, 2]), np.array([0.5, 0.3, 0.2])) == pytest.approx(0.0)


def test_true_claims_are_refuted_as_seldom_as_stated() -> None:
    rng = np.random.default_rng(0)
    test = FrequencyTest(CLAIMED, 200)
    p_values = [test.p_value(rng.multinomial(200, CLAIMED)) for _ in range(1000)]
    # Under true claims the p-value is uniform: 100 of 1000 are expected below 0.1, with a standard deviation of 9.5.
    assert sum(p <= 0.1 for p in p_values) == pytest.approx(100, abs=40)
    assert min(p_values) > FALSE_ALARM


def test_raw_claims_are_refuted_with_the_stated_power() -> None:
    rng = np.random.default_rng(1)
    sampled_from = tempered(CLAIMED, 0.7, VOCAB_SIZE)
    test = FrequencyTest(CLAIMED, 300)
    power = test.power(sampled_from)
    assert 0.2 < power < 0.99  # so few samples that the power can be told from 1
    refuted = np.mean([test.p_value(rng.multinomial(300, sampled_from)) <= FALSE_ALARM for _ in range(500)])
    assert refuted == pytest.approx(power, abs=0.1)  # more than four standard deviations
    certain = FrequencyTest(CLAIMED, 1500)
    assert certain.power(sampled_from) > 0.99
    assert certain.p_value(rng.multinomial(1500, sampled_from)) <= FALSE_ALARM


def test_tempering_is_what_a_softmax_does() -> None:
    logits = np.array([2.0, 1.0, 0.5, -1.0, -1.0, -1.0])
    raw, sharp = (np.exp(logits / t) / np.exp(logits / t).sum() for t in (1.0, 0.7))
    cells = np.append(raw[:3], raw[3:].sum())
    expected = np.append(sharp[:3], sharp[3:].sum())
    assert tempered(cells, 0.7, 6) == pytest.approx(expected)
    assert distance(expected, expected) == 0.0
    assert distance(expected, cells) > 0.05


def test_cells_come_from_claims_and_everything_else_shares_one() -> None:
    token_ids = np.array([7, 7, 3, 7, 9], dtype=np.int32)
    logprobs = np.log(np.array([0.5, 0.5, 0.2, 0.5, 0.1], dtype=np.float32))
    cells, mass = claimed_cells(token_ids, logprobs)
    assert cells.token_ids == (7, 3, 9)
    assert cells.probabilities == pytest.approx([0.5, 0.2, 0.1, 0.2])
    assert mass == pytest.approx(0.8)
    assert cells.counts(np.array([7, 1, 2, 3], dtype=np.int32)).tolist() == [1, 1, 0, 2]
    claimed_too_much = claimed_cells(token_ids, np.zeros(5, dtype=np.float32))
    assert claimed_too_much[1] == pytest.approx(3.0)
    assert claimed_too_much[0].probabilities.sum() == pytest.approx(1.0)


def test_the_bound_solves_freedmans_inequality() -> None:
    bound = freedman_bound(12.0, 1e-5)
    assert math.exp(-(bound**2) / (2 * 12.0 + 2 * bound / 3)) == pytest.approx(1e-5)


def test_calibrated_claims_pass_and_claims_of_a_neighbour_do_not() -> None:
    rng = np.random.default_rng(2)
    claimed = rng.uniform(0.05, 0.95, size=2000)
    for _ in range(50):
        assert miscalibration(claimed.tolist(), (rng.uniform(size=2000) < claimed).tolist()) is None
    happened = rng.uniform(size=2000) < claimed
    shifted = miscalibration(claimed[1:].tolist(), happened[:-1].tolist())
    assert shifted is not None
    assert abs(shifted.claimed - shifted.observed) > 0.1
    assert miscalibration([], []) is None
