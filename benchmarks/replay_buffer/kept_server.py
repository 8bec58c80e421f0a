"""The bare stream that keeps what comes: what any service in Python pays for durability before it decides anything.

    reader ──> SHA-256 and CRC32C of each chunk ──> queue ──> all that waits: one write, one fdatasync ──> one answer

`PORT DIRECTORY`. No identity, order, label or state is looked at, and nothing but the bytes could be found again. A
draw reads the file back, message by message, one ahead of what is being sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import google_crc32c
import grpc

from benchmarks.replay_buffer.bare_server import BareService, acknowledged, header, serve
from leeway.v1 import replay_pb2

_MESSAGES_WAITING: Final = 64
_VECTORS: Final = 1024
"""What one system call takes."""
_Context = grpc.aio.ServicerContext[Any, Any]
_Message = tuple[list[bytes], list[replay_pb2.WriteResult]]


class KeptService(BareService):
    """Counts nothing, keeps everything.

    Args:
        path: of a file that does not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("x+b", buffering=0)
        self._begin = 0  # of what the next draw reads

    async def WriteTrajectories(
        self, request_iterator: AsyncIterator[replay_pb2.WriteTrajectoriesRequest], context: _Context
    ) -> AsyncIterator[replay_pb2.WriteTrajectoriesResponse]:
        incoming: asyncio.Queue[_Message | None] = asyncio.Queue(_MESSAGES_WAITING)
        reader = asyncio.create_task(_read(request_iterator, incoming))
        self._begin = self._file.seek(0, os.SEEK_END)
        going = True
        while going:
            waiting = [await incoming.get(), *(incoming.get_nowait() for _ in range(incoming.qsize()))]
            messages = [message for message in waiting if message is not None]
            going = len(messages) == len(waiting)
            await asyncio.to_thread(self._keep, [chunk for chunks, _ in messages for chunk in chunks])
            answered = [result for _, results in messages for result in results]
            yield replay_pb2.WriteTrajectoriesResponse(results=answered)
        await reader

    def _keep(self, chunks: Sequence[bytes]) -> None:
        for begin in range(0, len(chunks), _VECTORS):
            together = chunks[begin : begin + _VECTORS]
            if os.writev(self._file.fileno(), together) != sum(map(len, together)):
                raise OSError(f"{self._file.name}: not everything was written; is the disk full?")
        os.fdatasync(self._file.fileno())

    async def DrawBatch(
        self, request: replay_pb2.DrawBatchRequest, context: _Context
    ) -> AsyncIterator[replay_pb2.DrawBatchResponse]:
        source = self._stored(*map(int, request.run.split(",")))
        ahead = asyncio.create_task(asyncio.to_thread(next, source, None))
        while (response := await ahead) is not None:
            ahead = asyncio.create_task(asyncio.to_thread(next, source, None))
            yield response

    def _stored(self, size_bytes: int, pieces: int, count: int) -> Iterator[replay_pb2.DrawBatchResponse]:
        headers = [header(number) for number in range(pieces)]
        at = self._begin
        for _ in range(count):
            data = memoryview(os.pread(self._file.fileno(), size_bytes * pieces, at))
            at += len(data)
            response = replay_pb2.DrawBatchResponse()
            for number in range(pieces):
                chunk = bytes(data[number * size_bytes : (number + 1) * size_bytes])
                google_crc32c.value(chunk)
                response.pieces.add(trajectory=headers[number])
                response.pieces.add(chunk=chunk)
            yield response


async def _read(
    request_iterator: AsyncIterator[replay_pb2.WriteTrajectoriesRequest], incoming: asyncio.Queue[_Message | None]
) -> None:
    async for request in request_iterator:
        chunks = [item.chunk for item in request.items if item.chunk]
        for chunk in chunks:
            hashlib.sha256(chunk).digest()
            google_crc32c.value(chunk)
        await incoming.put((chunks, [acknowledged(item) for item in request.items]))
    await incoming.put(None)


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), KeptService(Path(sys.argv[2]) / "kept")))
