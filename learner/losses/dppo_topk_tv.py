"""DPPO with the top-K total variation as trust region: arXiv 2602.04879, equations 12 and 15.

M = 0 iff (A > 0 and r > 1 and D > delta_high) or (A < 0 and r < 1 and D > delta_low); w = M min(r, C), with D over A'':
TopK(mu, K), the sampled token, and one bucket for all others. The paper uses K = 20 and delta .2. Needs the engine's
top-K log-probs: sampling.topk.

Example: K = 2, mu = [.5, .25, .12, .08, .04, .01], pi = [.4, .25, .05, .1, .1, .1], sampled token 2, A = -1: r =
.4167, D = .17; delta .15 masks it, delta .2 keeps it.
"""

from __future__ import annotations

from learner.losses.divergences import topk_tv
from learner.losses.form import TokenTerms, TokenValues, outside_trust_region, truncated_terms
from leeway.config.algorithms import LossParameters


def decide(values: TokenValues, parameters: LossParameters) -> TokenTerms:
    """Mask what moves away from mu beyond delta in probability, over the likeliest tokens."""
    divergence = topk_tv(values)
    kept = ~outside_trust_region(values, divergence, parameters)
    return truncated_terms(values.ratio, kept, parameters.truncation, divergence)
