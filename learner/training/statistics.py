"""What one step tells about itself: a few numbers from its tokens, its rewards and its advantages.

Shape legend: T trained tokens of a step, N its trajectories, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.losses.batch_statistics import Reduce
from learner.losses.form import Candidates, TokenTerms, TokenValues


@torch.no_grad()
def token_statistics(values: TokenValues, terms: TokenTerms, entropies: Tensor) -> dict[str, float]:
    """Statistics over all trained tokens, before the step.

    Masked fractions are shares of the tokens whose advantage is not zero; `..._positive` and `..._negative` add up to
    the whole. k1 and k3 estimate KL(mu || pi): mean(-log r) and mean(r - 1 - log r).

    Args:
        values: [T] each.
        terms: [T] each.
        entropies: [T] of the policy's distribution.

    Returns:
        Numbers by name; those of masked tokens only where there is one.

    Example:
        mu = [.5, .5], pi = [.75, .2]: mean_abs_policy_behavior_difference = .275, its maximum .3, signed .25 and -.3.
    """
    if values.ratio.numel() == 0:
        return {}
    difference = values.policy_logprobs.exp() - values.behavior_logprobs.exp()
    log_ratio = values.policy_logprobs - values.behavior_logprobs
    has_signal = values.advantages != 0
    masked = ~terms.kept & has_signal
    num_signal = has_signal.sum().clamp(min=1)
    named = {
        "mean_abs_policy_behavior_difference": difference.abs().mean(),
        "max_abs_policy_behavior_difference": difference.abs().max(),
        "max_policy_behavior_difference": difference.max(),
        "min_policy_behavior_difference": difference.min(),
        "ratio_mean": values.ratio.mean(),
        "ratio_max": values.ratio.max(),
        "masked_fraction": masked.sum() / num_signal,
        "masked_fraction_positive": (masked & (values.advantages > 0)).sum() / num_signal,
        "masked_fraction_negative": (masked & (values.advantages < 0)).sum() / num_signal,
        "entropy": entropies.mean(),
        "k1": -log_ratio.mean(),
        "k3": (values.ratio - 1 - log_ratio).mean(),
    }
    if masked.any():
        named |= {
            "masked_behavior_probability_mean": values.behavior_logprobs[masked].exp().mean(),
            "masked_policy_probability_mean": values.policy_logprobs[masked].exp().mean(),
            "masked_ratio_mean": values.ratio[masked].mean(),
            "masked_entropy_mean": entropies[masked].mean(),
        }
    numbers = cast("list[float]", torch.stack([value.double() for value in named.values()]).tolist())
    return dict(zip(named, numbers, strict=True))


@torch.no_grad()
def candidate_statistics(parts: Sequence[Candidates | None], reduce: Reduce) -> dict[str, float]:
    """How much of both distributions the recorded candidates hold, a mean over all ranks; empty without candidates.

    Example:
        K = 2, mu = [.5, .25], pi = [.4, .25]: topk_behavior_mass = .75, topk_policy_mass = .65.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    for part in parts:
        if part is None:
            return {}
        masses = [x.double().exp().sum().cpu() for x in (part.behavior_logprobs, part.policy_logprobs)]
        totals += torch.stack([*masses, torch.tensor(float(part.valid.shape[0]), dtype=torch.float64)])
    behavior, policy, num_tokens = cast("list[float]", reduce(totals, "sum").tolist())
    if not num_tokens:
        return {}
    return {"topk_behavior_mass": behavior / num_tokens, "topk_policy_mass": policy / num_tokens}


def group_statistics(
    rewards: Sequence[NDArray[np.float64]],
    advantages: Sequence[NDArray[np.float64]],
    num_tokens: NDArray[np.int64],
    num_trained_tokens: NDArray[np.int64],
) -> dict[str, float]:
    """Statistics of a step's groups.

    Args:
        rewards: G arrays, one entry per member.
        advantages: G arrays.
        num_tokens: [N] tokens per trajectory, prompt included.
        num_trained_tokens: [N] tokens in the loss per trajectory.
    """
    all_rewards = np.concatenate(rewards)
    all_advantages = np.concatenate(advantages)
    return {
        "reward_mean": float(all_rewards.mean()),
        "reward_std": float(all_rewards.std()),
        "advantage_mean_abs": float(np.abs(all_advantages).mean()),
        "advantage_max_abs": float(np.abs(all_advantages).max()),
        "no_signal_group_fraction": float(np.mean([not group.any() for group in advantages])),
        "response_length_mean": float(num_trained_tokens.mean()),
        "num_sequences": float(num_tokens.shape[0]),
        "num_tokens": float(num_tokens.sum()),
        "num_trained_tokens": float(num_trained_tokens.sum()),
    }
