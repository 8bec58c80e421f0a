"""Tasks that always fail end as dead letters, and come again when a person says so."""

from __future__ import annotations

import pytest

from leeway.errors import NotFoundError, PreconditionError
from leeway.types import DropReason, GroupState, Ticket, TrajectoryFailure, WriteItem
from replay_buffer.rules.dead_letters import decide_requeue
from replay_buffer.rules.tickets import decide_expired
from tests.unit.replay_buffer.builders import Machine, snapshot, spec, version

ATTEMPTS = 3


@pytest.fixture
def machine() -> Machine:
    return Machine(spec(groups_per_step=1, max_staleness=0, max_attempts=ATTEMPTS, train_task_count=1))


def fail(machine: Machine, ticket: Ticket, *, retryable: bool = True) -> None:
    for member in ticket.members:
        failure = TrajectoryFailure("the engine died of this prompt", retryable)
        machine.write(WriteItem(member.trajectory_id, ticket.attempt, 0, failure))


def exhaust(machine: Machine) -> str:
    """Fail the next task in each of its attempts; returns the group."""
    tickets: list[Ticket] = []
    for _ in range(ATTEMPTS):
        tickets += machine.acquire()
        fail(machine, tickets[-1])
    assert [ticket.attempt for ticket in tickets] == list(range(1, ATTEMPTS + 1))
    return tickets[0].group_id


def test_a_prompt_that_always_fails_is_a_dead_letter_after_n_tries(machine: Machine) -> None:
    group_id = exhaust(machine)
    letter = machine.state.dead_letters[group_id]
    assert (letter.reason, letter.attempts, letter.server_id) == (DropReason.DEAD_LETTER, ATTEMPTS, "s0")
    assert machine.state.status().dead_letters == 1
    assert machine.state.status().dropped[DropReason.DEAD_LETTER] == 1
    (other,) = machine.acquire()
    assert other.group_id != group_id


def test_a_prompt_that_kills_its_servers_is_a_dead_letter_although_its_groups_go_stale_first() -> None:
    """No group uses up its attempts before it is too old; the tries of its task add up."""
    machine = Machine(spec(groups_per_step=1, max_staleness=1, max_attempts=ATTEMPTS))
    poison = 0
    cursed: dict[str, Ticket] = {}

    def expired(group_id: str) -> bool:
        return group_id in cursed

    for _ in range(3 * ATTEMPTS):
        tickets = machine.acquire()
        poison = poison or tickets[0].task_index
        cursed.update({ticket.group_id: ticket for ticket in tickets if ticket.task_index == poison})
        machine.fill([ticket for ticket in tickets if ticket.task_index != poison])
        machine.draw(expired)
        machine.advance(expired)
        machine.record(*decide_expired(machine.state, expired))
    assert {ticket.attempt for ticket in cursed.values()} == {1}
    (letter,) = machine.state.dead_letters.values()
    assert (letter.task_index, letter.attempts) == (poison, ATTEMPTS)
    assert machine.state.dropped == {DropReason.LEASE_LOST: ATTEMPTS - 1, DropReason.DEAD_LETTER: 1}


def test_a_whole_group_clears_its_task(machine: Machine) -> None:
    (ticket,) = machine.acquire()
    fail(machine, ticket)
    (ticket,) = machine.acquire()
    machine.fill([ticket])
    assert machine.state.lost_attempts == {}


@pytest.mark.parametrize("retryable", [True, False])
def test_a_requeued_task_comes_as_a_new_group_with_all_its_tries(machine: Machine, retryable: bool) -> None:
    if retryable:
        group_id = exhaust(machine)
    else:
        (ticket,) = machine.acquire()
        fail(machine, ticket, retryable=False)
        group_id = ticket.group_id
        assert machine.state.groups[group_id].drop_reason is DropReason.FAILED
    cursor = machine.state.task_cursor
    machine.record(decide_requeue(machine.state, [group_id]))
    assert machine.state.dead_letters == {}
    again = exhaust(machine)
    assert again != group_id
    assert machine.state.groups[again].task_index == machine.state.groups[group_id].task_index
    assert machine.state.task_cursor == cursor
    assert machine.state.groups[group_id].state is GroupState.DROPPED
    assert snapshot(machine.refolded()) == snapshot(machine.state)


def test_a_letter_is_requeued_once(machine: Machine) -> None:
    group_id = exhaust(machine)
    machine.record(decide_requeue(machine.state, []))
    assert decide_requeue(machine.state, [group_id]) is None
    assert decide_requeue(machine.state, []) is None
    assert list(machine.state.requeued) == [0]


def test_only_dead_letters_are_requeued(machine: Machine) -> None:
    (ticket,) = machine.acquire()
    with pytest.raises(PreconditionError, match=r"is no dead letter: it is open"):
        decide_requeue(machine.state, [ticket.group_id])
    with pytest.raises(NotFoundError, match="has no group 'g7'"):
        decide_requeue(machine.state, ["g7"])
    machine.fill([ticket])
    machine.draw()
    machine.advance()
    with pytest.raises(PreconditionError, match=r"is no dead letter: it is drawn"):
        decide_requeue(machine.state, [ticket.group_id])
    assert machine.state.head == version(1)
