"""Producers that die, come back, repeat themselves and overtake themselves; and clocks that jump."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leeway import codec
from leeway.config import ReplayBufferOptions
from leeway.types import (
    Column,
    ColumnKind,
    GroupState,
    SamplingParams,
    Segment,
    SegmentKind,
    Ticket,
    TicketMember,
    TrajectoryChunk,
    TrajectoryFailure,
    VersionSpan,
    WriteItem,
    WriteStatus,
)
from replay_buffer.buffer import ReplayBuffer
from replay_buffer.rules.transitions import ChunkWritten
from replay_buffer.storage.log import Log, LogOptions
from tests.harness.replay_builders import ROOT, RUN, Machine, close, filled, snapshot, spec

PROMPT = 3
CHUNK_TOKENS = 2


def pieces(count: int, token_id: int) -> list[bytes]:
    """A trajectory as an engine streams it: the prompt comes with the first tokens, the segment grows."""
    chunks: list[bytes] = []
    for index in range(count):
        start, end = PROMPT + index * CHUNK_TOKENS, PROMPT + (index + 1) * CHUNK_TOKENS
        first = 0 if index == 0 else start
        segments = [Segment(SegmentKind.MODEL, PROMPT, end, True, SamplingParams(max_tokens=16), "fake/1")]
        if index == 0:
            segments.insert(0, Segment(SegmentKind.PROMPT, 0, PROMPT))
        columns = (
            Column(ColumnKind.TOKEN_IDS, first, end, np.full(end - first, token_id, np.int32)),
            Column(ColumnKind.BEHAVIOR_LOGPROBS, start, end, np.full(end - start, -1.0, np.float32)),
        )
        spans = (VersionSpan(start, end, ROOT),)
        chunks.append(codec.encode_chunk(TrajectoryChunk(columns, tuple(segments), spans)))
    return chunks


def streamed(member: TicketMember, attempt: int, count: int = 3, token_id: int = 5) -> list[WriteItem]:
    """The items of one trajectory."""
    chunks = pieces(count, token_id)
    items = [WriteItem(member.trajectory_id, attempt, seq, data) for seq, data in enumerate(chunks)]
    end = close(chunks, token_count=PROMPT + count * CHUNK_TOKENS)
    return [*items, WriteItem(member.trajectory_id, attempt, count, end)]


def stored(machine: Machine, ticket: Ticket) -> list[list[bytes]]:
    """The chunks of each member, as they are drawn and exported."""
    group = machine.state.groups[ticket.group_id]
    chunks: list[list[bytes]] = []
    for member in group.members:
        written = [machine.read(location) for location in list(member.records)[: member.chunk_count]]
        chunks.append([bytes(record.chunk) for record in written if isinstance(record, ChunkWritten)])
    return chunks


@pytest.fixture
def machine() -> Machine:
    return Machine(spec(groups_per_step=1, max_staleness=0))


def lapse(machine: Machine, server_id: str) -> Ticket:
    """The first server falls silent; the next one gets what is missing."""
    (ticket,) = machine.acquire(server_id=server_id, expired=lambda _: True)
    return ticket


def consumed(machine: Machine, ticket: Ticket) -> None:
    machine.write(*filled(ticket))
    machine.draw()
    machine.advance()
    machine.commit()


def dropped(machine: Machine, ticket: Ticket) -> None:
    failure = TrajectoryFailure("the prompt is too long", retryable=False)
    machine.write(WriteItem(ticket.members[0].trajectory_id, ticket.attempt, 0, failure))


def ready(machine: Machine, ticket: Ticket) -> None:
    machine.write(*filled(ticket))


def at_work(machine: Machine, ticket: Ticket) -> None:
    machine.write(streamed(ticket.members[0], ticket.attempt)[0])


@pytest.mark.parametrize("meanwhile", [at_work, ready, consumed, dropped])
def test_a_server_that_wakes_up_changes_nothing(machine: Machine, meanwhile: Callable[[Machine, Ticket], None]) -> None:
    (paused,) = machine.acquire(server_id="s0")
    first, second = paused.members
    before_the_pause = streamed(first, 1, token_id=7)
    machine.write(*before_the_pause[:2])
    meanwhile(machine, lapse(machine, "s1"))
    before = snapshot(machine.state)
    zombie = [
        *before_the_pause,  # what it had written once more, and what was left
        *streamed(second, 1, token_id=7),
        WriteItem(second.trajectory_id, 1, 0, TrajectoryFailure("the server stopped", retryable=False)),
    ]
    results = machine.write(*zombie)
    assert {result.status for result in results} == {WriteStatus.ABORTED}
    assert snapshot(machine.state) == before
    assert not any(
        codec.decode_chunk(data).columns[0].values[0] == 7 for member in stored(machine, paused) for data in member
    )


def test_what_a_dead_server_finished_is_kept_and_what_it_began_starts_over(machine: Machine) -> None:
    (first,) = machine.acquire(server_id="s0")
    machine.write(*streamed(first.members[0], 1, token_id=7))
    machine.write(*streamed(first.members[1], 1, token_id=7)[:2])
    again = lapse(machine, "s1")
    assert [member.member for member in again.members] == [1]
    assert again.attempt == 2
    assert again.members[0].seed != first.members[1].seed
    items = streamed(again.members[0], 2, token_id=9)
    (ahead,) = machine.write(items[2])  # the new server cannot go on where the dead one stopped
    assert (ahead.status, ahead.expected_seq) == (WriteStatus.OUT_OF_RANGE, 0)
    assert {result.status for result in machine.write(*items)} == {WriteStatus.ACKNOWLEDGED}
    assert machine.state.groups[first.group_id].state is GroupState.READY
    assert stored(machine, first) == [pieces(3, 7), pieces(3, 9)]


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_whatever_is_repeated_or_overtakes_the_bytes_are_the_same(data: st.DataObject) -> None:
    machine = Machine(spec(groups_per_step=1, max_staleness=0))
    (ticket,) = machine.acquire()
    items = [item for member in ticket.members for item in streamed(member, 1)]
    wild = data.draw(st.lists(st.sampled_from(items), max_size=40))
    taken: dict[str, int] = {}
    for item in wild:
        (result,) = machine.write(item)
        next_seq = taken.get(item.trajectory_id, 0)
        if item.seq <= next_seq:
            assert result.status is WriteStatus.ACKNOWLEDGED
            taken[item.trajectory_id] = max(next_seq, item.seq + 1)
        else:
            assert (result.status, result.expected_seq) == (WriteStatus.OUT_OF_RANGE, next_seq)
    for item in items:  # a client that goes by the answers gets everything through
        assert machine.write(item)[0].status is WriteStatus.ACKNOWLEDGED
    assert stored(machine, ticket) == [pieces(3, 5)] * 2
    assert machine.state.groups[ticket.group_id].state is GroupState.READY
    assert snapshot(machine.refolded()) == snapshot(machine.state)


YEAR_SECONDS = 365 * 24 * 3600
LEASE_SECONDS = 10.0


async def test_clock_jumps_decide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock runs back and forth by decades; leases end by the monotonic clock, and the log keeps its order."""
    wall = [1.8e9]
    monotonic = [1000.0]
    monkeypatch.setattr(time, "time", lambda: wall[0])
    monkeypatch.setattr(time, "time_ns", lambda: int(wall[0] * 1e9))
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: monotonic[0])

    async def opened() -> tuple[ReplayBuffer, Log]:
        log = Log(LogOptions(tmp_path))
        buffer = ReplayBuffer(ReplayBufferOptions(directory=tmp_path, lease_seconds=LEASE_SECONDS), log)
        buffer.start()
        return buffer, log

    async def stopped(buffer: ReplayBuffer, log: Log) -> None:
        buffer.stop()
        await buffer.aclose()
        await log.aclose()

    async def lent_to(server_id: str) -> list[tuple[str, int]]:
        tickets, *_ = await buffer.acquire_tickets(RUN, server_id, ROOT, 2, 0)
        return [(ticket.group_id, ticket.attempt) for ticket in tickets]

    buffer, log = await opened()
    await buffer.open_run(spec(groups_per_step=1, max_staleness=0), ROOT, [])
    group = f"{RUN}-g1"
    assert await lent_to("s0") == [(group, 1)]
    for jump in (30 * YEAR_SECONDS, -50 * YEAR_SECONDS, 20 * YEAR_SECONDS):
        wall[0] += jump
        assert await lent_to("s1") == []
        assert await buffer.renew_leases(RUN, [(group, 1)]) == []
    monotonic[0] += LEASE_SECONDS
    wall[0] -= 40 * YEAR_SECONDS
    assert await lent_to("s1") == [(group, 2)]
    ticket = buffer._store.runs[RUN].state.groups[group]
    results = buffer.write(RUN, [WriteItem(member.trajectory_id, 2, 0, b"") for member in ticket.members[:1]])
    assert [result.status for result in results] == [WriteStatus.ACKNOWLEDGED]
    before = snapshot(buffer._store.runs[RUN].state)
    await stopped(buffer, log)
    wall[0] += 60 * YEAR_SECONDS
    buffer, log = await opened()
    assert snapshot(buffer._store.runs[RUN].state) == before
    assert await lent_to("s2") == []  # a restart begins every lease anew
    monotonic[0] += LEASE_SECONDS
    assert await lent_to("s2") == [(group, 3)]
    await stopped(buffer, log)
