"""DPPO with the top-K KL divergence as trust region: arXiv 2602.04879, equations 12 and 16.

As with the top-K total variation, D = KL(mu || pi) over the same buckets. The paper uses K = 20 and delta .05.

Example: K = 2, mu = [.5, .25, .12, .08, .04, .01], pi = [.4, .25, .05, .1, .1, .1], A = -1: sampled token 0: D = .0275,
kept; sampled token 2: D = .108 > .05, masked.
"""

from __future__ import annotations

from learner.losses.divergences import topk_kl
from learner.losses.form import TokenTerms, TokenValues, outside_trust_region, truncated_terms
from leeway.config.algorithms import LossParameters


def decide(values: TokenValues, parameters: LossParameters) -> TokenTerms:
    """Mask what moves away from mu beyond delta in relative entropy, over the likeliest tokens."""
    divergence = topk_kl(values)
    kept = ~outside_trust_region(values, divergence, parameters)
    return truncated_terms(values.ratio, kept, parameters.truncation, divergence)
