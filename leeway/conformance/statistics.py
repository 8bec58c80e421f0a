"""The tests of claimed log-probs against sampled tokens, as pure functions. No asymptotics: every level is a bound.

Shape legend: C cells of a distribution (the last one is "any other token"), B simulated experiments, n tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]

FALSE_ALARM: Final = 2.5e-4
"""Probability with which one statistical requirement fails on a server that tells the truth; there are three."""
_SIMULATED: Final = 12_000
_MAX_CELLS: Final = 32
_CALIBRATION_BINS: Final = 10
_SMALLEST_PROBABILITY: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Cells:
    """A distribution cut into cells: single tokens, and all others together."""

    token_ids: tuple[int, ...]  # [C - 1]
    probabilities: Float64Array  # [C]

    def counts(self, token_ids: NDArray[np.int32]) -> Int64Array:
        """[C], how many of the tokens fall into each cell."""
        single = [int((token_ids == token_id).sum()) for token_id in self.token_ids]
        return np.array([*single, len(token_ids) - sum(single)], dtype=np.int64)


def claimed_cells(token_ids: NDArray[np.int32], logprobs: NDArray[np.float32]) -> tuple[Cells, float]:
    """Cells from tokens sampled after one prompt and the log-probs claimed for them; also the mass claimed in all.

    The likeliest tokens that were seen get a cell each, with the mean of what was claimed for them. The cells may only
    be tested with other samples than these, or the choice of cells would bias the test.
    """
    probabilities = {int(token): float(np.exp(logprobs[token_ids == token]).mean()) for token in np.unique(token_ids)}
    mass = sum(probabilities.values())
    likeliest = sorted(probabilities, key=lambda token: -probabilities[token])[:_MAX_CELLS]
    singles = np.array([probabilities[token] for token in likeliest])
    rest = max(1.0 - singles.sum(), _SMALLEST_PROBABILITY)
    cells = np.maximum(np.append(singles, rest), _SMALLEST_PROBABILITY)
    return Cells(tuple(likeliest), cells / cells.sum()), mass


def g_statistic(counts: Int64Array, probabilities: Float64Array) -> Float64Array:
    """G = 2 sum_c k_c ln(k_c / (N p_c)), the log-likelihood ratio of observed and claimed frequencies.

    Args:
        counts: [..., C].
        probabilities: [C].

    Returns:
        [...]; 0 when they agree, larger when they do not.
    """
    expected = counts.sum(axis=-1, keepdims=True) * probabilities
    terms = np.where(counts > 0, counts * np.log(np.maximum(counts, 1) / expected), 0.0)
    return 2.0 * terms.sum(axis=-1)


class FrequencyTest:
    """Are counts a sample of what was claimed? A Monte Carlo test, exact at any size (Barnard 1963, Dwass 1957).

    With G of the counts and G_1 .. G_B of experiments simulated from the claims,

        p = (1 + #{b: G_b >= G}) / (B + 1),    P(p <= alpha) <= alpha   if the claims are true.

    Args:
        claimed: [C], fixed before anything is counted.
        total: how many tokens are counted.
        seed: of the simulation.
    """

    def __init__(self, claimed: Float64Array, total: int, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._claimed = claimed
        self._total = total
        self._null = self._simulated(claimed, _SIMULATED)  # [B]

    def power(self, alternative: Float64Array) -> float:
        """The probability of refuting the claims when tokens come from another distribution, [C]."""
        critical = np.quantile(self._null, 1.0 - FALSE_ALARM)
        return float((self._simulated(alternative, _SIMULATED // 3) > critical).mean())

    def p_value(self, counts: Int64Array) -> float:
        """The p-value of counts, [C]; the claims are refuted when it is at most FALSE_ALARM."""
        extreme = int((self._null >= g_statistic(counts, self._claimed)).sum())
        return (1 + extreme) / (_SIMULATED + 1)

    def _simulated(self, probabilities: Float64Array, experiments: int) -> Float64Array:
        counts = self._rng.multinomial(self._total, probabilities, size=experiments)
        return g_statistic(counts, self._claimed)


def tempered(probabilities: Float64Array, temperature: float, vocab_size: int) -> Float64Array:
    """The distribution sampled at a temperature by a server whose claims ignore it: a_c = p_c^(1/T) / sum_j p_j^(1/T).

    The last cell stands for all tokens without one; it is taken as spread evenly over them.
    """
    others = max(vocab_size - (len(probabilities) - 1), 1)
    single = probabilities[:-1] ** (1.0 / temperature)
    rest = others * (probabilities[-1] / others) ** (1.0 / temperature)
    powers = np.append(single, rest)
    return powers / powers.sum()


def distance(alternative: Float64Array, claimed: Float64Array) -> float:
    """sum_c (a_c - p_c)^2 / p_c: what one sample contributes to telling the two apart."""
    return float(((alternative - claimed) ** 2 / claimed).sum())


@dataclass(frozen=True, slots=True)
class Miscalibration:
    """Tokens for which the claims cannot be true."""

    lowest: float  # the bin of claimed probabilities
    highest: float
    num_tokens: int
    claimed: float  # mean in the bin
    observed: float  # frequency in the bin


def miscalibration(claimed: Sequence[float], happened: Sequence[bool]) -> Miscalibration | None:
    """Does what is claimed with probability p happen with frequency p, along sequences? The first bin where it cannot.

    Each token contributes X_t = 1[event_t] - p_t, a martingale difference, since p_t depends on the tokens before
    alone. For the tokens of one bin of p, with S = sum X_t and V = sum p_t (1 - p_t), Freedman (1975) bounds

        P(S >= s and V <= v) <= exp(-s^2 / (2 v + 2 s / 3)).

    v is the power of two above V; bins, powers and both signs share FALSE_ALARM.
    """
    probabilities, events = np.asarray(claimed, dtype=np.float64), np.asarray(happened, dtype=np.float64)
    bins = np.minimum((probabilities * _CALIBRATION_BINS).astype(np.int64), _CALIBRATION_BINS - 1)
    largest_power = max(math.ceil(math.log2(max(len(probabilities), 1) / 4 + 1)), 1)
    for index in range(_CALIBRATION_BINS):
        chosen = bins == index
        p = probabilities[chosen]
        power = math.ceil(math.log2(max(float((p * (1.0 - p)).sum()), 1.0)))
        bound = freedman_bound(2.0**power, FALSE_ALARM / (2 * _CALIBRATION_BINS * (largest_power + 1)))
        if abs(float((events[chosen] - p).sum())) > bound:
            return Miscalibration(
                index / _CALIBRATION_BINS,
                (index + 1) / _CALIBRATION_BINS,
                int(chosen.sum()),
                float(p.mean()),
                float(events[chosen].mean()),
            )
    return None


def freedman_bound(variance: float, level: float) -> float:
    """The s with exp(-s^2 / (2 v + 2 s / 3)) = level: s = l/3 + sqrt(l^2/9 + 2 v l), l = ln(1/level)."""
    log_level = math.log(1.0 / level)
    return log_level / 3.0 + math.sqrt(log_level**2 / 9.0 + 2.0 * variance * log_level)
