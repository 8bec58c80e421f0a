"""ReplayService over real gRPC, through the client that its callers use."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from leeway.replay_client import ReplayClient
from leeway.types import GroupState, PolicyVersion, WriteStatus
from tests.contract.buffer_server import connected, serving, write
from tests.unit.replay_buffer.builders import DATASET, ROOT, SIGNATURE, filled, spec, version


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[ReplayClient]:
    async with serving(tmp_path) as address, connected(address) as client:
        yield client


async def fill(client: ReplayClient, at: PolicyVersion, groups: int) -> list[str]:
    """Complete this many new groups at one version."""
    tickets, finished = await client.acquire_tickets("s0", at, groups * 2, 5)
    assert not finished
    assert len(tickets) == groups
    results = await write(client, [item for ticket in tickets for item in filled(ticket, [at])])
    assert {result.status for result in results} == {WriteStatus.ACKNOWLEDGED}
    return [ticket.group_id for ticket in tickets]


async def test_a_run_from_open_to_finish(client: ReplayClient) -> None:
    opened = await client.open_run(spec(total_steps=2), ROOT, [])
    assert (opened.epoch, opened.head, opened.finished) == (1, ROOT, False)
    assert await client.join_run("s0", SIGNATURE, DATASET, 5) == spec(total_steps=2)
    await fill(client, ROOT, 4)
    head = ROOT
    for step in (1, 2):
        groups = await client.draw_batch(1, step, 10)
        assert [len(group.trajectories) for group in groups] == [2, 2]
        await client.advance(1, version(step), head)
        head = version(step)
    await client.commit(1, 2)
    await client.finish_run(1)
    tickets, finished = await client.acquire_tickets("s0", head, 8, 5)
    assert (tickets, finished) == ([], True)
    status = await client.run_status()
    assert (status.issued, status.consumed, status.open, status.ready, status.drawn) == (4, 4, 0, 0, 0)
    exported = [record async for record in client.export_groups()]
    assert [record.state for record in exported] == [GroupState.CONSUMED] * 4
