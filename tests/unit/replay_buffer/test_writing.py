from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from leeway import codec
from leeway.types import (
    DropReason,
    GroupState,
    ModelSignature,
    Ticket,
    TrajectoryChunk,
    TrajectoryFailure,
    WriteItem,
    WriteResult,
    WriteStatus,
)
from tests.harness.replay_builders import ROOT, Machine, chunk, close, filled, snapshot, spec, version, whole

ACKNOWLEDGED = WriteStatus.ACKNOWLEDGED


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def ticket(machine: Machine) -> Ticket:
    return machine.acquire(max_members=2)[0]


def statuses(results: list[WriteResult]) -> list[WriteStatus]:
    return [result.status for result in results]


def drop_of(machine: Machine, ticket: Ticket) -> tuple[DropReason | None, str]:
    group = machine.state.groups[ticket.group_id]
    return group.drop_reason, group.drop_message


def test_a_group_is_ready_when_its_last_member_closes(machine: Machine, ticket: Ticket) -> None:
    first, second = filled(ticket)[:2], filled(ticket)[2:]
    assert statuses(machine.write(*first)) == [ACKNOWLEDGED] * 2
    assert machine.states() == {GroupState.OPEN: 1}
    assert statuses(machine.write(*second)) == [ACKNOWLEDGED] * 2
    assert machine.states() == {GroupState.READY: 1}


def test_the_same_items_again_are_acknowledged_and_change_nothing(machine: Machine, ticket: Ticket) -> None:
    items = filled(ticket)
    machine.write(*items)
    before = snapshot(machine.state)
    assert statuses(machine.write(*items)) == [ACKNOWLEDGED] * 4
    assert snapshot(machine.state) == before


@pytest.mark.parametrize("closed", [False, True])
def test_other_bytes_for_a_written_seq_drop_the_group(machine: Machine, ticket: Ticket, closed: bool) -> None:
    items = filled(ticket)
    machine.write(*(items if closed else items[:1]))
    result = machine.write(items[0]._replace(content=chunk(token_id=9)))[0]
    assert result.status is WriteStatus.CONFLICT
    assert drop_of(machine, ticket)[0] is DropReason.CONFLICT
    assert machine.write(items[2])[0].status is (ACKNOWLEDGED if closed else WriteStatus.ABORTED)


def test_a_conflict_leaves_a_drawn_group_as_it_was_drawn(machine: Machine) -> None:
    tickets = machine.acquire(max_members=4)
    machine.fill(tickets)
    machine.draw()
    item = filled(tickets[0])[0]._replace(content=chunk(token_id=9))
    assert machine.write(item)[0].status is WriteStatus.CONFLICT
    assert machine.states() == {GroupState.DRAWN: 2}


def test_a_close_with_another_reward_is_a_conflict(machine: Machine, ticket: Ticket) -> None:
    machine.write(*whole(ticket.members[0], 1, reward=1.0))
    assert statuses(machine.write(*whole(ticket.members[0], 1, reward=0.0))) == [ACKNOWLEDGED, WriteStatus.CONFLICT]


def test_a_gap_is_answered_with_the_next_seq(machine: Machine, ticket: Ticket) -> None:
    item = WriteItem(ticket.members[0].trajectory_id, 1, 0, chunk())
    machine.write(item)
    result = machine.write(item._replace(seq=2))[0]
    assert (result.status, result.expected_seq) == (WriteStatus.OUT_OF_RANGE, 1)


@pytest.mark.parametrize(
    "trajectory_id", ["", "nonsense", "test-run-g1", "test-run-g1.7", "test-run-g9.0", "test-run-g1.-1"]
)
def test_writes_never_create_ids(machine: Machine, ticket: Ticket, trajectory_id: str) -> None:
    result = machine.write(WriteItem(trajectory_id, 1, 0, chunk()))[0]
    assert result.status is WriteStatus.UNKNOWN
    assert repr(trajectory_id) in result.message


def test_an_attempt_that_was_never_issued_is_unknown(machine: Machine, ticket: Ticket) -> None:
    assert machine.write(WriteItem(ticket.members[0].trajectory_id, 2, 0, chunk()))[0].status is WriteStatus.UNKNOWN


