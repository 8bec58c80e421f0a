from __future__ import annotations

import pytest

from leeway.errors import InvalidDataError, PreconditionError
from leeway.types import DropReason, Evaluation, GroupState, Purpose, TrajectoryFailure, WriteItem
from replay_buffer.rules.admission import Admission, deadline
from replay_buffer.rules.evaluation import decide_evaluation
from replay_buffer.rules.tickets import TaskOrder, decide_expired, member_seed
from tests.harness.replay_builders import ROOT, Machine, chunk, lag, spec, version, whole


def test_no_more_groups_are_issued_than_the_steps_within_the_bound_take() -> None:
    machine = Machine(spec(groups_per_step=4, max_staleness=2))
    assert len(machine.acquire()) == 12
    assert machine.acquire() == []


def test_the_end_of_the_run_limits_what_is_issued() -> None:
    assert len(Machine(spec(groups_per_step=4, max_staleness=2, total_steps=2)).acquire()) == 8


def test_an_older_server_gets_only_what_can_be_drawn_in_time() -> None:
    machine = Machine(spec(groups_per_step=2, max_staleness=1))
    machine.fill(machine.acquire(max_members=4))
    machine.draw()
    machine.advance()
    # At head 1 data of the root has to be drawn by step 2: two groups; two more fit for those who sample from the head.
    assert len(machine.acquire(ROOT)) == 2
    assert len(machine.acquire(version(1))) == 2
    machine.fill(machine.acquire(version(1)))
    assert machine.acquire(ROOT) == []


def test_a_bound_of_zero_wants_the_head_itself() -> None:
    machine = Machine(spec(groups_per_step=2, max_staleness=0))
    machine.step()
    assert machine.acquire(ROOT) == []
    assert len(machine.acquire(version(1))) == 2


def test_a_bound_of_zero_refuses_a_common_ancestor() -> None:
    machine = Machine(spec(groups_per_step=2, max_staleness=0))
    machine.step()
    groups = machine.acquire(version(1))
    machine.reopen(ROOT)
    # Version 1 is abandoned: its lag is 0, and yet it is not the head.
    assert lag(machine.state.lineage, version(1)) == 0
    assert machine.acquire(version(1)) == []
    assert all(machine.state.groups[ticket.group_id].drop_reason is DropReason.STALE for ticket in groups)


def test_an_unregistered_version_gets_an_explanation() -> None:
    with pytest.raises(PreconditionError, match=r"server 's0' requests tickets at .* never registered"):
        Machine().acquire(version(4))


def test_at_least_one_member_must_be_asked_for() -> None:
    with pytest.raises(InvalidDataError, match="request at least 1"):
        Machine().acquire(max_members=0)


def test_groups_are_not_split() -> None:
    machine = Machine(spec(members=4))
    assert machine.acquire(max_members=3) == []
    assert [len(ticket.members) for ticket in machine.acquire(max_members=11)] == [4, 4]


def test_a_restart_in_the_middle_of_a_tour_goes_on_with_its_order() -> None:
    order = TaskOrder(7, 10)
    before = [order.at(cursor) for cursor in range(25)]
    restarted = TaskOrder(7, 10)
    assert [restarted.at(cursor) for cursor in range(15, 25)] == before[15:]
    assert [order.at(cursor) for cursor in range(25)] == before  # also where a request looks back
    assert before[:10] == [1, 7, 5, 2, 6, 0, 4, 3, 9, 8]  # recorded: a log goes on with it under a later NumPy
    assert before[:10] != [TaskOrder(8, 10).at(cursor) for cursor in range(10)]


