"""The gradient form that every policy loss here has, and what a loss sees of a token.

    loss_t = -A_t * sg(w_t) * log pi_t,    w_t = M_t * min(r_t, C),    r_t = pi_t / mu_t

with sg = stop-gradient, so d loss_t / d log pi_t = -A_t * w_t exactly: C caps a weight and never removes a gradient,
and a masked token (M_t = 0) has a gradient of exactly zero. Source: "Rethinking the Trust Region in LLM Reinforcement
Learning", arXiv 2602.04879, equations 12 and 23. The anchor mu is always the rollout engine's own log-probability.

Shape legend: T tokens, of any number of sequences one after the other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.losses import Algorithm, LossParameters


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokens as the learner has them. Values where `loss_mask` is false may be anything, NaN included."""

    policy_logprobs: Tensor  # [T] log pi, with gradient
    behavior_logprobs: Tensor  # [T] log mu
    advantages: Tensor  # [T]
    loss_mask: Tensor  # [T] bool
    sequence_ids: Tensor  # [T] int64, which sequence of the step a token belongs to


@dataclass(frozen=True, slots=True)
class TokenValues:
    """What a loss decides from: finite at padding (log mu = log pi = 0, r = 1, A = 0), without gradient."""

    policy_logprobs: Tensor  # [T]
    behavior_logprobs: Tensor  # [T]
    ratio: Tensor  # [T] r = pi / mu
    advantages: Tensor  # [T]


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """A loss's decision per token."""

    kept: Tensor  # [T] bool, M
    weight: Tensor  # [T] M * min(r, C)


Decide = Callable[[TokenValues, LossParameters], TokenTerms]


def load_algorithm(algorithm: Algorithm) -> Decide:
    """Import the function that decides weights for an algorithm."""
    decide: Decide = importlib.import_module(algorithm.module).decide
    return decide


def token_values(tokens: TokenBatch) -> TokenValues:
    """Detach in at least float32, and mask padding BEFORE the exponential: exp(inf) * 0 would be NaN.

    Log-probabilities that an engine rounded to just above 0 count as 0.
    """
    policy, behavior, advantages = (
        torch.where(tokens.loss_mask, _at_least_float32(x.detach()), 0.0)
        for x in (tokens.policy_logprobs, tokens.behavior_logprobs, tokens.advantages)
    )
    policy, behavior = policy.clamp(max=0.0), behavior.clamp(max=0.0)
    return TokenValues(policy, behavior, (policy - behavior).exp(), advantages)


def truncated_terms(ratio: Tensor, kept: Tensor, truncation: float) -> TokenTerms:
    """Weigh kept tokens by min(r, C), others by zero even where r overflowed.

    Args:
        ratio: [T].
        kept: [T] bool.
        truncation: C, positive, may be infinite.

    Example:
        r = [100, 0.4], both kept, C = 5: weight = [5, 0.4].
    """
    return TokenTerms(kept, torch.where(kept, ratio.clamp(max=truncation), 0.0))


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
    up = (values.advantages > 0) & (values.ratio > 1) & (divergence > parameters.delta_high)
    down = (values.advantages < 0) & (values.ratio < 1) & (divergence > parameters.delta_low)
    return up | down


def token_losses(tokens: TokenBatch, decide: Decide, parameters: LossParameters) -> tuple[Tensor, TokenTerms]:
    """loss_t = -A * sg(w) * log pi for each token, zero at padding.

    Returns:
        [T] losses before aggregation, at least float32, and the terms behind them.

    Example:
        mu = 1e-4, pi = .01, A = 1 with w = min(100, 5): loss = -5 log .01 = 23.02585, gradient -5.
    """
    values = token_values(tokens)
    terms = decide(values, parameters)
    log_pi = torch.where(tokens.loss_mask, _at_least_float32(tokens.policy_logprobs), 0.0)
    return -(values.advantages * terms.weight) * log_pi, terms


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
