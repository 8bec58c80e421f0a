"""A replay buffer in this process, called as its service is, without a network; clock and disk are the test's own.

test ── request messages ──> ReplayService's handlers ──> buffer ──> log ──> VolatileFile
                                                 crash: what was not synced is lost, a new buffer folds the log
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message_factory import GetMessageClass

from leeway.config import ReplayBufferOptions
from leeway.errors import LeewayError
from leeway.v1 import replay_pb2
from replay_buffer.buffer import ReplayBuffer
from replay_buffer.rpc.service import ReplayService
from replay_buffer.storage.log import Log, LogFailedError, LogOptions
from replay_buffer.storage.segments import AppendFile
from tests.deadlines import WAIT_SECONDS

T = TypeVar("T")


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps when told to."""

    offset = 0.0

    def time(self) -> float:
        return super().time() + self.offset


class Context:
    """What a handler sees of its call."""

    def __init__(self, remaining: float | None = None) -> None:
        self._remaining = remaining

    def time_remaining(self) -> float | None:
        return self._remaining


class VolatileDisk:
    """Segments whose bytes are only as durable as their last sync."""

    def __init__(self) -> None:
        self.synced: dict[Path, int] = {}
        self.failing = False

    def open(self, path: Path) -> _VolatileFile:
        return _VolatileFile(path, self)

    def lose(self, keep: float) -> None:
        """Cut every file back to what was synced and a share of the rest."""
        for path, synced in self.synced.items():
            size = path.stat().st_size
            if size > synced:
                # What is left is what the disk holds.
                self.synced[path] = synced + int((size - synced) * keep)
                os.truncate(path, self.synced[path])


class _VolatileFile(AppendFile):
    def __init__(self, path: Path, disk: VolatileDisk) -> None:
        super().__init__(path)
        self._path, self._disk = path, disk
        disk.synced.setdefault(path, path.stat().st_size)

    def sync(self) -> None:
        if self._disk.failing:
            raise OSError(errno.EIO, "the power is gone")
        self._disk.synced[self._path] = self._path.stat().st_size

    def truncate(self, size_bytes: int) -> None:
        super().truncate(size_bytes)
        self._disk.synced[self._path] = min(size_bytes, self._disk.synced[self._path])


def _parsed(method: str, reply: Any) -> Any:
    """A reply; a handler may give its bytes already."""
    output = replay_pb2.DESCRIPTOR.services_by_name["ReplayService"].methods_by_name[method].output_type
    return GetMessageClass(output).FromString(reply) if isinstance(reply, bytes) else reply


class Harness:
    """One log directory, one buffer at a time."""

    def __init__(self, directory: Path, *, lease_seconds: float = 1000.0, segment_bytes: int = 1 << 20) -> None:
        self.directory = directory
        self._segment_bytes = segment_bytes
        self.loop = Clock()
        self.disk = VolatileDisk()
        self._options = ReplayBufferOptions(
            directory=directory,
            lease_seconds=lease_seconds,
            hold_seconds=WAIT_SECONDS,
            soft_free_bytes=0,
            hard_free_bytes=0,
        )
        self.do(self._open())

    def do(self, work: Coroutine[Any, Any, T], timeout_seconds: float = WAIT_SECONDS) -> T:
        """Run something on the loop, with a deadline of real time."""
        return self.loop.run_until_complete(asyncio.wait_for(work, timeout_seconds))

    async def _open(self) -> None:
        self._log = Log(LogOptions(self.directory, self._segment_bytes, open_file=self.disk.open))
        self.buffer = ReplayBuffer(self._options, self._log)
        self.buffer.start()
        self.service = ReplayService(self.buffer)

    # Calls

    def call(self, method: str, request: Any, remaining: float | None = 0.0) -> Any:
        """A unary call, or the list of replies of a stream.

        Raises:
            LeewayError: as a client would get it.
        """
        return self.do(self._call(method, request, remaining))

    async def _call(self, method: str, request: Any, remaining: float | None) -> Any:
        answer = getattr(self.service, method)(request, Context(remaining))
        if hasattr(answer, "__aiter__"):
            return [_parsed(method, reply) async for reply in answer]
        return await answer

    def write(self, requests: Iterable[replay_pb2.WriteTrajectoriesRequest]) -> list[replay_pb2.WriteResult]:
        """One stream of writes; the answers to its items."""
        return self.do(self._write(list(requests)))

    async def _write(self, requests: list[replay_pb2.WriteTrajectoriesRequest]) -> list[replay_pb2.WriteResult]:
        async def stream() -> AsyncIterator[bytes]:
            for request in requests:
                yield request.SerializeToString()

        replies: Any = self.service.WriteTrajectories(stream(), Context())  # type: ignore[arg-type]
        answers = [replay_pb2.WriteTrajectoriesResponse.FromString(reply) async for reply in replies]
        return [result for answer in answers for result in answer.results]

    def pass_time(self, seconds: float) -> None:
        """Move the clock on; whatever is due happens."""
        self.loop.offset += seconds
        self.do(asyncio.sleep(0))
        self.do(asyncio.sleep(0))

    # Ends

    def crash(self, in_flight: Coroutine[Any, Any, Any] | None = None, *, keep: float = 0.0) -> None:
        """Lose the power, in the middle of a call if one is given, and start again on what is left."""
        self.disk.failing = True
        if in_flight is not None:
            try:
                self.do(in_flight)
            except LogFailedError:
                pass
            except LeewayError:
                pass
        self.do(self._leave())
        self.disk.lose(keep)
        self.disk.failing = False
        self.do(self._open())

    def restart(self, *, from_log: bool) -> None:
        """Stop cleanly and start again, on what was stored beside the log or on the log alone."""
        self.close()
        if from_log:
            for path in self.directory.iterdir():
                if path.name.startswith(("snapshot", "index")):
                    path.unlink()
        self.do(self._open())

    def close(self) -> None:
        """Stop, as far as the disk allows."""
        self.do(self._close())

    async def _close(self) -> None:
        self.buffer.stop()
        self.service.stop()
        await self.buffer.aclose()
        await self._log.aclose()

    async def _leave(self) -> None:
        """Nothing is settled: the power is gone."""
        self.buffer.stop()
        self.service.stop()
        await self._log.aclose()

    def in_flight(self, method: str, request: Any) -> Coroutine[Any, Any, Any]:
        """A call for `crash`."""
        return self._call(method, request, 0.0)

    def write_in_flight(self, request: replay_pb2.WriteTrajectoriesRequest) -> Coroutine[Any, Any, Any]:
        """A write for `crash`."""
        return self._write([request])