def test_a_reissue_fences_the_older_attempt(machine: Machine, ticket: Ticket) -> None:
    machine.write(WriteItem(ticket.members[0].trajectory_id, 1, 0, chunk()))
    again = machine.acquire(max_members=2, server_id="s1", expired=lambda _: True)[0]
    assert (again.group_id, again.attempt, again.members[0].trajectory_id) == (
        ticket.group_id,
        2,
        ticket.members[0].trajectory_id,
    )
    assert statuses(machine.write(*filled(ticket))) == [WriteStatus.ABORTED] * 4
    assert statuses(machine.write(*filled(again))) == [ACKNOWLEDGED] * 4
    assert statuses(machine.write(*filled(ticket))) == [WriteStatus.ABORTED] * 4
    group = machine.state.groups[ticket.group_id]
    assert [member.server_id for member in group.members] == ["s1", "s1"]


def test_a_late_writer_may_go_on_until_the_reissue(machine: Machine, ticket: Ticket) -> None:
    machine.acquire(max_members=1, expired=lambda _: True)  # room for one member: no reissue
    assert statuses(machine.write(*filled(ticket))) == [ACKNOWLEDGED] * 4


def test_a_closed_member_stays_valid_across_attempts(machine: Machine, ticket: Ticket) -> None:
    machine.write(*whole(ticket.members[0], 1))
    again = machine.acquire(max_members=2, expired=lambda _: True)[0]
    assert [member.member for member in again.members] == [1]
    assert again.members[0].seed != ticket.members[1].seed
    assert statuses(machine.write(*whole(ticket.members[0], 1))) == [ACKNOWLEDGED] * 2
    machine.write(*filled(again))
    assert machine.states() == {GroupState.READY: 1}


def test_nothing_follows_a_close(machine: Machine, ticket: Ticket) -> None:
    items = whole(ticket.members[0], 1)
    machine.write(*items)
    assert machine.write(items[0]._replace(seq=2))[0].status is WriteStatus.INVALID


def test_without_room_chunks_wait_and_closes_pass(machine: Machine, ticket: Ticket) -> None:
    first, last = whole(ticket.members[0], 1)
    assert machine.write(first, room=False)[0].status is WriteStatus.EXHAUSTED
    machine.write(first)
    assert machine.write(first, room=False)[0].status is ACKNOWLEDGED
    assert machine.write(last, room=False)[0].status is ACKNOWLEDGED


def test_bytes_that_are_no_chunk_are_refused(machine: Machine, ticket: Ticket) -> None:
    result = machine.write(WriteItem(ticket.members[0].trajectory_id, 1, 0, b"\xff\xff\xff"))[0]
    assert result.status is WriteStatus.INVALID
    assert "TrajectoryChunk" in result.message
    assert machine.states() == {GroupState.OPEN: 1}


# What a close is checked for


def test_a_wrong_digest_or_count_seals_nothing(machine: Machine) -> None:
    for change in ({"digest": hashlib.sha256(b"other").digest()}, {"chunk_count": 2}):
        ticket = machine.acquire(max_members=2)[0]
        first, last = whole(ticket.members[0], 1)
        results = machine.write(first, last._replace(content=replace(close([chunk()]), **change)))
        assert statuses(results) == [ACKNOWLEDGED] * 2
        reason, message = drop_of(machine, ticket)
        assert reason is DropReason.INVALID
        assert ticket.members[0].trajectory_id in message
        assert "sealed" in message


