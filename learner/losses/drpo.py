"""DRPO: a smooth trust region, which weighs down instead of masking (arXiv 2606.09821).

loss = -A r + |A| mu (r - 1)^2 / (2 delta), r differentiable, so d loss / d log pi = -A w with
w = min(r, C) (1 - sign(A) (pi - mu) / delta): full weight at mu, none at a distance of delta along the gradient, turned
round beyond it, more on the way back. delta is delta_high where A > 0, delta_low where A < 0. Reports the loss above
where C is infinite, as it is by default.

Example: mu = .5, pi = .6, A = 1, delta = .2: r = 1.2, w = 1.2 (1 - .5) = .6, loss = -1.2 + .5 .04 / .4 = -1.15.
"""

from __future__ import annotations

import math

import torch

from learner.losses.form import TokenTerms, TokenValues, delta_high, delta_low
from leeway.config.algorithms import LossParameters


def decide(values: TokenValues, parameters: LossParameters) -> TokenTerms:
    """Keep every token, weighed by how far it has come."""
    advantages, ratio = values.advantages, values.ratio
    difference = values.policy_logprobs.exp() - values.behavior_logprobs.exp()
    up = torch.as_tensor(delta_high(values, parameters), dtype=ratio.dtype)
    down = torch.as_tensor(delta_low(values, parameters), dtype=ratio.dtype)
    delta = torch.where(advantages > 0, up, down)
    weight = ratio.clamp(max=parameters.truncation) * (1 - advantages.sign() * difference / delta)
    value = -advantages * ratio + advantages.abs() * difference * (ratio - 1) / (2 * delta)
    return TokenTerms(
        kept=torch.ones_like(ratio, dtype=torch.bool),
        weight=weight,
        divergence=difference.abs(),
        value=value if math.isinf(parameters.truncation) else None,
    )
