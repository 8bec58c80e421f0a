"""DPPO with the binary KL divergence as trust region: arXiv 2602.04879, equations 12 and 14.

M = 0 iff (A > 0 and r > 1 and D > delta_high) or (A < 0 and r < 1 and D > delta_low), D = KL(mu || pi) of "this
token" against "another"; w = M min(r, C). The paper uses delta .05, and C as with binary TV.

Example: mu = .99, pi = .8, A = -1: D = .181 > .05, masked; mu = 1e-4, pi = .01, A = 1: D = .0095, kept.
"""

from __future__ import annotations

from learner.losses.divergences import binary_kl
from learner.losses.form import TokenTerms, TokenValues, outside_trust_region, truncated_terms
from leeway.config.algorithms import LossParameters


def decide(values: TokenValues, parameters: LossParameters) -> TokenTerms:
    """Mask what moves away from mu beyond delta in relative entropy."""
    divergence = binary_kl(values.behavior_logprobs, values.policy_logprobs)
    kept = ~outside_trust_region(values, divergence, parameters)
    return truncated_terms(values.ratio, kept, parameters.truncation, divergence)