NAN, TOO_LIKELY = float("nan"), 0.5


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (chunk(token_id=64), "outside the vocabulary of 64"),
        (chunk(token_id=-1), "outside the vocabulary of 64"),
        (chunk(logprob=NAN), "not a finite number"),
        (chunk(logprob=float("-inf")), "not a finite number"),
        (chunk(logprob=TOO_LIKELY), "at most 0"),
        (codec.encode_chunk(TrajectoryChunk()), "segments cover 0 tokens of 7"),
        (codec.encode_chunk(replace(codec.decode_chunk(chunk()), columns=())), "token ids are missing"),
        (
            codec.encode_chunk(replace(codec.decode_chunk(chunk()), columns=codec.decode_chunk(chunk()).columns[:1])),
            "mu is never recomputed",
        ),
        (codec.encode_chunk(replace(codec.decode_chunk(chunk()), version_spans=())), "version spans"),
    ],
)
def test_data_that_cannot_be_used_is_set_aside_with_its_cause(
    machine: Machine, ticket: Ticket, data: bytes, cause: str
) -> None:
    results = machine.write(*whole(ticket.members[1], 1, data))
    assert statuses(results) == [ACKNOWLEDGED] * 2
    reason, message = drop_of(machine, ticket)
    assert reason is DropReason.INVALID
    assert message.startswith(f"trajectory {ticket.members[1].trajectory_id}: ")
    assert cause in message
    # The data is kept, and the other members can stop.
    assert machine.state.groups[ticket.group_id].members[1].chunk_count == 1
    assert statuses(machine.write(*whole(ticket.members[0], 1))) == [WriteStatus.ABORTED] * 2


def test_more_tokens_than_the_model_has_context_for_are_refused_before_they_are_assembled(
    machine: Machine, ticket: Ticket
) -> None:
    first, last = whole(ticket.members[0], 1)
    machine.write(first, last._replace(content=close([chunk()], token_count=4_000_000_000)))
    assert drop_of(machine, ticket) == (
        DropReason.INVALID,
        f"trajectory {ticket.members[0].trajectory_id}: 4000000000 tokens exceed the model's context of 4096",
    )


def test_routing_must_come_when_the_run_records_it() -> None:
    run_spec = spec()
    signature: ModelSignature = replace(run_spec.signature, moe_layers=2, experts=4, experts_per_token=1)
    machine = Machine(replace(run_spec, signature=signature, sampling=replace(run_spec.sampling, routing=True)))
    ticket = machine.acquire(max_members=2)[0]
    machine.write(*whole(ticket.members[0], 1))
    assert "the run records routing, but none came" in drop_of(machine, ticket)[1]


def test_a_version_that_was_never_registered_drops_the_group(machine: Machine, ticket: Ticket) -> None:
    foreign = version(3)
    results = machine.write(*whole(ticket.members[0], 1, chunk([ROOT, foreign])))
    assert statuses(results) == [ACKNOWLEDGED, WriteStatus.ABORTED]
    reason, message = drop_of(machine, ticket)
    assert reason is DropReason.UNKNOWN_VERSION
    assert ticket.members[0].trajectory_id in message
    assert str(foreign) in message


def test_another_run_s_version_is_unknown(machine: Machine, ticket: Ticket) -> None:
    machine.write(*whole(ticket.members[0], 1, chunk([replace(ROOT, run="other")])))
    assert drop_of(machine, ticket)[0] is DropReason.UNKNOWN_VERSION


def test_a_group_that_closes_too_old_is_dropped_and_its_task_comes_again() -> None:
    machine = Machine(spec(max_staleness=1))
    *others, late = machine.acquire()
    machine.fill(others)
    machine.draw()
    machine.advance()
    machine.write(*whole(late.members[0], 1, chunk([version(1)])))
    machine.fill(machine.acquire())
    machine.draw()
    machine.advance()
    assert machine.state.groups[late.group_id].state is GroupState.OPEN
    # The other member's tokens turn out to be older than the bound.
    assert statuses(machine.write(*whole(late.members[1], 1, chunk([ROOT])))) == [ACKNOWLEDGED] * 2
    assert drop_of(machine, late)[0] is DropReason.STALE
    assert machine.acquire(max_members=2)[0].task_index == late.task_index


# Groups without a signal


def rewarded(ticket: Ticket, *rewards: float) -> list[WriteItem]:
    pairs = zip(ticket.members, rewards, strict=True)
    return [item for member, reward in pairs for item in whole(member, ticket.attempt, reward=reward)]


@pytest.fixture
def filtering() -> Machine:
    return Machine(spec(members=3, max_staleness=0, drop_no_signal=True))


