"""Divergences between the behavior policy mu and the policy pi that need only the sampled token's log-probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
