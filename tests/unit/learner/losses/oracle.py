"""The policy losses a second time: NumPy, float64 and wider, one token after the other, written from the papers' rules.

Shares no code with `learner.losses`. A token is a small mapping from token ids to log-probs, so the top-K union and
the left-over bucket are sets and sums here, not slots and masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

INF = float("inf")
Wide = np.longdouble


@dataclass(frozen=True)
class Token:
    log_mu: float
    log_pi: float
    advantage: float
    sequence: int = 0
    token_id: int = 0
    mu_candidates: Mapping[int, float] = field(default_factory=dict)  # TopK(mu, K): id -> log mu
    pi_candidates: Mapping[int, float] = field(default_factory=dict)  # the same ids: log pi
    log_proximal: float = 0.0
    staleness: int = 0


@dataclass(frozen=True)
class Numbers:
    low: float = 0.2
    high: float = 0.2
    truncation: float = INF
    alpha: float = 0.5
    beta: float = 5.0
    divergence: str = "binary-kl"
    growth: float = 0.0
    growth_limit: float = 2.0
    mismatch: float = 0.0
    allowance: float = 0.0

    def delta(self, advantage: float, staleness: int) -> float:
        delta = self.high if advantage > 0 else self.low
        factor = 1 + self.growth * staleness
        factor = min(max(factor, 1 / self.growth_limit), self.growth_limit) if self.growth else 1.0
        return delta * factor + self.allowance * self.mismatch


@dataclass(frozen=True)
class Answer:
    kept: bool
    weight: float
    gradient: float  # d loss / d log pi
    loss: float
    divergence: float | None
    margin: float  # how far the decisive comparison was from a tie; infinite where there is none


def binary(log_mu: float, log_pi: float, kind: str) -> float:
    mu, pi = Wide(np.exp(Wide(log_mu))), Wide(np.exp(Wide(log_pi)))
    if kind == "tv":
        return float(abs(mu - pi))
    no_mu, no_pi = -np.expm1(Wide(log_mu)), -np.expm1(Wide(log_pi))
    rest = Wide(0) if no_mu == 0 else (Wide(INF) if no_pi == 0 else no_mu * np.log(no_mu / no_pi))
    return float(mu * (Wide(log_mu) - Wide(log_pi)) + rest)


def buckets(token: Token) -> list[tuple[Wide, Wide]]:
    """(p_mu, p_pi) over A'': the union of the candidates and the sampled token, then everything else."""
    log_mu = {**token.mu_candidates, token.token_id: token.log_mu}
    log_pi = {**token.pi_candidates, token.token_id: token.log_pi}
    explicit = [(Wide(np.exp(Wide(log_mu[i]))), Wide(np.exp(Wide(log_pi[i])))) for i in sorted(log_mu)]
    other_mu, other_pi = (max(Wide(1) - sum(p[side] for p in explicit), Wide(0)) for side in (0, 1))
    return [*explicit, (other_mu, other_pi)]


def topk(token: Token, kind: str) -> float:
    pairs = buckets(token)
    if kind == "tv":
        return float(sum(abs(mu - pi) for mu, pi in pairs) / 2)
    *explicit, (other_mu, other_pi) = pairs
    total = sum((mu * np.log(mu / pi) for mu, pi in explicit if mu > 0), Wide(0))
    if other_mu > 1e-15:
        total += other_mu * np.log(other_mu / max(other_pi, Wide(1e-15)))
    return float(total)


def divergence(token: Token, name: str) -> float:
    family, kind = name.split("-")
    return binary(token.log_mu, token.log_pi, kind) if family == "binary" else topk(token, kind)


def answers(algorithm: str, tokens: Sequence[Token], numbers: Numbers) -> list[Answer]:
    if algorithm == "trm":
        return trust_region_masking(tokens, numbers)
    return [answer(algorithm, token, numbers) for token in tokens]


def gradient_form(token: Token, kept: bool, weight: float, distance: float | None, margin: float) -> Answer:
    """loss = -A sg(w) log pi."""
    weight = weight if kept else 0.0
    return Answer(kept, weight, -token.advantage * weight, -token.advantage * weight * token.log_pi, distance, margin)


def answer(algorithm: str, token: Token, numbers: Numbers) -> Answer:
    a = token.advantage
    ratio = float(np.exp(Wide(token.log_pi) - Wide(token.log_mu)))
    truncated = min(ratio, numbers.truncation)
    delta = numbers.delta(a, token.staleness)
    mu, pi = float(np.exp(Wide(token.log_mu))), float(np.exp(Wide(token.log_pi)))
    if algorithm.startswith("dppo"):
        distance = divergence(token, algorithm.removeprefix("dppo-"))
        away = (a > 0 and ratio > 1) or (a < 0 and ratio < 1)
        return gradient_form(token, not (away and distance > delta), truncated, distance, abs(distance - delta))
    match algorithm:
        case "pg-is" | "cispo":
            return gradient_form(token, True, truncated, None, INF)
        case "grpo" | "grpo-clip-higher":
            return clip(token, ratio, delta, truncated)
        case "minirl" | "minirl-tis":
            anchored = float(np.exp(Wide(token.log_pi) - Wide(token.log_proximal)))
            return clip(token, anchored, delta, truncated)
        case "minimal-mask":
            kept = not (a < 0 and mu - pi >= delta)
            return gradient_form(token, kept, truncated, abs(mu - pi), abs(mu - pi - delta))
        case "icepop":
            kept = numbers.alpha <= ratio <= numbers.beta
            margin = min(abs(ratio - numbers.alpha), abs(ratio - numbers.beta))
            return gradient_form(token, kept, truncated, None, margin)
        case "drpo":
            factor = 1 - np.sign(a * (ratio - 1)) * abs(pi - mu) / delta
            loss = -a * ratio + abs(a) * mu * (ratio - 1) ** 2 / (2 * delta)
            weight = truncated * factor
            return Answer(True, weight, -a * weight, loss, abs(pi - mu), INF)
        case "predictive-mask":
            distance = divergence(token, numbers.divergence)
            c = float(Wide(pi) - Wide(mu) + sum(p * (m - p) for m, p in buckets(token)))
            kept = not (distance > delta and a * c > 0)
            margin = min(abs(distance - delta), abs(c) if distance > delta else INF)
            return gradient_form(token, kept, truncated, distance, margin)
        case "decoupled-ppo":
            anchored = float(np.exp(Wide(token.log_pi) - Wide(token.log_proximal)))
            correction = min(float(np.exp(Wide(token.log_proximal) - Wide(token.log_mu))), numbers.truncation)
            low, high = 1 - numbers.delta(-1, token.staleness), 1 + numbers.delta(1, token.staleness)
            loss = -correction * min(anchored * a, min(max(anchored, low), high) * a)
            decided = clip(token, anchored, delta, correction * anchored)
            return Answer(decided.kept, decided.weight, decided.gradient, loss, decided.divergence, decided.margin)
        case _:
            raise AssertionError(algorithm)


def clip(token: Token, ratio: float, delta: float, weight: float) -> Answer:
    """PPO's clip: no gradient beyond 1 + delta going up, beyond 1 - delta going down."""
    a = token.advantage
    kept = not ((a > 0 and ratio > 1 + delta) or (a < 0 and ratio < 1 - delta))
    return gradient_form(token, kept, weight, abs(ratio - 1), abs(abs(ratio - 1) - delta))


