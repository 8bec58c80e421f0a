"""The buffer without a network, on a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from leeway.config import ReplayBufferOptions
from leeway.types import DropReason, GroupState, TrajectoryFailure, WriteItem
from replay_buffer.buffer import ReplayBuffer
from replay_buffer.live import servers
from replay_buffer.run_store import RunStore
from replay_buffer.storage.index_file import Filter
from replay_buffer.storage.log import Log, LogOptions
from tests.harness.replay_builders import DATASET, ROOT, RUN, SIGNATURE, chunk, spec, version

LEASE_SECONDS = 10.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [-1e6]  # behind the event loop's, which may have begun just now: no wait for a moment of it lasts
    monkeypatch.setattr(RunStore, "now", staticmethod(lambda: now[0]))
    return now


@pytest.fixture
async def buffer(tmp_path: Path, clock: list[float]) -> AsyncIterator[ReplayBuffer]:
    log = Log(LogOptions(tmp_path))
    buffer = ReplayBuffer(ReplayBufferOptions(directory=tmp_path, lease_seconds=LEASE_SECONDS), log)
    buffer.start()
    await buffer.open_run(spec(max_staleness=0, groups_per_step=1, max_attempts=2), ROOT, [])
    yield buffer
    buffer.stop()
    await buffer.aclose()
    await log.aclose()


async def tickets_of(buffer: ReplayBuffer, server_id: str) -> list[tuple[str, int]]:
    tickets, *_ = await buffer.acquire_tickets(RUN, server_id, ROOT, 2, 0)
    return [(ticket.group_id, ticket.attempt) for ticket in tickets]


GROUP = f"{RUN}-g1"


async def test_silence_lets_a_group_go(buffer: ReplayBuffer, clock: list[float]) -> None:
    assert await tickets_of(buffer, "s0") == [(GROUP, 1)]
    clock[0] += LEASE_SECONDS - 1
    assert await tickets_of(buffer, "s1") == []
    clock[0] += 1
    assert await tickets_of(buffer, "s1") == [(GROUP, 2)]


async def test_accepted_writes_extend_a_lease(buffer: ReplayBuffer, clock: list[float]) -> None:
    await tickets_of(buffer, "s0")
    clock[0] += LEASE_SECONDS - 1
    buffer.write(RUN, [WriteItem(f"{GROUP}.0", 1, 0, chunk())])
    clock[0] += LEASE_SECONDS - 1
    buffer.write(RUN, [WriteItem(f"{GROUP}.1", 1, 5, chunk())])  # out of order: not accepted
    assert await tickets_of(buffer, "s1") == []
    clock[0] += 1
    assert await tickets_of(buffer, "s1") == [(GROUP, 2)]


async def test_a_renewal_extends_a_lease(buffer: ReplayBuffer, clock: list[float]) -> None:
    await tickets_of(buffer, "s0")
    clock[0] += LEASE_SECONDS - 1
    assert await buffer.renew_leases(RUN, [(GROUP, 1)]) == []
    clock[0] += LEASE_SECONDS - 1
    assert await tickets_of(buffer, "s1") == []
    assert await buffer.renew_leases(RUN, [(GROUP, 2)]) == [(GROUP, 2)]


async def test_the_last_attempt_ends_as_a_dead_letter_although_nobody_asks(
    buffer: ReplayBuffer, clock: list[float]
) -> None:
    await tickets_of(buffer, "s0")
    clock[0] += LEASE_SECONDS
    await tickets_of(buffer, "s1")
    clock[0] += LEASE_SECONDS
    await buffer.join_run(RUN, "s1", SIGNATURE, DATASET, 0)
    (group,) = [view async for view in buffer.export(RUN, Filter(state=GroupState.DROPPED), 0)]
    assert group.drop_reason is DropReason.DEAD_LETTER


async def test_servers_are_bounded_however_many_names_come_and_go(
    buffer: ReplayBuffer, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock[0] = asyncio.get_running_loop().time()
    monkeypatch.setattr(servers, "_MOST_SERVERS", 8)
    (ticket,), *_ = await buffer.acquire_tickets(RUN, "holder", ROOT, 2, 0)
    waiting = asyncio.create_task(buffer.acquire_tickets(RUN, "patient", ROOT, 2, 30))
    await asyncio.sleep(0)
    for number in range(100):
        assert await buffer.acquire_tickets(RUN, f"passing-{number}", ROOT, 1, 0) == ([], False, None)
    assert len(buffer._store.runs[RUN].fleet.servers) == 8
    # One that was forgotten while it waits gets its work all the same.
    buffer.write(RUN, [WriteItem(ticket.members[0].trajectory_id, 1, 0, TrajectoryFailure("died", retryable=False))])
    (other,), *_ = await waiting
    assert other.group_id != ticket.group_id


async def test_what_a_server_requested_is_its_most_and_its_newest(buffer: ReplayBuffer, clock: list[float]) -> None:
    assert await buffer.acquire_tickets(RUN, "small", ROOT, 1, 0) == ([], False, None)
    fleet = buffer._store.runs[RUN].fleet
    entry, is_newer = fleet.requested("small", clock[0], ROOT, 4)
    assert (entry.capacity, is_newer) == (4, False)
    assert fleet.requested("small", clock[0], version(1), 1) == (entry, True)
    assert fleet.requested("small", clock[0], ROOT, 1) == (entry, False)
    assert (entry.capacity, entry.newest, entry.version) == (4, (1, 1), ROOT)
