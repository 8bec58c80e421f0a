"""The learning rate of each optimizer step. Needs no torch."""

from __future__ import annotations

import math

from leeway.config.learner import Schedule


def scheduled_learning_rate(
    schedule: Schedule, learning_rate: float, floor: float, warmup_steps: int, decay_steps: int, step: int
) -> float:
    """The learning rate of the step-th optimizer step, counted from 1.

        warm-up     step <= W: learning_rate * step / W
        progress    p = min((step - W) / (D - W), 1)
        constant    learning_rate
        linear      floor + (learning_rate - floor) * (1 - p)
        cosine      floor + (learning_rate - floor) * (1 + cos(pi p)) / 2        (SGDR, arXiv 1608.03983, one period)

    Args:
        schedule: its name.
        learning_rate: the highest, reached at the end of the warm-up.
        floor: the lowest, from step D on; unused by constant.
        warmup_steps: W; 0 for none.
        decay_steps: D > W; unused by constant.
        step: from 1.

    Example:
        cosine, learning rate 1, floor .1, W = 10, D = 110: .5 at step 5, 1 at 10, .55 at 60, .1 from 110 on.
    """
    if step <= warmup_steps:
        return learning_rate * step / warmup_steps
    if schedule == "constant":
        return learning_rate
    progress = min((step - warmup_steps) / (decay_steps - warmup_steps), 1.0)
    share = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return floor + (learning_rate - floor) * share
