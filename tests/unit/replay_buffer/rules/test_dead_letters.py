"""Tasks that always fail end as dead letters, and come again when a person says so."""

from __future__ import annotations

import pytest

from leeway.errors import NotFoundError, PreconditionError
from leeway.types import DropReason, GroupState, Ticket, TrajectoryFailure, WriteItem
from replay_buffer.rules import dead_letters
from replay_buffer.rules.dead_letters import MOST_LISTED, decide_requeue, decide_requeue_all, list_dead_letters
from replay_buffer.rules.fold import apply
from replay_buffer.rules.state import KEPT_DEAD_LETTERS, RunState
from replay_buffer.rules.tickets import decide_expired
from replay_buffer.storage.index import Index
from replay_buffer.storage.run_index import RunIndex
from replay_buffer.storage.segments import Location
from tests.harness.replay_builders import Machine, snapshot, spec, version

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
    poison: int | None = None
    cursed: dict[str, Ticket] = {}

    def expired(group_id: str) -> bool:
        return group_id in cursed

    for _ in range(3 * ATTEMPTS):
        tickets = machine.acquire()
        poison = tickets[0].task_index if poison is None else poison
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
    machine.record(decide_requeue_all(machine.state))
    assert decide_requeue(machine.state, [group_id]) is None
    assert decide_requeue_all(machine.state) is None
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


def set_aside(machine: Machine, count: int) -> list[str]:
    """So many groups that failed for good."""
    group_ids: list[str] = []
    for _ in range(count):
        (ticket,) = machine.acquire()
        fail(machine, ticket, retryable=False)
        group_ids.append(ticket.group_id)
    return group_ids


def test_letters_beyond_those_in_memory_are_listed_and_queued_again_too(machine: Machine) -> None:
    group_ids = set_aside(machine, KEPT_DEAD_LETTERS + 3)
    state = machine.state
    assert list(state.dead_letters) == group_ids[3:]
    assert [letter.group_id for letter in list_dead_letters(state)] == group_ids
    assert [letter.group_id for letter in list_dead_letters(state, 2)] == group_ids[-2:]
    assert {letter.message for letter in list_dead_letters(state)[:3]} == {
        f"trajectory {group_id}.0: the engine died of this prompt" for group_id in group_ids[:3]
    }
    machine.record(decide_requeue(state, [group_ids[0]]))
    assert decide_requeue(state, [group_ids[0]]) is None
    assert [letter.group_id for letter in list_dead_letters(state)] == group_ids[1:]
    assert state.status().dead_letters == KEPT_DEAD_LETTERS + 2
    machine.record(decide_requeue_all(state))
    assert list_dead_letters(state) == []
    assert state.status().dead_letters == 0
    assert len(state.requeued) == KEPT_DEAD_LETTERS + 3
    assert snapshot(machine.refolded()) == snapshot(state)


def test_many_letters_are_queued_again_in_several_records(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letters, "_AT_ONCE", 2)
    set_aside(machine, 5)
    sizes: list[int] = []
    while (requeued := decide_requeue_all(machine.state)) is not None:
        sizes.append(len(requeued.group_ids))
        machine.record(requeued)
    assert sizes == [2, 2, 1]
    assert len(list_dead_letters(machine.state)) == machine.state.dead_letter_count == 0


def test_what_can_no_longer_be_queued_is_not_counted_for_ever(machine: Machine) -> None:
    """The records of older letters are retired: their groups are gone from the index."""
    set_aside(machine, KEPT_DEAD_LETTERS + 3)
    retired = RunState(machine.spec, RunIndex(Index(), machine.spec.run))
    retired.dead_letters, retired.dead_letter_count = machine.state.dead_letters, machine.state.dead_letter_count
    assert len(list_dead_letters(retired)) == KEPT_DEAD_LETTERS
    requeued = decide_requeue_all(retired)
    assert requeued is not None
    assert len(requeued.group_ids) == KEPT_DEAD_LETTERS
    apply(retired, requeued, 0, Location(1, 0, 0).handle)
    assert (retired.dead_letter_count, list_dead_letters(retired)) == (0, [])


def test_an_answer_holds_so_many_letters(machine: Machine) -> None:
    assert MOST_LISTED * 500 < 8 << 20
    set_aside(machine, 3)
    machine.state.dead_letter_count = MOST_LISTED + 1
    assert len(list_dead_letters(machine.state, MOST_LISTED + 1)) == 3
