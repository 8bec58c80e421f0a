"""The minimal mask: only what was punished far below mu has no gradient; an ablation of arXiv 2602.04879.

M = 0 iff A < 0 and mu - pi >= delta_low (.5; here the comparison is NOT strict); w = M min(r, C), C infinite.

Example: mu = .75, pi = .25, A = -1: mu - pi = .5, masked; A = 1: kept, w = 1/3.
"""

from __future__ import annotations

from learner.losses.form import TokenTerms, TokenValues, delta_low, truncated_terms
from leeway.config.algorithms import LossParameters


def decide(values: TokenValues, parameters: LossParameters) -> TokenTerms:
    """Mask tokens that lost half of all probability and would lose more."""
    loss_of_mass = values.behavior_logprobs.exp() - values.policy_logprobs.exp()
    masked = (values.advantages < 0) & (loss_of_mass >= delta_low(values, parameters))
    return truncated_terms(values.ratio, ~masked, parameters.truncation, loss_of_mass.abs())