def trust_region_masking(tokens: Sequence[Token], numbers: Numbers) -> list[Answer]:
    dropped: set[int] = set()
    margins: dict[int, float] = {}
    for token in tokens:
        distance = divergence(token, numbers.divergence)
        eps = numbers.delta(token.advantage, token.staleness)
        if distance > eps:
            dropped.add(token.sequence)
        margins[token.sequence] = min(margins.get(token.sequence, INF), abs(distance - eps))
    return [
        gradient_form(
            token,
            token.sequence not in dropped,
            min(float(np.exp(Wide(token.log_pi) - Wide(token.log_mu))), numbers.truncation),
            divergence(token, numbers.divergence),
            margins[token.sequence],
        )
        for token in tokens
    ]


def aggregated(losses: np.ndarray, lengths: Sequence[int], aggregation: str, horizon: int = 1) -> float:
    """The step's loss, sequence by sequence."""
    parts = np.split(np.asarray(losses, dtype=np.float64), np.cumsum(lengths)[:-1])
    match aggregation:
        case "token-mean":
            return float(sum(part.sum() for part in parts) / sum(lengths))
        case "seq-mean-token-sum":
            return float(np.mean([part.sum() for part in parts]))
        case "seq-mean-token-mean":
            return float(np.mean([part.mean() for part in parts]))
        case "fixed-horizon":
            return float(np.mean([part.sum() / horizon for part in parts]))
        case _:
            raise AssertionError(aggregation)
