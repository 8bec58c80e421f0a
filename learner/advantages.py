"""Advantages from the rewards of a group. Needs no torch.

Shape legend: G members of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

STD_EPSILON = 1e-6
"""Added to the standard deviation, so that nearly equal rewards do not explode; the value that verl uses."""


def group_advantages(rewards: Sequence[float], *, divide_by_std: bool = False) -> NDArray[np.float64]:
    """A_i = R_i - mean(R), the member itself included; optionally divided by std(R) + STD_EPSILON.

    The standard deviation is the sample's (over G - 1).

    Source: arXiv 2602.04879, section 5 (no division); GRPO, arXiv 2402.03300 (division).

    Args:
        rewards: [G], finite.
        divide_by_std: whether to divide.

    Returns:
        [G]; exactly zero where all rewards are equal, whatever their mean rounds to.

    Example:
        [1, 0, 0, 1] gives [.5, -.5, -.5, .5].
    """
    values = np.asarray(rewards, dtype=np.float64)
    if (values == values[:1]).all():
        return np.zeros_like(values)
    centered = values - values.mean()
    return centered / (values.std(ddof=1) + STD_EPSILON) if divide_by_std else centered
