"""Decoupled PPO: the clip is around a recent policy, another factor corrects for who sampled (AReaL, arXiv 2505.24298).

loss = -min(pi_prox / mu, C) min(u A, clip(u, 1 - delta_low, 1 + delta_high) A), u = pi / pi_prox, so d loss / d log
pi = -A w with w = M min(pi_prox / mu, C) u, M = PPO's clip on u. pi_prox is the learner at the start of a batch
(learner.training.proximal_every_steps). delta = .2, C infinite: it caps the correction, not the ratio.

Example: mu = .1, pi_prox = .4, pi = .44, A = 1: u = 1.1, w = 4 1.1 = 4.4, loss = -4.4; pi = .6: u = 1.5, masked, loss =
-4.8.
"""

from __future__ import annotations

import torch

from learner.losses.form import (
    TokenTerms,
    TokenValues,
    delta_high,
    delta_low,
    outside_clip_interval,
    proximal_ratio,
)
from leeway.config.algorithms import LossParameters
from leeway.errors import PreconditionError


def decide(values: TokenValues, parameters: LossParameters) -> TokenTerms:
    """Mask by the ratio to the recent policy, weigh by both factors."""
    if values.proximal_logprobs is None:
        raise PreconditionError("decoupled-ppo needs proximal log-probs: of the same tokens under the recent policy")
    ratio = proximal_ratio(values)
    correction = (values.proximal_logprobs - values.behavior_logprobs).exp().clamp(max=parameters.truncation)
    kept = ~outside_clip_interval(ratio, values, parameters)
    low = torch.as_tensor(1 - delta_low(values, parameters), dtype=ratio.dtype)
    high = torch.as_tensor(1 + delta_high(values, parameters), dtype=ratio.dtype)
    clipped = torch.minimum(torch.maximum(ratio, low), high)
    surrogate = torch.minimum(ratio * values.advantages, clipped * values.advantages)
    return TokenTerms(
        kept=kept,
        weight=torch.where(kept, correction * ratio, 0.0),
        divergence=(ratio - 1).abs(),
        value=-correction * surrogate,
    )
