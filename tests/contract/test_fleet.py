"""Servers that come, go, are drained and readmitted, over real gRPC and across restarts of the buffer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from leeway.errors import FencedError, InvalidDataError, PreconditionError
from leeway.replay_client import ReplayClient
from leeway.types import DrainReason, DropReason, ServerStatus, WriteStatus
from tests.deadlines import WAIT_SECONDS
from tests.harness.buffer_server import connected, serving, write
from tests.harness.replay_builders import DATASET, ROOT, SIGNATURE, filled, spec, whole


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[ReplayClient]:
    async with serving(tmp_path) as address, connected(address) as client:
        await client.open_run(spec(groups_per_step=2, train_task_count=100), ROOT, [])
        for server_id in ("s0", "s1"):
            await client.join_run(server_id, SIGNATURE, DATASET, WAIT_SECONDS)
        yield client


async def server(client: ReplayClient, server_id: str) -> ServerStatus:
    return next(status for status in await client.servers() if status.server_id == server_id)


async def test_a_server_that_leaves_gives_its_tickets_back_at_once(client: ReplayClient) -> None:
    held, *_ = await client.acquire_tickets("s0", ROOT, 100, WAIT_SECONDS)
    waiting = asyncio.create_task(client.acquire_tickets("s1", ROOT, 100, WAIT_SECONDS))
    await client.leave_run("s0")
    again, *_ = await waiting  # the lease is 30 s
    assert [(ticket.group_id, ticket.attempt) for ticket in again] == [(ticket.group_id, 2) for ticket in held]
    assert not (await server(client, "s0")).present
    assert {result.status for result in await write(client, filled(held[0]))} == {WriteStatus.ABORTED}
    await client.leave_run("s0")
    await client.leave_run("never seen")
    await client.join_run("s0", SIGNATURE, DATASET, WAIT_SECONDS)
    assert (await server(client, "s0")).present


async def test_a_drained_server_is_told_at_once_and_gets_nothing_until_it_is_readmitted(client: ReplayClient) -> None:
    await client.acquire_tickets("s1", ROOT, 100, WAIT_SECONDS)  # nothing is left
    waiting = asyncio.create_task(client.acquire_tickets("s0", ROOT, 2, 600))
    while not (await server(client, "s0")).version:
        await asyncio.wait({waiting}, timeout=0.01)
    drain, dropped = await client.drain_server("s0", DrainReason.OPERATOR, "maintenance")
    async with asyncio.timeout(WAIT_SECONDS):
        told = await waiting
    assert told.drained == drain
    assert (told.tickets, told.finished, dropped) == ([], False, 0)
    assert (drain.reason, drain.message) == (DrainReason.OPERATOR, "maintenance")
    await client.leave_run("s1")  # now there is work, but not for it
    assert (await client.acquire_tickets("s0", ROOT, 2, 0.05)).tickets == []
    assert (await server(client, "s0")).drained == drain
    again, _ = await client.drain_server("s0", DrainReason.DIVERGING, "another reason")
    assert again == drain
    waiting = asyncio.create_task(client.acquire_tickets("s0", ROOT, 2, 600))
    assert await client.readmit_server("s0")
    async with asyncio.timeout(WAIT_SECONDS):
        acquired = await waiting
    assert acquired.drained is None
    assert len(acquired.tickets) == 1
    assert not await client.readmit_server("s0")


async def test_a_diverging_server_loses_what_it_holds_and_what_it_wrote(client: ReplayClient) -> None:
    (ready, held, *_), *_ = await client.acquire_tickets("s0", ROOT, 100, WAIT_SECONDS)
    await write(client, filled(ready))
    await write(client, whole(held.members[0], held.attempt)[:1])
    _, dropped = await client.drain_server("s0", DrainReason.DIVERGING, "2.1 nats from the others")
    status = await client.run_status()
    assert dropped == status.dropped[DropReason.DIVERGED] == status.issued
    results = await write(client, whole(held.members[1], held.attempt))
    assert {result.status for result in results} == {WriteStatus.ABORTED}
    assert "server 's0' was drained: 2.1 nats from the others" in results[0].message
    tickets, *_ = await client.acquire_tickets("s1", ROOT, 100, WAIT_SECONDS)
    assert [ticket.task_index for ticket in tickets][:2] == [ready.task_index, held.task_index]


async def test_a_slow_server_loses_what_it_holds_and_keeps_what_it_wrote(client: ReplayClient) -> None:
    (ready, held, *_), *_ = await client.acquire_tickets("s0", ROOT, 100, WAIT_SECONDS)
    await write(client, filled(ready))
    _, dropped = await client.drain_server("s0", DrainReason.SLOW, "slow")
    assert dropped == 0
    tickets, *_ = await client.acquire_tickets("s1", ROOT, 100, WAIT_SECONDS)
    assert (held.group_id, 2) in [(ticket.group_id, ticket.attempt) for ticket in tickets]
    assert (await client.run_status()).ready == 1


async def test_a_person_lets_a_server_finish_what_it_holds(client: ReplayClient) -> None:
    (held, *_), *_ = await client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS)
    await client.drain_server("s0", DrainReason.OPERATOR, "maintenance")
    assert (await server(client, "s0")).tickets == 1
    assert {result.status for result in await write(client, filled(held))} == {WriteStatus.ACKNOWLEDGED}
    assert (await client.run_status()).ready == 1
    assert (await server(client, "s0")).tickets == 0


async def test_the_last_server_is_never_drained_in_silence(client: ReplayClient) -> None:
    await client.leave_run("s1")
    with pytest.raises(PreconditionError, match="'s0' is the only active one and stays in the run \\(too slow\\)"):
        await client.drain_server("s0", DrainReason.SLOW, "too slow")
    await client.drain_server("s0", DrainReason.OPERATOR, "I know", force=True)
    await client.join_run("s1", SIGNATURE, DATASET, WAIT_SECONDS)
    with pytest.raises(PreconditionError, match="'s1' is the only active one"):
        await client.drain_server("s1", DrainReason.DIVERGING, "odd")  # a drained one does not count


async def test_a_drain_outlives_the_buffer_and_the_server(tmp_path: Path) -> None:
    for snapshots in (False, True):  # after a crash: from the log alone; then from a snapshot
        directory = tmp_path / f"{snapshots}"
        async with serving(directory) as address, connected(address) as client:
            await client.open_run(spec(), ROOT, [])
            await client.join_run("s1", SIGNATURE, DATASET, WAIT_SECONDS)
            drain, _ = await client.drain_server("s0", DrainReason.DIVERGING, "odd")
        if not snapshots:
            for path in directory.glob("snapshot-*"):
                path.unlink()
        async with serving(directory) as address, connected(address) as client:
            assert [(status.server_id, status.present, status.drained) for status in await client.servers()] == [
                ("s0", False, drain)
            ]
            await client.join_run("s0", SIGNATURE, DATASET, WAIT_SECONDS)  # it may come back, and waits
            assert (await client.acquire_tickets("s0", ROOT, 2, 0.05)).drained == drain
            await client.readmit_server("s0")
            assert (await client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS)).tickets


async def test_what_cannot_be_asked(client: ReplayClient) -> None:
    await client.open_run(spec(groups_per_step=2, train_task_count=100), ROOT, [])
    with pytest.raises(FencedError):
        await client.drain_server("s0", DrainReason.DIVERGING, "odd", epoch=1)
    with pytest.raises(InvalidDataError, match="name the server"):
        await client.drain_server("", DrainReason.OPERATOR, "")
    with pytest.raises(InvalidDataError, match="not a DrainReason"):
        await client.drain_server("s0", 0, "")  # type: ignore[arg-type]


async def test_tickets_are_timed(client: ReplayClient) -> None:
    (one, two, *_), *_ = await client.acquire_tickets("s0", ROOT, 4, WAIT_SECONDS)
    await write(client, filled(one))
    status = await server(client, "s0")
    assert (status.present, status.tickets, status.timed_tickets, status.version) == (True, 1, 2, ROOT)
    assert 0 < status.median_ticket_seconds <= status.oldest_ticket_seconds
    await write(client, filled(two))
    assert (await server(client, "s0")).oldest_ticket_seconds == 0
