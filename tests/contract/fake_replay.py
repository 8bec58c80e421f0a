"""A replay buffer in memory that follows replay.proto's rules for writes, and that misbehaves on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from leeway import arithmetic, codec
from leeway.errors import ExhaustedError
from leeway.rpc import RunningServer, Security, start_server
from leeway.trajectory.assembly import assemble_trajectory
from leeway.types import (
    Drain,
    Purpose,
    RunSpec,
    SamplingParams,
    Ticket,
    TicketMember,
    Trajectory,
    TrajectoryClose,
    TrajectoryFailure,
    TrajectoryRecord,
    WriteItem,
    WriteResult,
    WriteStatus,
)
from leeway.v1 import replay_pb2, replay_pb2_grpc
from tests.harness.arithmetic_law import policy_version

RUN = "rehearsal"
SAMPLING = SamplingParams(max_tokens=9, stop_token_ids=(arithmetic.END_OF_SEQUENCE,), routing=True)


def run_spec(**changes: Any) -> RunSpec:
    fields: dict[str, Any] = {
        "run": RUN,
        "groups_per_step": 2,
        "members": 4,
        "max_staleness": 2,
        "total_steps": 10,
        "seed": 0,
        "train_task_count": 8,
        "sampling": SAMPLING,
        "signature": arithmetic.SIGNATURE,
        "dataset_digest": b"d" * 32,
        "root": policy_version(RUN, 0, 0),
        "max_attempts": 3,
    }
    return RunSpec(**(fields | changes))


@dataclass
class Written:
    """What is 'on disk' of one trajectory's attempt."""

    items: list[WriteItem] = field(default_factory=list)

    @property
    def close(self) -> TrajectoryClose | None:
        last = self.items[-1].content if self.items else None
        return last if isinstance(last, TrajectoryClose) else None

    @property
    def failure(self) -> TrajectoryFailure | None:
        last = self.items[-1].content if self.items else None
        return last if isinstance(last, TrajectoryFailure) else None

    def assemble(self) -> Trajectory:
        chunks = tuple(item.content for item in self.items if isinstance(item.content, bytes))
        first = self.items[0]
        return assemble_trajectory(
            TrajectoryRecord(first.trajectory_id, 0, first.attempt, "server-0", self.close, "", chunks)
        )


# Only the worker's calls: pyright need not miss the others.
_Servicer: Any = replay_pb2_grpc.ReplayServiceServicer


