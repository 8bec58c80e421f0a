"""One message may answer many, but never one that is not on disk yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from leeway.errors import UnavailableError
from leeway.types import WriteItem, WriteResult, WriteStatus
from leeway.v1 import replay_pb2
from replay_buffer.rpc.write_stream import WriteStream
from tests.deadlines import WAIT_SECONDS


class Intake:
    """Never crowded."""

    @staticmethod
    def crowded() -> bool:
        return False


class Disk:
    """A buffer that takes everything, on a disk that syncs when it is told to."""

    def __init__(self) -> None:
        self.backpressure = Intake()
        self.mark = 0
        self.durable_mark = 0
        self._synced = asyncio.Condition()

    def write(self, run: str, items: Sequence[WriteItem], server_id: str) -> list[WriteResult]:
        del run, server_id
        self.mark += len(items)
        return [WriteResult(item.trajectory_id, item.attempt, item.seq, WriteStatus.ACKNOWLEDGED) for item in items]

    async def sync(self, mark: int) -> None:
        async with self._synced:
            self.durable_mark = mark
            self._synced.notify_all()

    async def durable(self, mark: int) -> None:
        async with self._synced:
            await self._synced.wait_for(lambda: self.durable_mark >= mark)


async def settled() -> None:
    """The stream has done what it does by itself: no thread, no clock takes part in it."""
    for _ in range(5000):
        await asyncio.sleep(0)


def request(*seqs: int) -> bytes:
    items = [replay_pb2.WriteItem(trajectory_id="r-g1.0", attempt=1, seq=seq, chunk=b"") for seq in seqs]
    return replay_pb2.WriteTrajectoriesRequest(run="r", server_id="s0", items=items).SerializeToString()


async def requests(*messages: bytes) -> AsyncIterator[Any]:
    for message in messages:
        yield message


def seqs(answer: bytes) -> list[int]:
    return [result.seq for result in replay_pb2.WriteTrajectoriesResponse.FromString(answer).results]


async def test_an_answer_holds_what_is_on_disk_and_nothing_else() -> None:
    disk: Any = Disk()
    answers = WriteStream(disk, requests(request(0, 1), request(2), request(3, 4))).answers()
    first = asyncio.ensure_future(anext(answers))
    await settled()
    assert disk.mark == 5, "an fsync keeps nothing from being read"
    assert not first.done()
    await disk.sync(2)
    assert seqs(await asyncio.wait_for(first, WAIT_SECONDS)) == [0, 1]
    second = asyncio.ensure_future(anext(answers))
    await settled()
    assert not second.done()
    await disk.sync(5)
    assert seqs(await asyncio.wait_for(second, WAIT_SECONDS)) == [2, 3, 4], "one fsync, one answer"
    with pytest.raises(StopAsyncIteration):
        await anext(answers)


async def test_what_was_read_before_a_stop_is_answered() -> None:
    disk: Any = Disk()

    async def endless() -> AsyncIterator[Any]:
        yield request(0)
        await asyncio.Event().wait()

    stream = WriteStream(disk, endless())
    answers = stream.answers()
    first = asyncio.ensure_future(anext(answers))
    await settled()
    stream.stop()
    await disk.sync(1)
    assert seqs(await asyncio.wait_for(first, WAIT_SECONDS)) == [0]
    with pytest.raises(UnavailableError, match="is stopping"):
        await anext(answers)


async def test_a_stop_ends_a_stream_that_has_just_come() -> None:
    stream = WriteStream(Disk(), requests())  # type: ignore[arg-type]
    first = asyncio.ensure_future(anext(stream.answers()))
    asyncio.get_running_loop().call_soon(stream.stop)  # before the first request is read
    with pytest.raises(UnavailableError, match="is stopping"):
        await asyncio.wait_for(first, WAIT_SECONDS)


async def test_a_stream_is_not_read_while_too_much_is_unanswered() -> None:
    disk: Any = Disk()
    answers = WriteStream(disk, requests(*(request(seq) for seq in range(1000)))).answers()
    first = asyncio.ensure_future(anext(answers))
    await settled()
    assert disk.mark == 256
    await disk.sync(1000)
    answered = seqs(await asyncio.wait_for(first, WAIT_SECONDS))
    answered += [seq async for answer in answers for seq in seqs(answer)]
    assert answered == list(range(1000))
