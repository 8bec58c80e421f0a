from __future__ import annotations

from leeway.types import PolicyVersion
from replay_buffer.rules.lineage import Lineage
from tests.harness.replay_builders import ROOT, lag, version


def grown(lineage: Lineage, epoch: int, steps: range) -> list[PolicyVersion]:
    versions = [version(step, epoch) for step in steps]
    for new in versions:
        lineage.register(new, lineage.head)
    return versions


def test_along_one_branch_lag_is_the_difference_of_steps() -> None:
    lineage = Lineage(ROOT)
    versions = [ROOT, *grown(lineage, 1, range(1, 5))]
    assert [lag(lineage, known) for known in versions] == [4, 3, 2, 1, 0]


def test_an_abandoned_branch_is_as_far_away_as_its_fork() -> None:
    lineage = Lineage(ROOT)
    one, two, three, four = grown(lineage, 1, range(1, 5))
    lineage.rollback(two)
    assert [lag(lineage, known) for known in (one, two, three, four)] == [1, 0, 0, 0]
    new = grown(lineage, 2, range(3, 6))
    # The head is step 5; 4 of epoch 1 left the surviving history at 2.
    assert [lag(lineage, known) for known in (one, two, three, four)] == [4, 3, 3, 3]
    assert [lag(lineage, known) for known in new] == [2, 1, 0]
    assert [lineage.survives(known) for known in (ROOT, two, three, four, *new)] == [1, 1, 0, 0, 1, 1, 1]


def test_a_fork_of_a_fork() -> None:
    lineage = Lineage(ROOT)
    first = grown(lineage, 1, range(1, 4))
    lineage.rollback(first[1])
    second = grown(lineage, 2, range(3, 5))
    lineage.rollback(first[0])
    third = grown(lineage, 3, range(2, 4))
    assert [lineage.lineage_step(known) for known in [*first, *second, *third]] == [1, 1, 1, 1, 1, 2, 3]
    assert lineage.parent(third[0]) == first[0]


def test_what_was_never_registered_is_not_in_the_tree() -> None:
    lineage = Lineage(ROOT)
    assert ROOT in lineage
    assert version(1) not in lineage
    assert not lineage.survives(version(1))


def test_what_is_older_than_a_surviving_version_is_let_go_and_known_to_be_past() -> None:
    lineage = Lineage(ROOT)
    first = grown(lineage, 1, range(1, 6))
    lineage.rollback(first[1])
    second = grown(lineage, 2, range(3, 8))
    lineage.rollback(second[2])
    third = grown(lineage, 3, range(6, 9))
    lags = {known: lag(lineage, known) for known in lineage}
    lineage.forget_before(4)
    assert list(lineage) == [*second[1:], *third]
    assert {known: lag(lineage, known) for known in lineage} == {known: lags[known] for known in lineage}
    assert (lineage.root, lineage.parent(second[1])) == (second[1], None)
    assert not any(lineage.is_unknown(known) for known in [ROOT, *first, *second, *third])
    assert lineage.is_unknown(version(9, epoch=3))
    assert lineage.is_unknown(version(4, epoch=2, run="another"))
    assert [lineage.is_abandoned(known) for known in (*first, *second)] == [False] * 5 + [False] * 3 + [True] * 2
    lineage.forget_before(2)  # it has been
    assert lineage.root == second[1]
    lineage.rollback(second[1])
    assert [lag(lineage, known) for known in (*second[1:], *third)] == [0] * 7


def test_an_explicit_rollback_is_forgotten_with_what_it_left() -> None:
    lineage = Lineage(ROOT)
    first = grown(lineage, 1, range(1, 4))
    lineage.discard_after(first[0])
    second = grown(lineage, 2, range(2, 5))
    lineage.forget_before(1)
    assert [lineage.is_discarded(known) for known in first] == [False, True, True]
    lineage.forget_before(2)
    assert list(lineage) == second
    assert not lineage._discarded
