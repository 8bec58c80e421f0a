"""One way to insert and to draw a repetition's trajectories, for each contender.

    prepare (not timed): ids, messages   ──>   insert: until everything is acknowledged   ──>   draw: everything, once

Leeway and the bare stream are driven by this process through the same stub; the peers by their own clients in their own
environments. A sample has the wall time, and the CPU time of both ends, which a busy machine disturbs less.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from benchmarks.replay_buffer.bare_server import ANSWERED
from benchmarks.replay_buffer.processes import Driver, Server
from benchmarks.replay_buffer.workload import (
    DATASET_DIGEST,
    MEMBERS,
    SIGNATURE,
    Prepared,
    Workload,
    messages,
    prepare,
    run_spec,
)
from leeway.replay_client import ReplayClient
from leeway.rpc import BULK_PIECE_BYTES, Security, check_health
from leeway.types import PolicyVersion
from leeway.v1 import replay_pb2

START_SECONDS: Final = 120.0
CALL_SECONDS: Final = 120.0
COMMIT_BYTES: Final = 1 << 20
"""Between two fdatasyncs of the plain file: what the log gathers at most."""
ACKNOWLEDGED: Final = replay_pb2.WRITE_STATUS_ACKNOWLEDGED


@dataclass(frozen=True, slots=True)
class Sample:
    """What one repetition took."""

    seconds: float
    server_cpu_seconds: float
    client_cpu_seconds: float


class Contender(Protocol):
    """Inserts and draws `workload.count` trajectories; draw follows insert."""

    name: str
    durability: str

    async def prepare(self, workload: Workload, per_message: int) -> None:
        """Make ready what insert and draw need."""
        ...

    async def insert(self) -> Sample:
        """Write everything and wait until it is acknowledged."""
        ...

    async def draw(self) -> Sample:
        """Read everything once."""
        ...


class Measured:
    """Times a coroutine function beside a server process."""

    def __init__(self, server: Server) -> None:
        self.server = server

    async def time(self, work: Callable[[], Awaitable[None]]) -> Sample:
        """Run it once."""
        server_before = self.server.cpu_seconds()
        began, cpu = time.perf_counter(), time.process_time()
        async with asyncio.timeout(CALL_SECONDS):
            await work()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        self.server.check()
        return Sample(seconds, self.server.cpu_seconds() - server_before, cpu)


class Leeway(Measured):
    """The replay buffer: a learner and a worker that keep the protocol."""

    def __init__(self, name: str, durability: str, server: Server, address: str) -> None:
        super().__init__(server)
        self.name = name
        self.durability = durability
        self._address = address
        self._client: ReplayClient | None = None
        self._per_step = 0
        self._drawn = False

    async def connect(self) -> None:
        """Wait until it serves."""
        await check_health(self._address, Security(), START_SECONDS)

    async def open(self, groups_per_step: int, *, members: int = MEMBERS) -> ReplayClient:
        """Open a run of its own and join it."""
        if self._client is not None:
            await self._client.aclose()
        name = f"benchmark-{time.monotonic_ns()}"
        client = self._client = ReplayClient(self._address, name, Security())
        spec = run_spec(name, groups_per_step, members=members)
        opened = await client.open_run(spec, spec.root, [])
        await client.join_run("writer", SIGNATURE, DATASET_DIGEST, 10.0)
        self.epoch, self.head = opened.epoch, opened.head
        return client

    @property
    def client(self) -> ReplayClient:
        assert self._client is not None
        return self._client

    async def trajectory_ids(self, count: int) -> list[str]:
        """Acquire tickets of the step that comes next."""
        ids: list[str] = []
        while len(ids) < count:
            tickets, *_ = await self.client.acquire_tickets("writer", self.head, count - len(ids), 10.0)
            ids += [member.trajectory_id for ticket in tickets for member in ticket.members]
        return ids

    async def prepare(self, workload: Workload, per_message: int) -> None:
        if self._client is None or self._per_step != workload.count:
            await self.open(workload.count // MEMBERS)
            self._per_step = workload.count
        elif self._drawn:
            await self.advance()
        self._drawn = False
        ids = await self.trajectory_ids(workload.count)
        prepared = prepare(workload, self.head)
        self._size_bytes = prepared.size_bytes * workload.count
        self._messages = messages(self.client.run, ids, prepared, per_message)

    async def advance(self) -> None:
        """Train and commit the drawn step."""
        step = self.head.step + 1
        digest = hashlib.sha256(f"{self.epoch}.{step}".encode()).digest()
        version = PolicyVersion(self.client.run, self.epoch, step, digest)
        await self.client.advance(self.epoch, version, self.head)
        await self.client.commit(self.epoch, step)
        self.head = version

    def mark_advanced(self) -> None:
        """The drawn step has been advanced already."""
        self._drawn = False

    async def insert(self) -> Sample:
        written, self._messages = self._messages, []
        return await self.time(lambda: write(self.client, written))

    async def draw(self) -> Sample:
        self._drawn = True
        request = replay_pb2.DrawBatchRequest(run=self.client.run, epoch=self.epoch, step=self.head.step + 1)
        return await self.time(lambda: count_bytes(self.client, request, self._size_bytes))

    async def draw_assembled(self) -> Sample:
        """Draw again, as the learner does: digests verified, arrays joined."""

        async def draw() -> None:
            await self.client.draw_batch(self.epoch, self.head.step + 1, CALL_SECONDS)

        return await self.time(draw)

    async def aclose(self) -> None:
        """Let the connection go."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None


