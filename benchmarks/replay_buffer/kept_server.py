"""The bare stream that keeps what comes: what any service in Python pays for durability before it decides anything.

    reader ──> SHA-256, CRC32C ──> writer thread: all that waits in one write, one fdatasync ──> durable, on the loop
                    └──> unanswered, in order ──> one answer to everything at the front that is durable

`PORT DIRECTORY`. No identity, order, label or state is looked at, and nothing but the bytes could be found again. A
draw reads the file back, message by message, one ahead of what is being sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import google_crc32c
import grpc

from benchmarks.replay_buffer.bare_server import BareService, acknowledged, header, serve
from leeway.v1 import replay_pb2

_MESSAGES_WAITING: Final = 256
_VECTORS: Final = 1024
"""What one system call takes."""
_Context = grpc.aio.ServicerContext[Any, Any]
_Durable = asyncio.Future[None]


class KeptFile:
    """A file that a thread of its own writes and syncs.

    Args:
        path: of a file that does not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("x+b", buffering=0)
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[tuple[bytes, _Durable]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def size_bytes(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def append(self, data: bytes) -> _Durable:
        """Write these next; the future is done when they are durable."""
        durable: _Durable = self._loop.create_future()
        self._queue.put((data, durable))
        return durable

    def read(self, begin: int, size_bytes: int) -> bytes:
        """What was written at a place. Any thread."""
        return os.pread(self._file.fileno(), size_bytes, begin)

    def _run(self) -> None:
        while True:
            batch = [self._queue.get(), *(self._queue.get() for _ in range(self._queue.qsize()))]
            self._write([data for data, _ in batch])
            os.fdatasync(self._file.fileno())
            self._loop.call_soon_threadsafe(_settle, [durable for _, durable in batch])

    def _write(self, blocks: Sequence[bytes]) -> None:
        for begin in range(0, len(blocks), _VECTORS):
            together = blocks[begin : begin + _VECTORS]
            if os.writev(self._file.fileno(), together) != sum(map(len, together)):
                raise OSError(f"{self._file.name}: not everything was written; is the disk full?")


def _settle(durable: Sequence[_Durable]) -> None:
    for future in durable:
        future.set_result(None)


class KeptService(BareService):
    """Counts nothing, keeps everything."""

    def __init__(self, file: KeptFile) -> None:
        self._file = file
        self._begin = 0  # of what the next draw reads

    async def WriteTrajectories(
        self, request_iterator: AsyncIterator[replay_pb2.WriteTrajectoriesRequest], context: _Context
    ) -> AsyncIterator[replay_pb2.WriteTrajectoriesResponse]:
        self._begin = self._file.size_bytes
        unanswered: deque[tuple[_Durable, list[replay_pb2.WriteResult]]] = deque()
        more, room = asyncio.Event(), asyncio.Event()

        async def read() -> None:
            async for request in request_iterator:
                chunks = [item.chunk for item in request.items if item.chunk]
                for chunk in chunks:
                    hashlib.sha256(chunk).digest()
                    google_crc32c.value(chunk)
                durable = self._file.append(chunks[0] if len(chunks) == 1 else b"".join(chunks))
                unanswered.append((durable, [acknowledged(item) for item in request.items]))
                more.set()
                while len(unanswered) >= _MESSAGES_WAITING:
                    room.clear()
                    await room.wait()

        reader = asyncio.create_task(read())
        reader.add_done_callback(lambda _: more.set())
        while unanswered or not reader.done():
            if not unanswered:
                more.clear()
                await more.wait()
                continue
            await unanswered[0][0]
            results: list[replay_pb2.WriteResult] = []
            while unanswered and unanswered[0][0].done():
                results += unanswered.popleft()[1]
            yield replay_pb2.WriteTrajectoriesResponse(results=results)
            room.set()
        await reader

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
            data = memoryview(self._file.read(at, size_bytes * pieces))
            at += len(data)
            response = replay_pb2.DrawBatchResponse()
            for number in range(pieces):
                chunk = bytes(data[number * size_bytes : (number + 1) * size_bytes])
                google_crc32c.value(chunk)
                response.pieces.add(trajectory=headers[number])
                response.pieces.add(chunk=chunk)
            yield response


async def main(port: int, directory: Path) -> None:
    """Serve until killed."""
    await serve(port, KeptService(KeptFile(directory / "kept")))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2])))
