"""Draining: who gets no tickets, what goes with a diverging server, and what it never does."""

from __future__ import annotations

import pytest

from leeway.errors import FencedError, InvalidDataError, PreconditionError
from leeway.types import DrainReason, DropReason, GroupState
from replay_buffer.rules.drain import decide_drain, decide_readmit
from replay_buffer.rules.lifecycle import decide_finish
from tests.harness.replay_builders import Machine, snapshot, spec, whole


def drain(
    machine: Machine, server_id: str, reason: DrainReason = DrainReason.OPERATOR, *, others: set[str] | None = None
) -> None:
    others = {"other"} if others is None else others
    machine.record(decide_drain(machine.state, server_id, reason, "why", epoch=0, others_active=others))


def test_a_diverging_server_takes_along_what_no_step_has_drawn() -> None:
    machine = Machine(spec(groups_per_step=2, members=2, max_staleness=3, train_task_count=100))
    drawn, mixed, passed_on, open_ticket, ready = machine.acquire(max_members=10, server_id="odd")
    machine.fill([drawn])
    machine.write(*whole(mixed.members[0], mixed.attempt))  # the other member is closed by another server
    lapsed = (mixed.group_id, passed_on.group_id)
    again = machine.acquire(server_id="even", max_members=3, expired=lambda group_id: group_id in lapsed)
    machine.fill(again)
    whole_batch = machine.draw()
    machine.fill([ready])
    drain(machine, "odd", DrainReason.DIVERGING)
    assert whole_batch == (drawn.group_id, mixed.group_id)
    groups = machine.state.groups
    assert {groups[group_id].state for group_id in (drawn.group_id, mixed.group_id)} == {GroupState.DRAWN}, (
        "a drawn batch stays as it is"
    )
    assert groups[passed_on.group_id].state is GroupState.READY, "nothing of it was written by the odd server"
    gone = [group for group in groups.values() if group.drop_reason is DropReason.DIVERGED]
    assert [group.group_id for group in gone] == [open_ticket.group_id, ready.group_id]
    assert list(machine.state.requeued) == [group.task_index for group in gone]
    assert not machine.state.lost_attempts, "their tasks are not to blame"
    assert snapshot(machine.refolded()) == snapshot(machine.state)
    assert machine.refolded().drained == machine.state.drained


def test_a_group_that_a_diverging_server_only_began_goes_too() -> None:
    machine = Machine(spec(groups_per_step=2, members=2))
    mixed, *_ = machine.acquire(max_members=2, server_id="odd")
    machine.write(*whole(mixed.members[0], mixed.attempt))
    machine.fill(machine.acquire(server_id="even", max_members=1, expired=lambda _: True))
    assert machine.state.groups[mixed.group_id].state is GroupState.READY
    drain(machine, "odd", DrainReason.DIVERGING)
    assert machine.state.groups[mixed.group_id].drop_reason is DropReason.DIVERGED


@pytest.mark.parametrize("reason", [DrainReason.SLOW, DrainReason.OPERATOR])
def test_what_any_other_server_wrote_stays(reason: DrainReason) -> None:
    machine = Machine()
    machine.fill(machine.acquire(max_members=2, server_id="slow"))
    machine.acquire(max_members=2, server_id="slow")
    before = machine.states()
    drain(machine, "slow", reason)
    assert machine.states() == before == {GroupState.READY: 1, GroupState.OPEN: 1}


def test_the_first_reason_stands_until_the_server_is_readmitted() -> None:
    machine = Machine()
    drain(machine, "s0", DrainReason.SLOW)
    assert decide_drain(machine.state, "s0", DrainReason.DIVERGING, "x", epoch=0, others_active={"o"}) is None
    assert machine.state.drained["s0"].reason is DrainReason.SLOW
    machine.record(decide_readmit(machine.state, "s0"))
    assert not machine.state.drained
    assert decide_readmit(machine.state, "s0") is None
    drain(machine, "s0", DrainReason.DIVERGING)
    assert machine.state.drained["s0"].reason is DrainReason.DIVERGING


def test_the_last_server_at_work_is_only_drained_by_force() -> None:
    machine = Machine()
    with pytest.raises(PreconditionError, match="server 's0' is the only active one and stays in the run"):
        drain(machine, "s0", DrainReason.DIVERGING, others=set())
    assert not machine.state.drained
    machine.record(decide_drain(machine.state, "s0", DrainReason.OPERATOR, "x", epoch=0, others_active=(), force=True))
    assert set(machine.state.drained) == {"s0"}


def test_a_fenced_learner_drains_nobody_and_neither_does_anyone_after_the_end() -> None:
    machine = Machine()
    machine.reopen(machine.state.head)
    with pytest.raises(FencedError):
        decide_drain(machine.state, "s0", DrainReason.DIVERGING, "x", epoch=1, others_active={"o"})
    with pytest.raises(InvalidDataError, match="name the server"):
        drain(machine, "")
    machine.record(decide_finish(machine.state, machine.state.epoch))
    with pytest.raises(PreconditionError, match="has finished"):
        drain(machine, "s0")
    with pytest.raises(PreconditionError, match="has finished"):
        decide_readmit(machine.state, "s0")


def test_a_message_is_cut_and_the_list_is_bounded() -> None:
    machine = Machine()
    machine.record(decide_drain(machine.state, "s0", DrainReason.OPERATOR, "x" * 5000, epoch=0, others_active={"o"}))
    assert len(machine.state.drained["s0"].message) == 1000
    for number in range(999):
        drain(machine, f"gone-{number}")
    with pytest.raises(PreconditionError, match="1000 servers are drained"):
        drain(machine, "one more")
