"""The gradient form that every policy loss here has, and what a loss sees of a token.

    loss_t = -A_t * sg(w_t) * log pi_t + penalties,    w_t = M_t * min(r_t, C),    r_t = pi_t / mu_t

with sg = stop-gradient, so d loss_t / d log pi_t = -A_t * w_t exactly: C caps a weight and never removes a gradient,
and a masked token (M_t = 0) has a gradient of exactly zero. Source: "Rethinking the Trust Region in LLM Reinforcement
Learning", arXiv 2602.04879, equations 12 and 23. The anchor mu is always the rollout engine's own log-probability.

    head ──> TokenBatch ── token_values ──> TokenValues ── decide ──> TokenTerms ──> losses [T]
             with gradient: log pi and entropies           without gradient

A loss differentiates only log pi (and, for an entropy term, the entropy) of each token, so a head that has its own
backward pass needs no more than d loss_t / d log pi_t and d loss_t / d entropy_t, which autograd gives over leaf
tensors of shape [T].

Thresholds know a token's staleness s, and tell it from the engines' numerics (`staleness_delta`):

    delta(s) = delta * clamp(1 + growth * s, 1 / limit, limit) + allowance * m0

Each step moves the policy by a little, and total variation obeys the triangle inequality, so a token that is s steps
old has used up to s steps' worth of divergence before this step adds any: a growth above 0 gives it that room, one
below 0 trusts old tokens less. m0 is the mean divergence of tokens of staleness ZERO: the same weights sampled them, so
what engine and learner disagree about there is numerics (kernels, precision, routing) and no policy change. D >
delta(s) with allowance 1 compares D - m0, the part that staleness explains, with delta's own budget. With growth 0 and
allowance 0, delta(s) is exactly delta.

Shape legend: T tokens, of any number of sequences one after the other; K recorded candidates per token.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.losses.batch_statistics import BatchStatistics
from learner.losses.penalties import penalty_losses
from leeway.config.algorithms import NO_PENALTIES, Algorithm, LossParameters, Penalties
from leeway.errors import PreconditionError


@dataclass(frozen=True, slots=True)
class Candidates:
    """The likeliest tokens as the engine recorded them, and what the learner says of the same tokens."""

    behavior_logprobs: Tensor  # [T, K]
    policy_logprobs: Tensor  # [T, K]
    valid: Tensor  # [T, K] bool, false where the candidate is the sampled token itself, which has a slot of its own


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokens as the learner has them. Values where `loss_mask` is false may be anything, NaN included."""

    policy_logprobs: Tensor  # [T] log pi, with gradient
    behavior_logprobs: Tensor  # [T] log mu
    advantages: Tensor  # [T]
    loss_mask: Tensor  # [T] bool
    sequence_ids: Tensor  # [T] int64, which sequence of the step a token belongs to
    candidates: Candidates | None = None  # for losses on top-K divergences
    staleness: Tensor | None = None  # [T] int64, in optimizer steps; None for zero everywhere
    proximal_logprobs: Tensor | None = None  # [T] log pi_old, the learner a few steps ago
    reference_logprobs: Tensor | None = None  # [T] of the initial model
    entropies: Tensor | None = None  # [T], with gradient, for an entropy term
    statistics: BatchStatistics | None = None  # of the whole step, for batch-aware losses


@dataclass(frozen=True, slots=True)
class TokenValues:
    """The input of a loss's decision: finite at padding (log mu = log pi = 0, r = 1, A = 0), without gradient."""

    policy_logprobs: Tensor  # [T]
    behavior_logprobs: Tensor  # [T]
    ratio: Tensor  # [T] r = pi / mu
    advantages: Tensor  # [T]
    sequence_ids: Tensor | None = None  # [T]
    candidates: Candidates | None = None
    staleness: Tensor | None = None  # [T]
    proximal_logprobs: Tensor | None = None  # [T]
    statistics: BatchStatistics | None = None


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """A loss's decision per token."""

    kept: Tensor  # [T] bool, M
    weight: Tensor  # [T] M * min(r, C)
    divergence: Tensor | None = None  # [T] what the loss compares with delta; None where it has no threshold
    value: Tensor | None = None  # [T] what to report as the loss, where its source has another value but this gradient


