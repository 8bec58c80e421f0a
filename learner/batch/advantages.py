"""Rewards of a group become advantages, also where a limit cut members off or came close. Needs no torch.

    rewards ── soft penalty near a limit ──> rewards ── without those that a rule leaves out ──> advantages

Shape legend: G members of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leeway.config.learner import Baseline, OverlongRule
from leeway.types import FinishReason, Trajectory

STD_EPSILON = 1e-6
"""Added to the standard deviation, so that nearly equal rewards do not explode; the value that verl uses."""


def group_advantages(
    rewards: Sequence[float], *, divide_by_std: bool = False, baseline: Baseline = "group-mean"
) -> NDArray[np.float64]:
    """A_i = R_i - baseline_i, optionally divided by std(R) + STD_EPSILON.

    group-mean is mean(R), the member itself included. leave-one-out is the mean of the other members, independent of
    R_i, so A_i = (R_i - mean(R)) G / (G - 1). The standard deviation is the sample's (over G - 1).

    Source: arXiv 2602.04879, section 5 (group mean, no division); RLOO, arXiv 2402.14740 (leave-one-out); GRPO, arXiv
    2402.03300 (division).

    Args:
        rewards: [G], finite.
        divide_by_std: whether to divide.
        baseline: which mean to subtract.

    Returns:
        [G]; exactly zero where all rewards are equal, whatever their mean rounds to, and for a member without others.

    Example:
        [1, 0, 0, 1] gives [.5, -.5, -.5, .5]; with leave-one-out [2/3, -2/3, -2/3, 2/3].
    """
    values = np.asarray(rewards, dtype=np.float64)
    if (values == values[:1]).all():
        return np.zeros_like(values)
    centered = values - values.mean()
    if baseline == "leave-one-out":
        centered = centered * (values.size / (values.size - 1))
    return centered / (values.std(ddof=1) + STD_EPSILON) if divide_by_std else centered


@dataclass(frozen=True, slots=True)
class ShapedGroup:
    """A group's members as the loss sees them."""

    advantages: NDArray[np.float64]  # [G]
    counted: NDArray[np.bool_]  # [G] whether a member counts in the normalisation of the step's loss


def is_overlong(trajectory: Trajectory) -> bool:
    """True where a limit of tokens ended the trajectory, so that its reward says little about its text."""
    return trajectory.finish_reason in (FinishReason.LENGTH, FinishReason.CONTEXT)


def soft_penalty(num_tokens: NDArray[np.int64], limit: int, cache: int) -> NDArray[np.float64]:
    """The penalty that is added to the reward of completions near a limit.

    0 up to limit - cache, then linear down to -1 at limit, and -1 beyond (DAPO, arXiv 2503.14476, equation 13).

    Args:
        num_tokens: [G] of the completions.
        limit: L_max, in tokens.
        cache: L_cache, in tokens, 1 to limit.

    Example:
        limit 20, cache 8: 12 tokens give 0, 16 give -.5, 20 and 25 give -1.
    """
    return -np.clip((num_tokens - (limit - cache)) / cache, 0.0, 1.0)


def shape_group(
    trajectories: Sequence[Trajectory],
    rewards: NDArray[np.float64],
    rule: OverlongRule,
    advantages_of: Callable[[Sequence[float]], NDArray[np.float64]],
) -> ShapedGroup:
    """Advantages of a group under a rule for members that a limit cut off.

    | rule | in the others' baseline | its own advantage | in the loss's normalisation |
    |---|---|---|---|
    | keep | yes | as any | yes |
    | mask | yes | 0 | yes |
    | drop | no | 0 | no |

    Args:
        trajectories: G members.
        rewards: [G].
        rule: what to do with over-long ones.
        advantages_of: from rewards to advantages.

    Example:
        rewards [1, 0, 0], the last over-long: keep [2/3, -1/3, -1/3], mask [2/3, -1/3, 0], drop [1/2, -1/2, 0].
    """
    overlong = np.array([is_overlong(trajectory) for trajectory in trajectories], dtype=np.bool_)
    counted = ~overlong if rule == "drop" else np.ones_like(overlong)
    advantages = np.zeros_like(rewards)
    if counted.any():
        advantages[counted] = advantages_of(rewards[counted].tolist())
    if rule == "mask":
        advantages[overlong] = 0.0
    return ShapedGroup(advantages, counted)
