"""One write stream: a pipeline, so that an fsync never keeps the next message waiting.

client ──> read: decide and append, message by message ──> unanswered ──> answer: wait until durable ──> client
             ▲                                                                  │
             └── waits while too much is unanswered, or received and not yet    │   one message answers everything
                 on disk (backpressure.py)                                            │
                                                                                └── that one fsync made durable

waits     read, for the next message, and for room; answer, for something unanswered, and for the disk
unblocks  answer makes room; read's end, or its failure, ends the stream when what it read is answered
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final

from leeway import codec
from leeway.errors import InvalidDataError, UnavailableError
from leeway.rpc import cancel_and_wait
from leeway.types import TrajectoryFailure, WriteItem, WriteResult, WriteStatus
from leeway.v1 import replay_pb2
from replay_buffer.buffer import ReplayBuffer

_UNANSWERED_MESSAGES: Final = 256
"""Messages that may wait for the disk; beyond it the stream is not read, which holds the writer back."""
_RESULTS_PER_ANSWER: Final = 4096
"""Results in one answer; a message with more of its own is answered whole."""

Requests = AsyncIterator[bytes]
"""Serialized WriteTrajectoriesRequests."""


class WriteStream:
    """Takes one stream's items in order and answers each once it is on disk."""

    def __init__(self, buffer: ReplayBuffer, requests: Requests) -> None:
        self._buffer = buffer
        self._requests = requests
        self._unanswered: deque[tuple[list[WriteResult], int]] = deque()  # results, and the log's mark behind them
        self._read_more = asyncio.Event()  # something is unanswered, or reading has ended
        self._room = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """Read no more; what was read so far is still answered."""
        if self._reader is not None:
            self._reader.cancel()

    async def answers(self) -> AsyncGenerator[bytes]:
        """Run the stream; serialized WriteTrajectoriesResponses.

        Raises:
            NotFoundError: no such run.
            ExhaustedError: too much waits for the disk; says when to come back.
            UnavailableError: the buffer stops.
            LogFailedError: the log is dead; nothing more is acknowledged.
        """
        reader = self._reader = asyncio.create_task(self._read(), name="write stream")
        reader.add_done_callback(lambda _: self._read_more.set())  # also if it is stopped before it has begun
        try:
            while await self._something_unanswered():
                await self._buffer.durable(self._unanswered[0][1])
                yield self._answer()
                self._room.set()
            if reader.cancelled():
                raise UnavailableError("the replay buffer is stopping; repeat what was not acknowledged")
            await reader
        finally:
            await cancel_and_wait(reader)

    async def _something_unanswered(self) -> bool:
        assert self._reader is not None
        while not self._unanswered and not self._reader.done():
            self._read_more.clear()
            await self._read_more.wait()
        return bool(self._unanswered)

    def _answer(self) -> bytes:
        """Results of everything at the front that is durable by now."""
        durable_mark = self._buffer.durable_mark
        results: list[WriteResult] = []
        while self._unanswered and self._unanswered[0][1] <= durable_mark:
            if results and len(results) + len(self._unanswered[0][0]) > _RESULTS_PER_ANSWER:
                break
            results += self._unanswered.popleft()[0]
        return replay_pb2.WriteTrajectoriesResponse(results=map(codec.result_to_proto, results)).SerializeToString()

    async def _read(self) -> None:
        async for request in self._requests:
            if self._buffer.backpressure.crowded():
                await self._buffer.backpressure.admit(len(request))
            self._unanswered.append((self._write(request), self._buffer.mark))
            self._read_more.set()
            while len(self._unanswered) >= _UNANSWERED_MESSAGES:
                self._room.clear()
                await self._room.wait()

    def _write(self, request: bytes) -> list[WriteResult]:
        message = codec.parse(replay_pb2.WriteTrajectoriesRequest, request)
        read = [_item(item) for item in message.items]
        taken = [item for item in read if isinstance(item, WriteItem)]
        written = self._buffer.write(message.run, taken, message.server_id)
        if len(taken) == len(read):
            return written
        answers = iter(written)
        return [next(answers) if isinstance(item, WriteItem) else item for item in read]


def _item(message: replay_pb2.WriteItem) -> WriteItem | WriteResult:
    """An item, or its refusal. A close that makes no sense ends its trajectory: nothing better will follow it."""
    try:
        return codec.item_from_proto(message)
    except InvalidDataError as error:
        key = message.trajectory_id, message.attempt, message.seq
        if message.HasField("close"):
            return WriteItem(*key, TrajectoryFailure(f"its close is malformed: {error.message}", retryable=False))
        return WriteResult(*key, WriteStatus.INVALID, message=error.message)