Decide = Callable[[TokenValues, LossParameters], TokenTerms]
Measure = Callable[[TokenValues, LossParameters, int], BatchStatistics]
"""(values, parameters, number of sequences in the step) -> what these tokens add to the step's statistics"""


def load_algorithm(algorithm: Algorithm) -> Decide:
    """Import the function that decides weights for an algorithm."""
    decide: Decide = importlib.import_module(algorithm.module).decide
    return decide


def load_measure(algorithm: Algorithm) -> Measure | None:
    """Import the function that measures a step for a batch-aware algorithm; None for a token-local one."""
    if not algorithm.batch_aware:
        return None
    measure: Measure = importlib.import_module(algorithm.module).measure
    return measure


def token_values(tokens: TokenBatch) -> TokenValues:
    """Detach in at least float32, and mask padding BEFORE the exponential: exp(inf) * 0 would be NaN.

    Log-probabilities that an engine rounded to just above 0 count as 0.
    """
    policy, behavior, advantages = (
        _clean(x, tokens.loss_mask) for x in (tokens.policy_logprobs, tokens.behavior_logprobs, tokens.advantages)
    )
    policy, behavior = policy.clamp(max=0.0), behavior.clamp(max=0.0)
    proximal = tokens.proximal_logprobs
    return TokenValues(
        policy_logprobs=policy,
        behavior_logprobs=behavior,
        ratio=(policy - behavior).exp(),
        advantages=advantages,
        sequence_ids=tokens.sequence_ids,
        candidates=None if tokens.candidates is None else _clean_candidates(tokens.candidates, tokens.loss_mask),
        staleness=tokens.staleness,
        proximal_logprobs=None if proximal is None else _clean(proximal, tokens.loss_mask).clamp(max=0.0),
        statistics=tokens.statistics,
    )


def truncated_terms(ratio: Tensor, kept: Tensor, truncation: float, divergence: Tensor | None = None) -> TokenTerms:
    """Weigh kept tokens by min(r, C), others by zero even where r overflowed.

    Args:
        ratio: [T].
        kept: [T] bool.
        truncation: C, positive, may be infinite.
        divergence: [T] what was compared with a threshold.

    Example:
        r = [100, 0.4], both kept, C = 5: weight = [5, 0.4].
    """
    return TokenTerms(kept, torch.where(kept, ratio.clamp(max=truncation), 0.0), divergence)


def delta_low(values: TokenValues, parameters: LossParameters) -> float | Tensor:
    """The threshold of each token where the advantage is negative: delta_low, or [T] where staleness moves it."""
    return staleness_delta(parameters.delta_low, values.staleness, parameters)


def delta_high(values: TokenValues, parameters: LossParameters) -> float | Tensor:
    """The threshold of each token where the advantage is positive."""
    return staleness_delta(parameters.delta_high, values.staleness, parameters)


def outside_trust_region(values: TokenValues, divergence: Tensor, parameters: LossParameters) -> Tensor:
    """Where a step along the gradient would leave the trust region further (equation 12); every comparison is strict.

    M_t = 0 iff (A > 0 and r > 1 and D > delta_high) or (A < 0 and r < 1 and D > delta_low).

    Args:
        values: [T] each.
        divergence: [T] D.
        parameters: both thresholds.

    Returns:
        [T] bool, the complement of M.

    Example:
        (mu, pi, A) = (.25, .5, 1), delta_high = .25: D = |mu - pi| equals delta, inside; pi = .50001: outside.
    """
    up = (values.advantages > 0) & (values.ratio > 1) & (divergence > delta_high(values, parameters))
    down = (values.advantages < 0) & (values.ratio < 1) & (divergence > delta_low(values, parameters))
    return up | down


