"""The limit: a gRPC server in Python with the replay buffer's messages that only counts bytes. `PORT`; nothing is kept.

A write stream of run "answered" gets a result for each item, message by message, as the protocol has it; any other is
answered once, when it ends. A draw is sent from one message made beforehand, in which a trajectory's header precedes
each chunk; `run` says how: "bytes of a chunk, chunks in a message, messages".
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc

from benchmarks.replay_buffer.workload import sealed
from leeway import codec
from leeway.rpc import Security, start_server
from leeway.v1 import replay_pb2, replay_pb2_grpc

ANSWERED: Final = "answered"
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
            if request.run == ANSWERED:
                yield replay_pb2.WriteTrajectoriesResponse(results=map(acknowledged, request.items))
                count = 0
        if count:
            result = replay_pb2.WriteResult(seq=count, expected_seq=size_bytes)
            yield replay_pb2.WriteTrajectoriesResponse(results=[result])

    async def DrawBatch(
        self, request: replay_pb2.DrawBatchRequest, context: _Context
    ) -> AsyncIterator[replay_pb2.DrawBatchResponse]:
        size_bytes, pieces, count = map(int, request.run.split(","))
        response = replay_pb2.DrawBatchResponse()
        for number in range(pieces):
            response.pieces.add(trajectory=header(number))
            response.pieces.add(chunk=bytes(size_bytes))
        for _ in range(count):
            yield response


def acknowledged(item: replay_pb2.WriteItem) -> replay_pb2.WriteResult:
    """What an item is answered with."""
    return replay_pb2.WriteResult(
        trajectory_id=item.trajectory_id,
        attempt=item.attempt,
        seq=item.seq,
        status=replay_pb2.WRITE_STATUS_ACKNOWLEDGED,
    )


def header(number: int) -> replay_pb2.TrajectoryHeader:
    """What precedes a chunk in a draw."""
    return replay_pb2.TrajectoryHeader(
        trajectory_id=f"bare-g{number}.0",
        attempt=1,
        server_id="writer",
        close=codec.close_to_proto(sealed([b""], 1)),
        chunk_count=1,
    )


async def serve(port: int, service: BareService) -> None:
    """Until killed."""
    server = await start_server(
        f"127.0.0.1:{port}",
        lambda to: replay_pb2_grpc.add_ReplayServiceServicer_to_server(service, to),
        [],
        Security(),
    )
    try:
        await asyncio.Event().wait()
    finally:
        await server.stop(0.0)


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), BareService()))
