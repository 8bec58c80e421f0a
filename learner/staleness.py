"""Staleness of trained tokens, as the learner reports it (the replay buffer enforces it).

    staleness(v) = head_step - lineage_step(v)
    lineage_step(v) = min(v.step, step that each later epoch branched off at)

A version of an abandoned branch counts from where the branch left the surviving history.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from learner.checkpoint import Branch
from leeway.types import PolicyVersion, TrajectoryGroup


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
