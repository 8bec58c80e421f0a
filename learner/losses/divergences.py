"""Divergences between the behavior policy mu and the policy pi, direction mu || pi.

The binary ones need only the sampled token's log-probabilities; the top-K ones also those of the recorded candidates.

Shape legend: T tokens, K recorded candidates per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.losses.form import TokenValues
from leeway.config.algorithms import DivergenceName
from leeway.errors import PreconditionError


def log_one_minus_exp(logp: Tensor) -> Tensor:
    """log(1 - p) from log p, exact to rounding at both ends: 1 - p is -expm1(log p) near p = 1 and log1p(-p) below 1/2.

    Args:
        logp: [T], at most 0.

    Example:
        log p = log .99: log .01 = -4.60517.
    """
    near_one = (-torch.expm1(logp)).log()
    return torch.where(logp > -math.log(2), near_one, torch.log1p(-logp.exp()))


def binary_tv(behavior_logprobs: Tensor, policy_logprobs: Tensor) -> Tensor:
    """Total variation of "this token" against "another": D = |mu_a - pi_a| (arXiv 2602.04879, equation 13).

    Args:
        behavior_logprobs: [T] log mu_a.
        policy_logprobs: [T] log pi_a.

    Returns:
        [T] in [0, 1].

    Example:
        mu = .5, pi = .75: D = .25.
    """
    return (behavior_logprobs.exp() - policy_logprobs.exp()).abs()


def binary_kl(behavior_logprobs: Tensor, policy_logprobs: Tensor) -> Tensor:
    """KL(mu || pi) of the two outcomes "this token" and "another" (arXiv 2602.04879, equation 14).

    D = mu_a log(mu_a / pi_a) + (1 - mu_a) log((1 - mu_a) / (1 - pi_a)), with 0 log 0 = 0; infinite where pi_a = 1 >
    mu_a.

    Args:
        behavior_logprobs: [T] log mu_a, at most 0.
        policy_logprobs: [T] log pi_a, at most 0.

    Returns:
        [T], at least 0 up to rounding.

    Example:
        mu = .5, pi = .75: D = .5 log(2/3) + .5 log 2 = .1438410362.
    """
    others = -torch.expm1(behavior_logprobs)
    log_odds = log_one_minus_exp(behavior_logprobs) - log_one_minus_exp(policy_logprobs)
    sampled_term = behavior_logprobs.exp() * (behavior_logprobs - policy_logprobs)
    return sampled_term + torch.where(others > 0, others * log_odds, 0.0)


@dataclass(frozen=True, slots=True)
class Buckets:
    """A'' of arXiv 2602.04879: K slots for candidates, one for the sampled token, one for all other tokens.

    Masses are float64 and 0 in slots that are not used. The slot of a candidate that IS the sampled token is not used,
    so the K + 1 explicit slots hold A' = TopK(mu, K) union {sampled}, each token once.
    """

    behavior: Tensor  # [T, K + 2] p_mu
    policy: Tensor  # [T, K + 2] p_pi
    behavior_logprobs: Tensor  # [T, K + 2], finite everywhere
    policy_logprobs: Tensor  # [T, K + 2], finite everywhere


def topk_buckets(values: TokenValues) -> Buckets:
    """Gather the slots, and what is left over: other = 1 - sum(A'), never below 0.

    A left-over mass below the rounding of the log-probs it was computed from counts as none under mu, and as that
    rounding under pi, so that noise cannot make a divergence infinite.

    Raises:
        PreconditionError: no candidates were recorded.

    Example:
        mu = [.5, .25, .12, .08, .04, .01], K = 2, sampled token 2: [.5, .25 | .12 | .13]; sampled token 0: the first
        candidate's slot is empty, [-, .25 | .5 | .25].
    """
    candidates = values.candidates
    if candidates is None:
        raise PreconditionError("a top-K divergence needs the log-probs of recorded candidates; set sampling.topk")
    noise = 4 * torch.finfo(values.ratio.dtype).eps
    mu, log_mu = _with_other(candidates.behavior_logprobs, values.behavior_logprobs, candidates.valid, noise)
    pi, log_pi = _with_other(candidates.policy_logprobs, values.policy_logprobs, candidates.valid, noise)
    return Buckets(mu, pi, log_mu, log_pi)


def _with_other(candidates: Tensor, sampled: Tensor, valid: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Masses and log-masses [T, K + 2]."""
    used = torch.cat([valid, torch.ones_like(valid[:, :1])], dim=-1)
    logprobs = torch.where(used, torch.cat([candidates, sampled.unsqueeze(-1)], dim=-1).double(), 0.0)
    masses = torch.where(used, logprobs.exp(), 0.0)
    other = 1 - masses.sum(dim=-1, keepdim=True)
    other = torch.where(other > noise, other, 0.0)
    return torch.cat([masses, other], dim=-1), torch.cat([logprobs, other.clamp(min=noise).log()], dim=-1)


def topk_tv(values: TokenValues) -> Tensor:
    """Total variation over the buckets: D = sum |p_mu - p_pi| / 2 (arXiv 2602.04879, equation 15).

    Returns:
        [T] in [0, 1].

    Example:
        mu = [.5, .25, .12, .08, .04, .01], pi = [.4, .25, .05, .1, .1, .1], K = 2: sampled 0 or 5: .1; sampled 2: .17.
    """
    buckets = topk_buckets(values)
    return ((buckets.behavior - buckets.policy).abs().sum(dim=-1) / 2).to(values.ratio.dtype)


def topk_kl(values: TokenValues) -> Tensor:
    """KL(mu || pi) over the buckets: D = sum p_mu log(p_mu / p_pi), 0 log 0 = 0 (arXiv 2602.04879, equation 16).

    Returns:
        [T], at least 0 up to rounding.

    Example:
        As for topk_tv: sampled 0: .0274537165; sampled 2: .107915781; sampled 5: .07874864604.
    """
    buckets = topk_buckets(values)
    terms = buckets.behavior * (buckets.behavior_logprobs - buckets.policy_logprobs)
    return terms.sum(dim=-1).to(values.ratio.dtype)


def divergence(values: TokenValues, name: DivergenceName) -> Tensor:
    """[T] the divergence of that name, for losses that let one choose."""
    match name:
        case "binary-tv":
            return binary_tv(values.behavior_logprobs, values.policy_logprobs)
        case "binary-kl":
            return binary_kl(values.behavior_logprobs, values.policy_logprobs)
        case "topk-tv":
            return topk_tv(values)
        case "topk-kl":
            return topk_kl(values)