def test_equal_rewards_drop_a_group_and_free_its_place(filtering: Machine) -> None:
    first, second = filtering.acquire()
    assert filtering.acquire() == []  # admission: two groups per step, nothing in advance
    assert statuses(filtering.write(*rewarded(first, 0.5, 0.5, 0.5))) == [ACKNOWLEDGED] * 6
    assert drop_of(filtering, first) == (DropReason.NO_SIGNAL, "the rewards of its 3 members are all 0.5")
    (refill,) = filtering.acquire()
    assert refill.task_index not in (first.task_index, second.task_index)  # the task is not repeated
    assert not filtering.state.requeued
    filtering.write(*rewarded(second, 1, 0, 0))
    filtering.write(*rewarded(refill, 0, 0, 1))
    assert filtering.draw() == (second.group_id, refill.group_id)
    assert filtering.state.status().dropped == {DropReason.NO_SIGNAL: 1}
    assert snapshot(filtering.refolded()) == snapshot(filtering.state)


def test_one_different_reward_is_a_signal(filtering: Machine) -> None:
    for rewards in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 1e-12)):
        ticket = filtering.acquire(max_members=3)[0]
        filtering.write(*rewarded(ticket, *rewards))
        assert filtering.state.groups[ticket.group_id].state is GroupState.READY
        filtering = Machine(filtering.spec)


def test_without_the_option_equal_rewards_are_ready(machine: Machine, ticket: Ticket) -> None:
    machine.write(*rewarded(ticket, 1, 1))
    assert machine.states() == {GroupState.READY: 1}


def test_the_close_of_a_filtered_group_may_be_repeated(filtering: Machine) -> None:
    ticket = filtering.acquire(max_members=3)[0]
    items = rewarded(ticket, 0, 0, 0)
    filtering.write(*items)
    assert statuses(filtering.write(*items)) == [ACKNOWLEDGED] * 6


# Failures


def test_a_failure_that_would_repeat_drops_the_group(machine: Machine, ticket: Ticket) -> None:
    failure = TrajectoryFailure("the prompt has 9000 tokens", retryable=False)
    assert machine.write(WriteItem(ticket.members[0].trajectory_id, 1, 0, failure))[0].status is ACKNOWLEDGED
    assert drop_of(machine, ticket) == (
        DropReason.FAILED,
        f"trajectory {ticket.members[0].trajectory_id}: the prompt has 9000 tokens",
    )


def test_a_retryable_failure_is_issued_again_once_no_member_is_sampled(machine: Machine, ticket: Ticket) -> None:
    failure = TrajectoryFailure("the verifier timed out", retryable=True)
    item = WriteItem(ticket.members[0].trajectory_id, 1, 0, failure)
    assert machine.write(item, item)[1].status is ACKNOWLEDGED
    assert all(other.group_id != ticket.group_id for other in machine.acquire(max_members=2))
    machine.write(*whole(ticket.members[1], 1))
    again = next(other for other in machine.acquire(max_members=2))
    assert (again.group_id, again.attempt) == (ticket.group_id, 2)
    assert [member.member for member in again.members] == [0]


def test_a_group_that_fails_in_every_attempt_is_a_dead_letter(machine: Machine, ticket: Ticket) -> None:
    failure = TrajectoryFailure("the engine died", retryable=True)
    for attempt in (1, 2, 3):
        assert ticket.attempt == attempt
        for member in ticket.members:
            assert machine.write(WriteItem(member.trajectory_id, attempt, 0, failure))[0].status is ACKNOWLEDGED
        ticket = machine.acquire(max_members=2)[0]
    dropped = next(group for group in machine.state.groups.values() if group.ended)
    assert dropped.drop_reason is DropReason.DEAD_LETTER
    assert dropped.drop_message == "not finished in 3 attempts, the last by server 's0'"
    assert ticket.group_id != dropped.group_id


def test_a_refold_gives_the_same_state(machine: Machine) -> None:
    tickets = machine.acquire()
    machine.fill(tickets[:4])
    machine.write(*whole(tickets[4].members[0], 1, chunk(logprob=NAN)))
    machine.write(WriteItem(tickets[5].members[0].trajectory_id, 1, 0, TrajectoryFailure("gone", retryable=True)))
    machine.draw()
    machine.advance()
    machine.reopen(ROOT)
    assert snapshot(machine.refolded()) == snapshot(machine.state)
