"""An explicit rollback: what it discards, whom it fences, where the run goes on."""

from __future__ import annotations

import pytest

from leeway.errors import FencedError, PreconditionError
from leeway.types import DropReason, Evaluation, GroupState, PolicyVersion, SamplingParams, WriteStatus
from replay_buffer.rules.evaluation import decide_evaluation
from replay_buffer.rules.lifecycle import check_epoch, decide_advance, decide_finish
from replay_buffer.rules.opening import decide_rollback
from tests.harness.replay_builders import ROOT, Machine, chunk, filled, snapshot, spec, version, whole


def roll_back(machine: Machine, to: PolicyVersion) -> None:
    machine.record(decide_rollback(machine.state, to))


def trained(
    steps: int, committed: int = 0, max_staleness: int = 2, total_steps: int = 100
) -> tuple[Machine, list[tuple[str, ...]]]:
    """A run of some steps, with the groups of each."""
    machine = Machine(spec(max_staleness=max_staleness, total_steps=total_steps))
    batches = [machine.step() for _ in range(steps)]
    if committed:
        machine.commit(committed)
    return machine, batches


def test_later_steps_are_discarded_and_earlier_ones_stand() -> None:
    machine, batches = trained(4, committed=3, max_staleness=0)
    roll_back(machine, version(2))
    groups = machine.state.groups
    assert {groups[group_id].state for step in batches[:2] for group_id in step} == {GroupState.CONSUMED}
    for group_id in [*batches[2], *batches[3]]:
        assert groups[group_id].drop_reason is DropReason.ROLLED_BACK
        assert groups[group_id].step == 0
    status = machine.state.status()
    assert (status.head, status.committed_step, status.consumed) == (version(2), 2, 4)
    assert status.dropped[DropReason.ROLLED_BACK] == 4
    assert status.issued == status.open + status.ready + status.drawn + status.consumed + sum(status.dropped.values())
    assert snapshot(machine.refolded()) == snapshot(machine.state)


def test_discarded_tasks_come_again() -> None:
    machine, batches = trained(3, committed=3)
    tasks = [machine.state.groups[group_id].task_index for step in batches[1:] for group_id in step]
    roll_back(machine, version(1))
    machine.reopen(version(1))
    again = [ticket.task_index for ticket in machine.acquire()]
    assert again[: len(tasks)] == tasks


def test_a_running_learner_is_fenced_and_nobody_holds_the_raised_epoch() -> None:
    machine, _ = trained(3)
    roll_back(machine, version(1))
    with pytest.raises(FencedError, match="epoch 1 is fenced by epoch 2; the run was rolled back"):
        decide_advance(machine.state, 1, version(4), version(3))
    assert machine.reopen(version(1), [(1, machine.state.batch(1))]) == 3
    with pytest.raises(FencedError):
        check_epoch(machine.state, 2)


@pytest.mark.parametrize("other", [ROOT, version(2), version(3)])
def test_the_next_learner_opens_where_the_run_was_rolled_back_to(other: PolicyVersion) -> None:
    machine, batches = trained(3)
    roll_back(machine, version(1))
    with pytest.raises(PreconditionError, match=r"was rolled back to test-run/1\.1@"):
        machine.reopen(other)
    machine.reopen(version(1), [(1, batches[0])])
    assert machine.state.head == version(1)
    machine.step()  # and the one after it may open at what it trains
    machine.reopen(version(2, epoch=3), [(2, machine.state.batch(2))])


def test_it_goes_behind_what_was_committed_and_trains_on() -> None:
    machine, batches = trained(3, committed=3, total_steps=4)
    roll_back(machine, version(1))
    machine.reopen(version(1))
    again = [machine.step() for _ in range(3)]
    machine.commit()
    machine.record(decide_finish(machine.state, machine.state.epoch))
    consumed = {group.group_id for group in machine.state.groups.values() if group.state is GroupState.CONSUMED}
    assert consumed == {*batches[0], *(group_id for step in again for group_id in step)}
    assert not consumed & {*batches[1], *batches[2]}


