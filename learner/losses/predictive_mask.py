"""The predictive mask: a token is masked when its own step would raise the divergence, not when r says so (2607.10848).

M = 0 iff D > delta and A c > 0, c = (pi_k - mu_k) + sum_i pi_i (mu_i - pi_i), with k the sampled token and i over the
candidates, the sampled token and one bucket for all others. c is, up to a positive factor, how the divergence answers
to a larger logit of k: with two buckets it has the sign of pi_k - mu_k, with more it need not. delta is delta_high
where A > 0, delta_low where A < 0; D is top-K total variation (delta .2), or `divergence`; w = M min(r, C), C infinite.

Example: K = 2, mu = [.5, .25, .12, .08, .04, .01], pi = [.4, .25, .05, .1, .1, .1]: sampled 0: c = -.1 + .005 =
-.095; sampled 2: c = -.07 - .0075 = -.0775, D = .17, so A = -1 with delta .15 is masked and A = 1 is kept.
"""

from __future__ import annotations

from torch import Tensor

from learner.losses.divergences import divergence, topk_buckets
from learner.losses.form import TokenTerms, TokenValues, delta_high, delta_low, truncated_terms
from leeway.config.algorithms import LossParameters


def decide(values: TokenValues, parameters: LossParameters) -> TokenTerms:
    """Mask what is outside and whose step would lead further out."""
    distance = divergence(values, parameters.divergence)
    direction = divergence_slope(values)
    up = (values.advantages > 0) & (direction > 0) & (distance > delta_high(values, parameters))
    down = (values.advantages < 0) & (direction < 0) & (distance > delta_low(values, parameters))
    return truncated_terms(values.ratio, ~(up | down), parameters.truncation, distance)


def divergence_slope(values: TokenValues) -> Tensor:
    """[T] float64 c, positive where raising the sampled token's logit raises the divergence."""
    buckets = topk_buckets(values)
    sampled = values.policy_logprobs.double().exp() - values.behavior_logprobs.double().exp()
    return sampled + (buckets.policy * (buckets.behavior - buckets.policy)).sum(dim=-1)