def outside_clip_interval(ratio: Tensor, values: TokenValues, parameters: LossParameters) -> Tensor:
    """Where PPO's clip has no gradient: (A > 0 and ratio > 1 + delta_high) or (A < 0 and ratio < 1 - delta_low).

    Args:
        ratio: [T] to whatever anchor the loss has.
        values: [T] each.
        parameters: both sides of the interval.

    Example:
        ratio = 1.5, A = 1, delta_high = .28: outside; A = -1: inside.
    """
    up = (values.advantages > 0) & (ratio > 1 + delta_high(values, parameters))
    down = (values.advantages < 0) & (ratio < 1 - delta_low(values, parameters))
    return up | down


def proximal_ratio(values: TokenValues) -> Tensor:
    """[T] pi / pi_old.

    Raises:
        PreconditionError: pi_old was not given.
    """
    if values.proximal_logprobs is None:
        raise PreconditionError(
            "this loss needs proximal log-probs: of the same tokens under pi_old, the older learner"
        )
    return (values.policy_logprobs - values.proximal_logprobs).exp()


def token_losses(
    tokens: TokenBatch, decide: Decide, parameters: LossParameters, penalties: Penalties = NO_PENALTIES
) -> tuple[Tensor, TokenTerms]:
    """loss_t = -A * sg(w) * log pi + penalties for each token, zero at padding.

    Returns:
        [T] losses before aggregation, at least float32, and the terms behind them.

    Example:
        mu = 1e-4, pi = .01, A = 1 with w = min(100, 5): loss = -5 log .01 = 23.02585, gradient -5.
    """
    values = token_values(tokens)
    terms = decide(values, parameters)
    log_pi = torch.where(tokens.loss_mask, _at_least_float32(tokens.policy_logprobs), 0.0)
    losses = -(values.advantages * terms.weight) * log_pi
    if terms.value is not None:
        losses = losses + (torch.where(tokens.loss_mask, terms.value, 0.0) - losses).detach()
    if penalties.active:
        losses = losses + penalty_losses(
            log_pi,
            values.behavior_logprobs,
            None if tokens.reference_logprobs is None else _clean(tokens.reference_logprobs, tokens.loss_mask),
            None if tokens.entropies is None else torch.where(tokens.loss_mask, tokens.entropies, 0.0),
            penalties,
        )
    return losses, terms


def _clean(x: Tensor, loss_mask: Tensor) -> Tensor:
    return torch.where(loss_mask, _at_least_float32(x.detach()), 0.0)


def _clean_candidates(candidates: Candidates, loss_mask: Tensor) -> Candidates:
    mask = loss_mask.unsqueeze(-1)
    return Candidates(
        behavior_logprobs=_clean(candidates.behavior_logprobs, mask).clamp(max=0.0),
        policy_logprobs=_clean(candidates.policy_logprobs, mask).clamp(max=0.0),
        valid=candidates.valid & mask,
    )


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def staleness_delta(delta: float, staleness: Tensor | None, parameters: LossParameters) -> float | Tensor:
    """delta(s) of each token.

    Args:
        delta: of a token of staleness zero between engines that agree.
        staleness: [T] in steps; None for zero everywhere.
        parameters: growth, its limit, the measured mismatch and its allowance.

    Returns:
        [T] float64, or a number where all tokens share it.

    Example:
        delta .2, growth .25, limit 2: s = 0, 1, 4, 8 give .2, .25, .4, .4; with m0 = .01 and allowance 1, .01 more.
    """
    numerics = parameters.mismatch_allowance * parameters.mismatch
    if staleness is None or parameters.delta_growth == 0:
        return delta + numerics
    limit = parameters.delta_growth_limit
    factor = (1 + parameters.delta_growth * staleness.double()).clamp(1 / limit, limit)
    return delta * factor + numerics