def test_what_later_versions_sampled_is_discarded_and_the_rest_stays() -> None:
    machine = Machine(spec(max_staleness=3))
    first, second, mixed, old, half_new, half_old, *empty = machine.acquire()
    machine.fill([first, second])
    machine.draw()
    new = machine.advance()
    machine.fill([mixed], [ROOT, new])
    machine.fill([old], [ROOT])
    machine.write(*whole(half_new.members[0], half_new.attempt, chunk([new])))
    machine.write(*whole(half_old.members[0], half_old.attempt, chunk([ROOT])))
    idle = machine.acquire(new)
    assert idle
    roll_back(machine, ROOT)
    dropped = {group.group_id for group in machine.state.groups.values() if group.state is GroupState.DROPPED}
    assert dropped == {ticket.group_id for ticket in [first, second, mixed, half_new, *idle]}
    assert machine.state.groups[old.group_id].state is GroupState.READY
    assert {machine.state.groups[ticket.group_id].state for ticket in [half_old, *empty]} == {GroupState.OPEN}


def test_a_drawn_batch_returns() -> None:
    machine, _ = trained(2)
    machine.fill(machine.acquire(), [version(1)])
    drawn = machine.draw()
    assert drawn is not None
    roll_back(machine, version(1))
    assert {machine.state.groups[group_id].state for group_id in drawn} == {GroupState.READY}


def test_servers_at_a_discarded_version_get_no_work_and_their_tokens_are_refused() -> None:
    machine = Machine(spec(max_staleness=3))
    first, second, open_ticket, *_ = machine.acquire()
    machine.fill([first, second])
    machine.draw()
    new = machine.advance()
    roll_back(machine, ROOT)
    machine.reopen(ROOT)
    assert machine.acquire(new) == []
    results = machine.write(*filled(open_ticket, [ROOT, new]))
    assert results[0].status is WriteStatus.ACKNOWLEDGED
    assert machine.state.groups[open_ticket.group_id].drop_reason is DropReason.ROLLED_BACK
    assert new in machine.state.lineage  # it stays registered: no other version may take its name
    assert machine.acquire(ROOT)


def test_the_way_to_an_abandoned_branch_is_closed() -> None:
    machine, _ = trained(3)
    roll_back(machine, version(1))
    machine.reopen(version(1), [(1, machine.state.batch(1))])
    for gone in (version(2), version(3), version(7)):
        with pytest.raises(PreconditionError, match="does not descend from"):
            roll_back(machine, gone)


def test_once_more_is_the_same_until_the_run_is_opened_again() -> None:
    machine, _ = trained(3)
    roll_back(machine, version(2))
    records = len(machine.records)
    roll_back(machine, version(2))
    assert len(machine.records) == records
    machine.reopen(version(2), [(step, machine.state.batch(step)) for step in (1, 2)])
    roll_back(machine, version(2))
    assert machine.state.must_open_at == version(2)


def test_a_rollback_may_follow_a_rollback() -> None:
    machine, _ = trained(3, committed=2)
    roll_back(machine, version(2))
    roll_back(machine, version(1))
    assert machine.state.must_open_at == version(1)
    assert machine.state.status().consumed == 2
    machine.reopen(version(1))


def test_a_rollback_to_the_head_only_fences() -> None:
    machine, _ = trained(2)
    before = machine.states()
    roll_back(machine, version(2))
    assert machine.states() == before
    with pytest.raises(FencedError):
        check_epoch(machine.state, 1)


def test_a_finished_run_stays_finished() -> None:
    machine, _ = trained(2, committed=2)
    machine.record(decide_finish(machine.state, 1))
    with pytest.raises(PreconditionError, match="has finished"):
        roll_back(machine, version(1))


def test_evaluations_of_discarded_versions_end_and_their_ids_are_free_again() -> None:
    machine, _ = trained(2)
    wanted = Evaluation("1.2", version(2), 2, 1, SamplingParams(max_tokens=16))
    machine.record(decide_evaluation(machine.state, 1, wanted))
    (first, _) = machine.acquire(max_members=2)
    assert first.evaluation_id == "1.2"
    roll_back(machine, version(1))
    assert machine.state.groups[first.group_id].drop_reason is DropReason.ROLLED_BACK
    assert machine.state.evaluation_result("1.2").complete
    machine.reopen(version(1), [(1, machine.state.batch(1))])
    machine.step()
    again = Evaluation("1.2", machine.state.head, 2, 1, SamplingParams(max_tokens=16))
    assert decide_evaluation(machine.state, machine.state.epoch, again) is not None
