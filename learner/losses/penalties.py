"""Terms that are added to any policy loss, on every token: masked ones and ones without advantage too.

Their gradients are true ones, of log pi and of the entropy.

Shape legend: T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leeway.config.algorithms import KlEstimator, Penalties
from leeway.errors import PreconditionError


def quadratic(log_ratio: Tensor) -> Tensor:
    """(log r)^2, which pulls pi back to mu from both sides (prime-rl's IPO-style term, with coefficient 1e-3).

    Args:
        log_ratio: [T] log pi - log mu, with gradient.

    Example:
        mu = .5, pi = .75: (log 1.5)^2 = .1644019.
    """
    return log_ratio.square()


def kl_estimate(policy_logprobs: Tensor, reference_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimate KL(pi || reference) from the sampled token (Schulman, "Approximating KL divergence", 2020).

    k2 = (log pi - log ref)^2 / 2, whose gradient is the KL's where tokens come from pi; k3 = ref / pi - 1 - log(ref /
    pi), GRPO's choice (arXiv 2402.03300), which overflows where pi is far below the reference.

    Args:
        policy_logprobs: [T], with gradient.
        reference_logprobs: [T].
        estimator: "k2" or "k3".

    Example:
        pi = .5, ref = .25: k2 = (log 2)^2 / 2 = .2402265, k3 = .5 - 1 + log 2 = .1931472.
    """
    log_ratio = reference_logprobs - policy_logprobs
    return log_ratio.square() / 2 if estimator == "k2" else torch.expm1(log_ratio) - log_ratio


def penalty_losses(
    policy_logprobs: Tensor,
    behavior_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    entropies: Tensor | None,
    penalties: Penalties,
) -> Tensor:
    """The penalties of each token, zero where all log-probs and the entropy are zero.

    Args:
        policy_logprobs: [T] with gradient.
        behavior_logprobs: [T].
        reference_logprobs: [T], needed for a divergence from the reference.
        entropies: [T] with gradient, needed for an entropy term.
        penalties: the coefficients.

    Raises:
        PreconditionError: something needed was not given.

    Example:
        mu = .5, pi = .75, quadratic 1e-3: 1.644019e-4.
    """
    losses = torch.zeros_like(policy_logprobs)
    if penalties.quadratic:
        losses = losses + penalties.quadratic * quadratic(policy_logprobs - behavior_logprobs)
    if penalties.reference_kl:
        if reference_logprobs is None:
            raise PreconditionError("a divergence from the reference needs reference log-probs: of the initial model")
        estimate = kl_estimate(policy_logprobs, reference_logprobs, penalties.reference_kl_estimator)
        losses = losses + penalties.reference_kl * estimate
    if penalties.entropy:
        if entropies is None:
            raise PreconditionError("an entropy term needs the entropy of each token's distribution")
        losses = losses - penalties.entropy * entropies
    return losses