def test_seeds_differ_between_members_and_attempts() -> None:
    seeds = {member_seed(7, group, member, attempt) for group in "ab" for member in (0, 1) for attempt in (1, 2)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_reissue_takes_no_slot() -> None:
    machine = Machine()
    tickets = machine.acquire()
    assert machine.acquire() == []
    again = machine.acquire(expired=lambda group_id: group_id == tickets[0].group_id)
    assert [ticket.group_id for ticket in again] == [tickets[0].group_id]


def test_a_reissue_comes_before_new_groups() -> None:
    machine = Machine()
    ticket = machine.acquire(max_members=2)[0]
    again = machine.acquire(max_members=4, expired=lambda _: True)
    assert again[0].group_id == ticket.group_id
    assert again[1].group_id != ticket.group_id


def test_a_reissue_needs_a_group_that_can_still_be_drawn() -> None:
    machine = Machine(spec(max_staleness=1, total_steps=50))
    old = machine.acquire(max_members=2)[0]
    machine.write(*whole(old.members[0], 1))
    machine.step()
    assert deadline(machine.state, machine.state.groups[old.group_id]) == 1
    # A server at the root could still be given it at head 1.
    assert machine.acquire(ROOT, 2, expired=lambda _: True)[0].group_id == old.group_id


def test_an_expired_group_with_used_up_attempts_is_a_dead_letter() -> None:
    machine = Machine(spec(max_attempts=2))
    ticket = machine.acquire(max_members=2)[0]
    assert decide_expired(machine.state, lambda _: True) == []
    machine.acquire(max_members=2, expired=lambda _: True)
    assert machine.acquire(max_members=2, expired=lambda _: True)[0].group_id != ticket.group_id
    assert decide_expired(machine.state, lambda _: False) == []
    machine.record(*decide_expired(machine.state, lambda _: True))
    assert machine.state.groups[ticket.group_id].drop_reason is DropReason.DEAD_LETTER


def test_an_expired_group_that_is_too_old_is_lost_and_its_task_comes_again() -> None:
    machine = Machine(spec(max_staleness=1))
    *others, ticket = machine.acquire()
    machine.fill(others)
    machine.draw()
    machine.advance()
    machine.write(WriteItem(ticket.members[0].trajectory_id, 1, 0, chunk([version(1)])))
    machine.fill(machine.acquire())
    machine.draw()
    machine.advance()
    # Its first tokens were young enough; then older ones arrive.
    machine.write(WriteItem(ticket.members[1].trajectory_id, 1, 0, chunk([ROOT])))
    assert decide_expired(machine.state, lambda _: False) == []
    machine.record(*decide_expired(machine.state, lambda _: True))
    assert machine.state.groups[ticket.group_id].drop_reason is DropReason.LEASE_LOST
    assert machine.acquire(max_members=2)[0].task_index == ticket.task_index


def test_dropped_tasks_come_again_ahead_of_the_cursor() -> None:
    machine = Machine(spec(groups_per_step=1, max_staleness=1, members=1))
    first, slow = machine.acquire(max_members=2)
    machine.fill([first])
    machine.draw()
    machine.advance()
    machine.fill(machine.acquire(max_members=1))
    machine.draw()
    machine.advance()
    assert machine.state.groups[slow.group_id].drop_reason is DropReason.STALE
    cursor = machine.state.task_cursor
    again = machine.acquire(max_members=1)[0]
    assert (again.task_index, machine.state.task_cursor) == (slow.task_index, cursor)
    assert list(machine.state.requeued) == []


def test_failed_tasks_do_not_come_again() -> None:
    machine = Machine(spec(train_task_count=1000))
    ticket = machine.acquire(max_members=2)[0]
    failure = TrajectoryFailure("too long", retryable=False)
    machine.write(WriteItem(ticket.members[0].trajectory_id, 1, 0, failure))
    assert ticket.task_index not in {other.task_index for other in machine.acquire()}


def test_after_a_rollback_nothing_is_issued_until_the_bound_holds() -> None:
    machine = Machine(spec(groups_per_step=2, max_staleness=1))
    for _ in range(3):
        machine.step()
    machine.fill(machine.acquire())
    assert machine.states()[GroupState.DRAWN] == 6
    machine.reopen(version(1), [(1, machine.state.batch(1))])
    # Everything drawn after step 1 is back beside what was ready: more than the bound allows.
    occupying = len(list(machine.state.occupying()))
    assert occupying > 4
    assert machine.acquire() == []
    while occupying > 4:
        assert machine.acquire() == []
        assert machine.draw() is not None
        machine.advance()
        occupying = len(list(machine.state.occupying()))
    assert len(machine.acquire()) == 4 - occupying


def test_the_inequality_counts_what_is_due_early() -> None:
    machine = Machine(spec(groups_per_step=2, max_staleness=2))
    machine.step()
    machine.fill(machine.acquire(ROOT, 4), [ROOT])
    state = machine.state
    assert [deadline(state, group) for group in state.occupying()] == [2, 2, 2, 2]
    admission = Admission(state)
    # Two steps are left for what is due at 2; the third takes two more due at 3.
    assert [admission.admits(due) for due in (2, 3, 3, 3)] == [False, True, True, False]
    assert not Admission(state).admits(0)


def test_a_server_that_is_too_small_for_an_evaluation_waits_or_is_passed_over() -> None:
    machine = Machine(spec(members=1))
    evaluation = Evaluation("wide", ROOT, task_count=1, members=4, sampling=machine.spec.sampling)
    machine.record(decide_evaluation(machine.state, 1, evaluation))
    # A server that is busy at the moment keeps its room for the evaluation ...
    assert machine.acquire(max_members=3, capacity=4) == []
    # ... one that never has enough goes on with training.
    assert {ticket.purpose for ticket in machine.acquire(max_members=3, capacity=3)} == {Purpose.TRAIN}
    assert machine.acquire(max_members=4, capacity=4)[0].purpose is Purpose.EVAL
