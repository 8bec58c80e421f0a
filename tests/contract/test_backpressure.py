"""Too much at once: writers are slowed, then refused with a time to come back; a full disk is waited out; work that
nobody trains on yet is kept, and no more is given out."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from leeway import codec
from leeway.errors import ExhaustedError
from leeway.rpc import from_rpc_error
from leeway.types import Ticket, WriteItem, WriteResult, WriteStatus
from leeway.v1 import replay_pb2
from tests.deadlines import WAIT_SECONDS
from tests.harness.buffer_server import connected, serving, serving_buffer, write
from tests.harness.disks import HeldDisk
from tests.harness.replay_builders import ROOT, chunk, filled, spec, version

ROOT_DIRECTORY = Path(__file__).parents[2]
LARGE = chunk(sampled=3000)
"""About 24 KB."""


def message(items: list[WriteItem]) -> replay_pb2.WriteTrajectoriesRequest:
    return replay_pb2.WriteTrajectoriesRequest(
        run=ROOT.run, server_id="s0", items=[codec.item_to_proto(item) for item in items]
    )


def large_items(ticket: Ticket) -> list[WriteItem]:
    return [WriteItem(member.trajectory_id, ticket.attempt, 0, LARGE) for member in ticket.members[:1]]


async def test_writers_are_slowed_then_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    disk = HeldDisk()
    limit = 4 * len(LARGE)
    options: dict[str, Any] = {"slow_pending_bytes": len(LARGE) // 2, "max_pending_bytes": limit, "retry_seconds": 7.5}
    async with (
        serving_buffer(tmp_path, open_file=disk.open, **options) as (address, buffer),
        connected(address) as client,
    ):
        await client.open_run(spec(groups_per_step=8, max_staleness=0), ROOT, [])
        tickets, *_ = await client.acquire_tickets("s0", ROOT, 16, WAIT_SECONDS)
        disk.may_sync.clear()
        writing = {asyncio.create_task(write(client, large_items(ticket))): ticket for ticket in tickets}
        refused: list[Ticket] = []
        while len(refused) < 5:  # one is on its way to the disk, two wait for it unread
            done, _ = await asyncio.wait(writing, timeout=WAIT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            assert done
            for task in done:
                refused.append(writing.pop(task))
                error = task.exception()
                assert isinstance(error, ExhaustedError)
                assert error.retry_seconds == 7.5
                assert "replay_buffer.max_pending_bytes" in error.message
        assert len(LARGE) < buffer.backpressure.received_bytes <= limit
        assert buffer.backpressure.waiting_bytes > 0
        disk.may_sync.set()
        answers = [result for results in await asyncio.gather(*writing) for result in results]
        for ticket in refused:
            answers += await write(client, large_items(ticket))
        assert [result.status for result in answers] == [WriteStatus.ACKNOWLEDGED] * 8
        assert buffer.backpressure.received_bytes == 0


async def test_a_stream_that_runs_ahead_of_the_disk_is_not_read(tmp_path: Path) -> None:
    disk = HeldDisk()
    huge = chunk(sampled=30_000)
    count = 200  # 48 MB
    async with (
        serving_buffer(tmp_path, open_file=disk.open, slow_pending_bytes=len(huge)) as (address, buffer),
        connected(address) as client,
    ):
        await client.open_run(spec(groups_per_step=1, max_staleness=0), ROOT, [])
        ((ticket,), *_) = await client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS)
        disk.may_sync.clear()
        sent = 0

        async def requests() -> AsyncIterator[replay_pb2.WriteTrajectoriesRequest]:
            nonlocal sent
            for seq in range(count):
                yield message([WriteItem(ticket.members[0].trajectory_id, 1, seq, huge)])
                sent += 1

        async def answers() -> list[WriteResult]:
            call = client.stub.WriteTrajectories(requests())
            return [codec.result_from_proto(result) async for reply in call for result in reply.results]

        writing = asyncio.create_task(answers())
        await asyncio.wait([writing], timeout=0.5)
        # What the buffer holds is bounded; the rest stays with the writer, but for the windows of the connection.
        assert buffer.backpressure.received_bytes <= 3 * len(huge) + 1000
        was_sent = sent
        disk.may_sync.set()
        assert was_sent < count / 2
        assert [result.status for result in await writing] == [WriteStatus.ACKNOWLEDGED] * count


async def test_nobody_waits_long_for_a_disk_that_takes_nothing(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with (
        serving_buffer(tmp_path, open_file=disk.open, hold_seconds=WAIT_SECONDS, retry_seconds=0.01) as (
            address,
            buffer,
        ),
        connected(address) as client,
    ):
        patient = buffer.backpressure._options
        await client.open_run(spec(groups_per_step=1, max_staleness=0), ROOT, [])
        ((ticket,), *_) = await client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS)
        disk.may_sync.clear()
        buffer.backpressure._options = patient.model_copy(update={"hold_seconds": 0.05})
        with pytest.raises(ExhaustedError, match="the disk is too slow") as caught:
            await write(client, filled(ticket))
        assert caught.value.retry_seconds == 0.01
        drawing = asyncio.create_task(
            client.draw_batch(1, 1, WAIT_SECONDS)
        )  # the learner's calls come back by themselves
        done, _ = await asyncio.wait([drawing], timeout=0.3)
        assert not done
        buffer.backpressure._options = patient  # a disk that takes something may take its time
        disk.may_sync.set()
        assert [result.status for result in await write(client, filled(ticket))] == [WriteStatus.ACKNOWLEDGED] * 4
        assert len(await drawing) == 1
        await client.advance(1, version(1), ROOT)


async def test_a_refusal_tells_any_client_when_to_return(tmp_path: Path) -> None:
    """`google.rpc.RetryInfo`, as clients in other languages read it."""
    async with serving(tmp_path, free_bytes=lambda _: 0, retry_seconds=3.25) as address, connected(address) as client:
        await client.open_run(spec(), ROOT, [])
        request = replay_pb2.AcquireTicketsRequest(
            run=ROOT.run, server_id="s0", version=codec.version_to_proto(ROOT), max_members=2
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.stub.AcquireTickets(request)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        error = from_rpc_error(caught.value, "AcquireTickets")
        assert isinstance(error, ExhaustedError)
        assert error.retry_seconds == 3.25


async def test_a_slow_learner_costs_no_fresh_work(tmp_path: Path) -> None:
    async with serving(tmp_path) as address, connected(address) as client:
        await client.open_run(spec(groups_per_step=2, max_staleness=2), ROOT, [])
        tickets, *_ = await client.acquire_tickets("s0", ROOT, 1000, WAIT_SECONDS)
        await write(client, [item for ticket in tickets for item in filled(ticket)])
        for _ in range(3):  # the servers go on asking; the learner takes nothing
            assert await client.acquire_tickets("s0", ROOT, 1000, 0) == ([], False, None)
        status = await client.run_status()
        assert (status.issued, status.ready, status.dropped) == (6, 6, {})
        trained: list[str] = []
        parent = ROOT
        for step in (1, 2, 3):
            trained += [group.group_id for group in await client.draw_batch(1, step, WAIT_SECONDS)]
            await client.advance(1, version(step), parent)
            parent = version(step)
        assert sorted(trained) == sorted(ticket.group_id for ticket in tickets)
        assert (await client.run_status()).dropped == {}


@pytest.mark.processes
def test_a_full_disk_stops_acknowledgements_until_there_is_room() -> None:
    """On a real file system of 4 MiB: see full_disk.py."""
    if shutil.which("unshare") is None:
        pytest.skip("needs the program unshare")
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=4m tmpfs /mnt"
    if subprocess.run([*mounted, mount], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a file system in a namespace of their own")
    script = f"{mount} && exec {sys.executable} -m tests.contract.full_disk /mnt"
    done = subprocess.run(
        [*mounted, script], cwd=ROOT_DIRECTORY, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("recovered: ")
