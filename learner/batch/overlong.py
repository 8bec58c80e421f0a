"""Over-long trajectories: those that a limit cut off, and those that come close to one. Needs no torch.

Shape legend: G members of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leeway.config.learner import OverlongRule
from leeway.types import FinishReason, Trajectory


@dataclass(frozen=True, slots=True)
class ShapedGroup:
    """A group's members as the loss sees them."""

    advantages: NDArray[np.float64]  # [G]
    counted: NDArray[np.bool_]  # [G] whether a member counts in the normalisation of the step's loss


def is_overlong(trajectory: Trajectory) -> bool:
    """Whether a limit of tokens ended it, so that its reward says little about its text."""
    return trajectory.finish_reason in (FinishReason.LENGTH, FinishReason.CONTEXT)


def soft_penalty(num_tokens: NDArray[np.int64], limit: int, cache: int) -> NDArray[np.float64]:
    """What is added to the reward of completions near a limit.

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
