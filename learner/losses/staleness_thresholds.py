"""A trust-region threshold that knows a token's age, and tells age from numerics.

    delta(s) = delta * clamp(1 + growth * s, 1 / limit, limit) + allowance * m0

s is a token's staleness in optimizer steps. Each step moves the policy by a little, and total variation obeys the
triangle inequality, so a token that is s steps old has used up to s steps' worth of divergence before this step adds
any: a growth above 0 gives it that room, one below 0 trusts old tokens less. m0 is the mean divergence of tokens of
staleness ZERO: the same weights sampled them, so what engine and learner disagree about there is numerics (kernels,
precision, routing) and no policy change. D > delta(s) with allowance 1 compares D - m0, the part that age explains,
with delta's own budget. With growth 0 and allowance 0 this is delta, to the bit.

Shape legend: T tokens.
"""

from __future__ import annotations

from torch import Tensor

from leeway.config.algorithms import LossParameters


def staleness_delta(delta: float, staleness: Tensor | None, parameters: LossParameters) -> float | Tensor:
    """delta(s) of each token.

    Args:
        delta: of a token of staleness zero between engines that agree.
        staleness: [T] in steps; None for zero everywhere.
        parameters: growth, its limit, the measured mismatch and its allowance.

    Returns:
        [T] float64, or a number where all tokens share it.

    Example:
        delta .2, growth .25, limit 2: s = 0, 1, 4, 8 give .2, .25, .4, .4; with m0 = .01 and allowance 1, .01 more.
    """
    numerics = parameters.mismatch_allowance * parameters.mismatch
    if staleness is None or parameters.delta_growth == 0:
        return delta + numerics
    limit = parameters.delta_growth_limit
    factor = (1 + parameters.delta_growth * staleness.double()).clamp(1 / limit, limit)
    return delta * factor + numerics
