"""Staleness of trained tokens, as the learner reports it (the replay buffer enforces it).

    staleness(v) = head_step - lineage_step(v)
    lineage_step(v) = min(v.step, step that each later epoch branched off at)

A version of an abandoned branch counts from where the branch left the surviving history. The buffer keeps every version
in a tree (`replay_buffer.rules.lineage`); the learner knows only where epochs started, which gives the same steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from leeway.types import PolicyVersion, Trajectory, TrajectoryGroup

Branch = tuple[int, int]
"""(epoch, step of the checkpoint that it started from)"""


def lineage_step(version: PolicyVersion, branches: Sequence[Branch]) -> int:
    """Step of the newest common ancestor of `version` and the newest epoch's history."""
    return min([version.step, *(step for epoch, step in branches if epoch > version.epoch)])


def token_staleness(groups: Sequence[TrajectoryGroup], head_step: int, branches: Sequence[Branch]) -> Counter[int]:
    """Number of tokens in the loss by staleness, in optimizer steps."""
    histogram: Counter[int] = Counter()
    for group in groups:
        for trajectory in group.trajectories:
            for span in trajectory.version_spans:
                in_loss = int(trajectory.loss_mask[span.start_token : span.end_token].sum())
                histogram[head_step - lineage_step(span.version, branches)] += in_loss
    return histogram


def trajectory_staleness(trajectory: Trajectory, head_step: int, branches: Sequence[Branch]) -> NDArray[np.int64]:
    """[n] staleness of each token, 0 where no version sampled it.

    Example:
        head step 5, tokens [3, 5) sampled by step 4 and [5, 7) by step 5: [0, 0, 0, 1, 1, 0, 0].
    """
    staleness = np.zeros(trajectory.num_tokens, dtype=np.int64)
    for span in trajectory.version_spans:
        age = max(head_step - lineage_step(span.version, branches), 0)
        staleness[span.start_token : span.end_token] = age
    return staleness
