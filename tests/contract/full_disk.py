"""`python -m tests.contract.full_disk DIRECTORY`: fill a small file system under a buffer, then make room again."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from leeway.errors import ExhaustedError
from leeway.types import WriteItem, WriteStatus
from tests.deadlines import WAIT_SECONDS
from tests.harness.buffer_server import connected, serving_buffer, write
from tests.harness.replay_builders import ROOT, chunk, spec

MIB = 1 << 20
CHUNK = chunk(sampled=3000)


async def fill_up(directory: Path) -> None:
    ballast = directory / "ballast"
    ballast.write_bytes(bytes(2 * MIB))
    options: dict[str, Any] = {"soft_free_bytes": 0, "hard_free_bytes": 0, "hold_seconds": 0.2, "retry_seconds": 0.05}
    log = directory / "log"
    async with serving_buffer(log, **options) as (address, buffer), connected(address) as client:
        await client.open_run(spec(groups_per_step=1, max_staleness=0), ROOT, [])
        ((ticket,), *_) = await client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS)
        trajectory_id, acknowledged = ticket.members[0].trajectory_id, 0

        async def write_next() -> WriteStatus:
            (result,) = await write(client, [WriteItem(trajectory_id, 1, acknowledged, CHUNK)])
            return result.status

        async def write_until_refused() -> None:
            nonlocal acknowledged
            while await write_next() is WriteStatus.ACKNOWLEDGED:
                acknowledged += 1

        with pytest.raises(ExhaustedError, match="the disk is full") as caught:
            await write_until_refused()
        assert caught.value.retry_seconds == 0.05
        with pytest.raises(ExhaustedError, match="no tickets are issued"):
            await client.acquire_tickets("s1", ROOT, 2, 0)
        durable_bytes = sum(path.stat().st_size for path in log.glob("segment-*"))
        assert durable_bytes >= acknowledged * len(CHUNK)
        assert buffer.backpressure.received_bytes < 4 * len(CHUNK)
        ballast.unlink()
        while True:
            try:
                if await write_next() is WriteStatus.ACKNOWLEDGED:
                    break
            except ExhaustedError as error:
                await asyncio.sleep(error.retry_seconds or 1.0)
        acknowledged += 1
    async with serving_buffer(log) as (address, _), connected(address) as client:
        (record,) = [record async for record in client.export_groups()]
        chunks = record.trajectories[0].chunks
        assert len(chunks) >= acknowledged
        assert set(chunks) == {CHUNK}
    sys.stdout.write(f"recovered: {acknowledged} chunks were acknowledged and {len(chunks)} are there\n")


if __name__ == "__main__":
    asyncio.run(fill_up(Path(sys.argv[1])))