class FakeReplay(_Servicer):
    """Set what it answers before use; read what it holds afterwards."""

    def __init__(self, spec: RunSpec | None = None) -> None:
        self.spec = spec or run_spec()
        self.tickets: list[Ticket] = []  # handed out in order
        self.issued: set[str] = set()
        self.endless: Callable[[int], Ticket] | None = None
        self.next_number = 0
        self.stop_after: int | None = None  # endings after which the run has finished
        self.finished = False
        self.written: dict[tuple[str, int], Written] = {}
        self.arrived: list[WriteItem] = []  # everything, repetitions too
        self.endings: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        self.num_endings = 0
        self.ticket_requests: list[replay_pb2.AcquireTicketsRequest] = []
        self.request_arrived = asyncio.Event()
        self.more = asyncio.Condition()
        self.renewed: list[tuple[str, int]] = []
        self.left: list[str] = []
        self.drained: Drain | None = None  # told to every server that asks
        self.abort_on_renewal: set[tuple[str, int]] = set()
        self.streams = 0
        self.judge: Callable[[WriteItem], WriteResult | None] = lambda _: None
        self.break_stream: Callable[[int, WriteItem], str] = lambda _stream, _item: ""  # "before", "after", "exhausted"
        self.max_in_message = 0
        self.joined = 0
        self.ignore_pins = False  # hands evaluations to servers at any version
        self.cancelled_calls = 0  # AcquireTickets calls that the client gave up

    async def add(self, *tickets: Ticket) -> None:
        async with self.more:
            self.tickets.extend(tickets)
            self.more.notify_all()

    async def finish(self) -> None:
        async with self.more:
            self.finished = True
            self.more.notify_all()

    async def JoinRun(self, request: replay_pb2.JoinRunRequest, context: Any) -> replay_pb2.JoinRunResponse:
        self.joined += 1
        return replay_pb2.JoinRunResponse(spec=codec.spec_to_proto(self.spec), finished=self.finished)

    async def AcquireTickets(
        self, request: replay_pb2.AcquireTicketsRequest, context: Any
    ) -> replay_pb2.AcquireTicketsResponse:
        self.ticket_requests.append(request)
        self.request_arrived.set()
        if self.endless is not None:
            count = max(request.max_members // self.spec.members, 1)
            tickets = [self.endless(self.next_number + i) for i in range(count)]
            self.next_number += count
            return self._reply(tickets)
        wait_seconds = codec.seconds_from_proto(request.wait)
        try:
            async with asyncio.timeout(wait_seconds), self.more:
                await self.more.wait_for(lambda: self.finished or self._fitting(request))
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            self.cancelled_calls += 1
            raise
        tickets = self._fitting(request)
        self.tickets = [ticket for ticket in self.tickets if ticket not in tickets]
        return self._reply(tickets)

    def _fitting(self, request: replay_pb2.AcquireTicketsRequest) -> list[Ticket]:
        version = codec.version_from_proto(request.version)
        return [t for t in self.tickets if t.pinned_version in (None, version) or self.ignore_pins]

    def _reply(self, tickets: list[Ticket]) -> replay_pb2.AcquireTicketsResponse:
        self.issued.update(member.trajectory_id for ticket in tickets for member in ticket.members)
        return replay_pb2.AcquireTicketsResponse(
            tickets=[codec.ticket_to_proto(ticket) for ticket in tickets],
            finished=self.finished,
            drained=None if self.drained is None else codec.drain_to_proto(self.drained),
        )

    async def WriteTrajectories(
        self, request_iterator: AsyncIterator[replay_pb2.WriteTrajectoriesRequest], context: Any
    ) -> AsyncIterator[replay_pb2.WriteTrajectoriesResponse]:
        self.streams += 1
        stream = self.streams
        async for request in request_iterator:
            self.max_in_message = max(self.max_in_message, len(request.items))
            results: list[WriteResult] = []
            for item in map(codec.item_from_proto, request.items):
                self.arrived.append(item)
                cut = self.break_stream(stream, item)
                if cut == "exhausted":
                    raise ExhaustedError("no room", retry_seconds=0.01)
                if cut == "before":
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "cut before writing")
                results.append(self.judge(item) or self.write(item))
                if cut == "after":
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "cut after writing, before the answer")
            yield replay_pb2.WriteTrajectoriesResponse(results=[codec.result_to_proto(result) for result in results])

    def write(self, item: WriteItem) -> WriteResult:
        if self.issued and item.trajectory_id not in self.issued:
            return result(item, WriteStatus.UNKNOWN)
        written = self.written.setdefault((item.trajectory_id, item.attempt), Written())
        if item.seq < len(written.items):
            same = written.items[item.seq] == item
            return result(item, WriteStatus.ACKNOWLEDGED if same else WriteStatus.CONFLICT)
        if item.seq > len(written.items):
            return result(item, WriteStatus.OUT_OF_RANGE, len(written.items))
        written.items.append(item)
        if not isinstance(item.content, bytes):
            self.num_endings += 1
            self.endings.put_nowait((item.trajectory_id, item.attempt))
            if self.stop_after is not None and self.num_endings >= self.stop_after:
                self.finished = True
        return result(item, WriteStatus.ACKNOWLEDGED)

    async def LeaveRun(self, request: replay_pb2.LeaveRunRequest, context: Any) -> replay_pb2.LeaveRunResponse:
        self.left.append(request.server_id)
        return replay_pb2.LeaveRunResponse()

    async def RenewLeases(self, request: replay_pb2.RenewLeasesRequest, context: Any) -> replay_pb2.RenewLeasesResponse:
        keys = [(ticket.group_id, ticket.attempt) for ticket in request.tickets]
        self.renewed.extend(keys)
        aborted = [
            replay_pb2.TicketReference(group_id=g, attempt=a) for g, a in keys if (g, a) in self.abort_on_renewal
        ]
        return replay_pb2.RenewLeasesResponse(aborted=aborted)

    async def ended(self, count: int) -> None:
        """Wait until so many trajectories have ended."""
        for _ in range(count):
            await self.endings.get()


def result(item: WriteItem, status: WriteStatus, expected_seq: int = 0, message: str = "") -> WriteResult:
    return WriteResult(item.trajectory_id, item.attempt, item.seq, status, expected_seq, message or status.name.lower())


def ticket(number: int, *, members: int = 4, **changes: Any) -> Ticket:
    fields: dict[str, Any] = {
        "group_id": f"g{number}",
        "attempt": 1,
        "purpose": Purpose.TRAIN,
        "task_index": number % 8,
        "members": tuple(TicketMember(f"g{number}.{m}", m, 1000 * number + m) for m in range(members)),
        "sampling": SAMPLING,
        "lease_seconds": 30.0,
    }
    return Ticket(**(fields | changes))


@asynccontextmanager
async def serving(replay: FakeReplay, address: str = "127.0.0.1:0") -> AsyncGenerator[RunningServer, None]:
    server = await start_server(
        address, lambda s: replay_pb2_grpc.add_ReplayServiceServicer_to_server(replay, s), [], Security()
    )
    try:
        yield server
    finally:
        await server.stop(0.0)