class Bare(Leeway):
    """The stream that only counts bytes, driven the same way; answers each message like the protocol, or only once."""

    run = ANSWERED

    async def prepare(self, workload: Workload, per_message: int) -> None:
        if self._client is None:
            self._client = ReplayClient(self._address, self.run, Security())
        prepared = prepare(workload, run_spec(self.run, 1).root)
        self._messages = messages(self.run, self.ids(workload.count), prepared, per_message)
        self._plan, self._size_bytes = _plan(prepared, workload.count)

    @staticmethod
    def ids(count: int) -> list[str]:
        """As many as wanted, as long as real ones."""
        return [f"bare-g{number // MEMBERS + 1}.{number % MEMBERS}" for number in range(count)]

    async def draw(self) -> Sample:
        request = replay_pb2.DrawBatchRequest(run=self._plan)
        return await self.time(lambda: count_bytes(self.client, request, self._size_bytes))


class Unanswered(Bare):
    """The bare stream that is answered once, when it ends."""

    run = "unanswered"

    async def insert(self) -> Sample:
        written, self._messages = self._messages, []
        return await self.time(lambda: self._count(written))

    async def _count(self, written: Sequence[replay_pb2.WriteTrajectoriesRequest]) -> None:
        counted = [
            result.seq
            async for reply in self.client.stub.WriteTrajectories(_stream(written))
            for result in reply.results
        ]
        assert counted == [sum(len(message.items) for message in written)]


class Peer:
    """A contender with a client of its own."""

    def __init__(self, name: str, durability: str, server: Server, driver: Driver) -> None:
        self.name = name
        self.durability = durability
        self.server = server
        self._driver = driver

    async def prepare(self, workload: Workload, per_message: int) -> None:
        del per_message  # their clients batch by themselves
        size_bytes = prepare(workload, run_spec("peer", 1).root).size_bytes
        self._arguments = {"size_bytes": size_bytes, "count": workload.count}

    async def insert(self) -> Sample:
        return self._measure("insert")

    async def draw(self) -> Sample:
        return self._measure("draw")

    def _measure(self, op: str) -> Sample:
        before = self.server.cpu_seconds()
        answer = self._driver.order(op, **self._arguments)
        return Sample(answer["seconds"], self.server.cpu_seconds() - before, answer["cpu_seconds"])


class PlainFile:
    """The disk by itself: as many bytes appended to one file, with no service, no check and no record."""

    def __init__(self, name: str, durability: str, path: Path) -> None:
        self.name = name
        self.durability = durability
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w+b", buffering=0)

    async def prepare(self, workload: Workload, per_message: int) -> None:
        del per_message
        size_bytes = prepare(workload, run_spec("file", 1).root).size_bytes * workload.count
        block = random.Random(0).randbytes(COMMIT_BYTES)
        whole, rest = divmod(size_bytes, COMMIT_BYTES)
        self._blocks = [*[block] * whole, *([block[:rest]] if rest else [])]

    async def insert(self) -> Sample:
        self._begin = self._file.tell()
        return self._time(self._write)

    async def draw(self) -> Sample:
        return self._time(self._read)

    def _write(self) -> None:
        for block in self._blocks:
            self._file.write(block)
            os.fdatasync(self._file.fileno())

    def _read(self) -> None:
        self._file.seek(self._begin)
        for block in self._blocks:
            if self._file.read(len(block)) != block:
                raise RuntimeError(f"{self._file.name} returns other bytes than were written")

    def _time(self, work: Callable[[], None]) -> Sample:
        began, cpu = time.perf_counter(), time.process_time()
        work()
        return Sample(time.perf_counter() - began, 0.0, time.process_time() - cpu)

    def close(self) -> None:
        """Delete it."""
        self._file.close()
        Path(self._file.name).unlink()


async def write(client: ReplayClient, written: Sequence[replay_pb2.WriteTrajectoriesRequest]) -> None:
    """One stream; every item must be acknowledged."""
    acknowledged = 0
    async for reply in client.stub.WriteTrajectories(_stream(written)):
        for result in reply.results:
            if result.status != ACKNOWLEDGED:
                raise RuntimeError(f"{result.trajectory_id} seq {result.seq}: {result.message}")
        acknowledged += len(reply.results)
    expected = sum(len(message.items) for message in written)
    if acknowledged != expected:
        raise RuntimeError(f"{acknowledged} of {expected} items were acknowledged")


async def write_all(client: ReplayClient, streams: Sequence[Sequence[replay_pb2.WriteTrajectoriesRequest]]) -> None:
    """Several streams at once."""
    await asyncio.gather(*(write(client, stream) for stream in streams))


async def count_bytes(client: ReplayClient, request: replay_pb2.DrawBatchRequest, expected: int) -> None:
    """Receive a draw and count the bytes of its chunks."""
    size_bytes = 0
    async for reply in client.stub.DrawBatch(request, timeout=CALL_SECONDS):
        for piece in reply.pieces:
            size_bytes += len(piece.chunk)
    if size_bytes != expected:
        raise RuntimeError(f"{size_bytes} of {expected} bytes were drawn")


async def _stream(
    written: Sequence[replay_pb2.WriteTrajectoriesRequest],
) -> AsyncIterator[replay_pb2.WriteTrajectoriesRequest]:
    for message in written:
        yield message


def _plan(prepared: Prepared, count: int) -> tuple[str, int]:
    """How the bare stream sends about as much as a draw of these: messages of about a mebibyte of equal pieces."""
    chunks = len(prepared.chunks) * count
    piece_bytes = prepared.size_bytes // len(prepared.chunks)
    per_message = max(1, BULK_PIECE_BYTES // piece_bytes)
    while chunks % per_message:
        per_message -= 1
    return f"{piece_bytes},{per_message},{chunks // per_message}", piece_bytes * chunks
