"""DPPO with the binary total variation as trust region: arXiv 2602.04879, equations 12 and 13.

M = 0 iff (A > 0 and r > 1 and |mu - pi| > delta_high) or (A < 0 and r < 1 and |mu - pi| > delta_low); w = M min(r, C).
The paper uses delta .15 and C infinite in its sanity test, delta .2 and C = 5 in its scaling runs (the defaults here).

Example: mu = 1e-4, pi = .01, A = 1: r = 100 but D = .0099, kept, w = 5; mu = .5, pi = .75, A = 1: D = .25 > .2, masked.
"""

from __future__ import annotations

from learner.losses.divergences import binary_tv
from learner.losses.form import TokenTerms, TokenValues, outside_trust_region, truncated_terms
from leeway.config.algorithms import LossParameters


def decide(values: TokenValues, parameters: LossParameters) -> TokenTerms:
    """Mask what moves away from mu beyond delta in probability."""
    divergence = binary_tv(values.behavior_logprobs, values.policy_logprobs)
    kept = ~outside_trust_region(values, divergence, parameters)
    return truncated_terms(values.ratio, kept, parameters.truncation, divergence)
