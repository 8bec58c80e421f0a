from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.lineage import Branch, lineage_step, token_staleness
from leeway.types import PolicyVersion, TrajectoryGroup, VersionSpan
from replay_buffer.rules.lineage import Lineage
from tests.harness.learner_builders import trajectory


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


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=6))
def test_the_replay_buffers_tree_of_versions_says_the_same(epochs: list[tuple[int, int]]) -> None:
    """Each epoch goes back some steps and trains some; the buffer keeps versions, the learner where epochs started."""
    lineage = Lineage(version(0, 0))
    branches: list[Branch] = []
    for epoch, (back, steps) in enumerate(epochs, 1):
        surviving = list(lineage.ancestry(lineage.head))
        lineage.rollback(surviving[min(back, len(surviving) - 1)])
        branches.append((epoch, lineage.head.step))
        for _ in range(steps):
            lineage.register(version(epoch, lineage.head.step + 1), lineage.head)
    for one in lineage:
        assert lineage_step(one, branches) == lineage.lineage_step(one)


def test_staleness_counts_tokens_in_the_loss_only() -> None:
    made = replace(
        trajectory("t", 6, prompt=2),
        loss_mask=np.array([False, False, True, True, True, False]),
        version_spans=(VersionSpan(2, 4, version(1, 7)), VersionSpan(4, 6, version(1, 9))),
    )
    groups = [TrajectoryGroup("g", 0, (made, replace(made, member=1)))]
    assert token_staleness(groups, 9, [(1, 0)]) == {2: 4, 0: 2}
