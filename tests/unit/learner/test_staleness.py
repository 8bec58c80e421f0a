from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from learner.lineage import lineage_step, token_staleness
from leeway.types import FinishReason, PolicyVersion, Segment, SegmentKind, Trajectory, TrajectoryGroup, VersionSpan

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def version(epoch: int, step: int) -> PolicyVersion:
    return PolicyVersion("demo", epoch, step, bytes(32))


@pytest.mark.parametrize(
    ("epoch", "step", "expected"),
    [
        (1, 40, 40),  # before epoch 2 branched off at 50
        (1, 57, 50),  # abandoned: counts from the branch
        (2, 55, 55),
        (2, 63, 60),  # abandoned by epoch 3
        (3, 61, 61),
        (0, 0, 0),
    ],
)
def test_an_abandoned_branch_counts_from_where_it_left(epoch: int, step: int, expected: int) -> None:
    assert lineage_step(version(epoch, step), [(1, 0), (2, 50), (3, 60)]) == expected


def test_staleness_counts_tokens_in_the_loss_only() -> None:
    n = 6
    trajectory = Trajectory(
        trajectory_id="t",
        member=0,
        attempt=1,
        server_id="s",
        token_ids=np.zeros(n, np.int32),
        behavior_logprobs=np.zeros(n, np.float32),
        loss_mask=np.array([False, False, True, True, True, False]),
        version_spans=(VersionSpan(2, 4, version(1, 7)), VersionSpan(4, 6, version(1, 9))),
        segments=(Segment(SegmentKind.PROMPT, 0, 2), Segment(SegmentKind.MODEL, 2, n, in_loss=True)),
        reward=1.0,
        finish_reason=FinishReason.STOP,
        generation_started_at=NOW,
        generation_finished_at=NOW,
    )
    groups = [TrajectoryGroup("g", 0, (trajectory, replace(trajectory, member=1)))]
    assert token_staleness(groups, 9, [(1, 0)]) == {2: 4, 0: 2}
