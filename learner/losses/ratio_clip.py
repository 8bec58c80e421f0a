"""PPO's ratio clip in the gradient form: grpo (arXiv 2402.03300), and grpo-clip-higher (DAPO, arXiv 2503.14476).

M = 0 iff (A > 0 and r > 1 + delta_high) or (A < 0 and r < 1 - delta_low); w = M min(r, C). That is the gradient of
-min(r A, clip(r, 1 - delta_low, 1 + delta_high) A), with r anchored at mu. There is no dual clip.

Example: delta_low = .2, delta_high = .28: mu = .3, pi = .22, A = -.5: r = .733 < .8, masked; mu = .5, pi = .75, A =
1: masked.
"""

from __future__ import annotations

from learner.losses.form import TokenTerms, TokenValues, outside_clip_interval, truncated_terms
from leeway.config.algorithms import LossParameters


def decide(values: TokenValues, parameters: LossParameters) -> TokenTerms:
    """Mask what has left the clip interval on its advantage's side."""
    kept = ~outside_clip_interval(values.ratio, values, parameters)
    return truncated_terms(values.ratio, kept, parameters.truncation, (values.ratio - 1).abs())
