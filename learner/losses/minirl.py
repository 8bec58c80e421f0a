"""MiniRL, PPO's clip around a recomputed old policy with the weight still against mu: a baseline of arXiv 2602.04879.

M = 0 iff (A > 0 and r' > 1 + delta_high) or (A < 0 and r' < 1 - delta_low), r' = pi / pi_old; w = M min(r, C), r = pi /
mu. pi_old is the learner at the start of a batch (learner.training.proximal_every_steps). minirl has C infinite,
minirl-tis C = 3; the clip is grpo-clip-higher's. The paper shows that this anchor collapses where engines disagree.

Example: mu = .1, pi_old = .4, pi = .5, A = 1: r' = 1.25 < 1.28, kept, w = 5 (3 with tis); pi = .52: r' = 1.3, masked.
"""

from __future__ import annotations

from learner.losses.form import TokenTerms, TokenValues, outside_clip_interval, proximal_ratio, truncated_terms
from leeway.config.algorithms import LossParameters


def decide(values: TokenValues, parameters: LossParameters) -> TokenTerms:
    """Mask by what this batch's own steps have changed, weigh by the ratio to mu."""
    ratio = proximal_ratio(values)
    kept = ~outside_clip_interval(ratio, values, parameters)
    return truncated_terms(values.ratio, kept, parameters.truncation, (ratio - 1).abs())
