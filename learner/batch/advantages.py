"""Advantages from the rewards of a group. Needs no torch.

Shape legend: G members of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from leeway.config.learner import Baseline

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
