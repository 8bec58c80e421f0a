"""A real replay buffer behind real gRPC, in this process, that can be stopped and started on the same directory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from leeway import codec
from leeway.config import ReplayBufferOptions
from leeway.replay_client import ReplayClient
from leeway.rpc import Security, mapped_errors, start_server
from leeway.types import WriteItem, WriteResult
from leeway.v1 import replay_pb2
from replay_buffer.buffer import ReplayBuffer
from replay_buffer.rpc.service import SERVICE_NAME, ReplayService
from replay_buffer.storage.log import Log, LogOptions
from replay_buffer.storage.segments import AppendFile, OpenFile
from tests.deadlines import WAIT_SECONDS
from tests.harness.replay_builders import RUN

PLAIN = Security()


@asynccontextmanager
async def serving(
    directory: Path,
    *,
    open_file: OpenFile = AppendFile,
    free_bytes: Callable[[Path], int] = lambda _: 1 << 40,
    **options: Any,
) -> AsyncGenerator[str]:
    """Serve a directory; yields the address."""
    async with serving_buffer(directory, open_file=open_file, free_bytes=free_bytes, **options) as (address, _):
        yield address


@asynccontextmanager
async def serving_buffer(
    directory: Path,
    *,
    open_file: OpenFile = AppendFile,
    free_bytes: Callable[[Path], int] = lambda _: 1 << 40,
    **options: Any,
) -> AsyncGenerator[tuple[str, ReplayBuffer]]:
    """Serve a directory; yields the address and what is behind it."""
    patience = {"lease_seconds": WAIT_SECONDS, "hold_seconds": WAIT_SECONDS}
    values = {"directory": directory, "stop_seconds": 0.2, **patience, **options}
    durable_log = Log(LogOptions(directory, retry_seconds=0.01, open_file=open_file))
    buffer = ReplayBuffer(ReplayBufferOptions.model_validate(values), durable_log, free_bytes=free_bytes)
    buffer.start()
    service = ReplayService(buffer)
    server = await start_server("127.0.0.1:0", service.add_to, [SERVICE_NAME], PLAIN)
    try:
        yield f"127.0.0.1:{server.port}", buffer
    finally:
        buffer.stop()
        service.stop()
        await server.stop(0.2)
        await buffer.aclose()
        await durable_log.aclose()


@asynccontextmanager
async def connected(address: str, run: str = RUN) -> AsyncGenerator[ReplayClient]:
    client = ReplayClient(address, run, PLAIN, patience_seconds=WAIT_SECONDS)
    try:
        yield client
    finally:
        await client.aclose()


async def write(client: ReplayClient, items: Sequence[WriteItem], server_id: str = "s0") -> list[WriteResult]:
    """One message of items over a stream of its own; returns the answers."""
    request = replay_pb2.WriteTrajectoriesRequest(
        run=client.run, server_id=server_id, items=[codec.item_to_proto(item) for item in items]
    )

    async def requests() -> AsyncIterator[replay_pb2.WriteTrajectoriesRequest]:
        yield request

    with mapped_errors("WriteTrajectories"):
        async with asyncio.timeout(WAIT_SECONDS):
            return [
                codec.result_from_proto(result)
                async for reply in client.stub.WriteTrajectories(requests())
                for result in reply.results
            ]
