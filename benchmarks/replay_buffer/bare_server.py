"""The limit: a gRPC server in Python with the replay buffer's messages that only counts bytes. `PORT`; nothing is kept.

A write stream is answered once, when it ends. A draw is sent from one message made beforehand; `run` says how:
"bytes of a piece, pieces in a message, messages".
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc

from leeway.rpc import Security, start_server
from leeway.v1 import replay_pb2, replay_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]


class BareService(replay_pb2_grpc.ReplayServiceServicer):
    """Counts."""

    async def WriteTrajectories(
        self, request_iterator: AsyncIterator[replay_pb2.WriteTrajectoriesRequest], context: _Context
    ) -> AsyncIterator[replay_pb2.WriteTrajectoriesResponse]:
        count = size_bytes = 0
        async for request in request_iterator:
            count += len(request.items)
            for item in request.items:
                size_bytes += len(item.chunk)
        result = replay_pb2.WriteResult(seq=count, expected_seq=size_bytes)
        yield replay_pb2.WriteTrajectoriesResponse(results=[result])

    async def DrawBatch(
        self, request: replay_pb2.DrawBatchRequest, context: _Context
    ) -> AsyncIterator[replay_pb2.DrawBatchResponse]:
        size_bytes, pieces, count = map(int, request.run.split(","))
        response = replay_pb2.DrawBatchResponse(
            pieces=[replay_pb2.GroupPiece(chunk=bytes(size_bytes)) for _ in range(pieces)]
        )
        for _ in range(count):
            yield response


async def main(port: int) -> None:
    """Serve until killed."""
    server = await start_server(
        f"127.0.0.1:{port}",
        lambda to: replay_pb2_grpc.add_ReplayServiceServicer_to_server(BareService(), to),
        [],
        Security(),
    )
    try:
        await asyncio.Event().wait()
    finally:
        await server.stop(0.0)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
