"""The replay buffer as its callers see it: dataclasses in, dataclasses out, LeewayErrors for failures.

One `ReplayClient` per process. Unary calls wait for the connection and repeat while the buffer restarts, up to
`patience_seconds`. The learner's calls, all of which may be repeated, also wait while the buffer has no room (its disk
is full): it says when to come back. The rollout worker drives `write_stream`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import grpc

from leeway import codec
from leeway.assembly import assemble_groups, assemble_records
from leeway.errors import ExhaustedError, UnavailableError
from leeway.rpc import Security, mapped_errors, open_channel
from leeway.types import (
    DeadLetter,
    Drain,
    DrainReason,
    Evaluation,
    EvaluationResult,
    GroupRecord,
    GroupState,
    ModelSignature,
    OpenedRun,
    PolicyVersion,
    Purpose,
    RunSpec,
    RunStatus,
    ServerStatus,
    Ticket,
    TrajectoryGroup,
)
from leeway.v1 import replay_pb2, replay_pb2_grpc

_MARGIN_SECONDS: Final = 10.0
"""Added to a call's own wait, so that the server's answer wins over the client's deadline."""
_FULL_PATIENCE_SECONDS: Final = 6 * 3600.0
"""How long the learner's calls wait for room."""
_RETRY_SECONDS: Final = 2.0
"""Pause before a call is repeated that the buffer had no room for, unless it says how long."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Work:
    """An answer to a server that asked for work."""

    tickets: list[Ticket]
    finished: bool  # the run; stop asking
    drained: Drain | None  # set while this server gets nothing


log = logging.getLogger(__name__)


class ReplayClient:
    """A connection to one replay buffer for one run."""

    def __init__(self, address: str, run: str, security: Security, *, patience_seconds: float = 60.0) -> None:
        self.address = address
        self.run = run
        self.patience_seconds = patience_seconds
        self._channel = open_channel(address, security)
        self.stub: replay_pb2_grpc.ReplayServiceAsyncStub = replay_pb2_grpc.ReplayServiceStub(self._channel)

    async def aclose(self) -> None:
        await self._channel.close()

    # The worker's calls

    async def join_run(
        self, server_id: str, signature: ModelSignature, dataset_digest: bytes, wait_seconds: float
    ) -> tuple[RunSpec, bool]:
        """Wait for the run to open and check that this server fits it; returns (specification, whether finished).

        Raises:
            PreconditionError: model, tokenizer or tasks differ from the run's.
            DeadlineError: the run did not open in time; call again.
        """
        request = replay_pb2.JoinRunRequest(
            run=self.run,
            server_id=server_id,
            signature=codec.signature_to_proto(signature),
            dataset_digest=dataset_digest,
            wait=codec.duration_to_proto(wait_seconds),
        )
        with mapped_errors(f"JoinRun at {self.address}"):
            reply = await self.stub.JoinRun(request, timeout=wait_seconds + _MARGIN_SECONDS)
        return codec.spec_from_proto(reply.spec), reply.finished

    async def acquire_tickets(
        self, server_id: str, version: PolicyVersion, max_members: int, wait_seconds: float
    ) -> tuple[list[Ticket], bool]:
        """Wait for work; returns (tickets, whether the run has finished)."""
        work = await self.request_work(server_id, version, max_members, wait_seconds)
        return work.tickets, work.finished

    async def request_work(self, server_id: str, version: PolicyVersion, max_members: int, wait_seconds: float) -> Work:
        """Wait for work, and hear what there is to say beside it."""
        request = replay_pb2.AcquireTicketsRequest(
            run=self.run,
            server_id=server_id,
            version=codec.version_to_proto(version),
            max_members=max_members,
            wait=codec.duration_to_proto(wait_seconds),
        )
        with mapped_errors(f"AcquireTickets at {self.address}"):
            reply = await self.stub.AcquireTickets(request, timeout=wait_seconds + _MARGIN_SECONDS)
        tickets = [codec.ticket_from_proto(ticket) for ticket in reply.tickets]
        drained = codec.drain_from_proto(reply.drained) if reply.HasField("drained") else None
        return Work(tickets, reply.finished, drained)

    async def leave_run(self, server_id: str) -> None:
        """The server goes: what it holds can be lent to others at once."""
        with mapped_errors(f"LeaveRun at {self.address}"):
            await self.stub.LeaveRun(
                replay_pb2.LeaveRunRequest(run=self.run, server_id=server_id), timeout=self.patience_seconds
            )

    async def renew_leases(self, server_id: str, tickets: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        """Extend the leases of (group id, attempt); returns those that no longer stand."""
        request = replay_pb2.RenewLeasesRequest(
            run=self.run,
            server_id=server_id,
            tickets=[replay_pb2.TicketReference(group_id=group_id, attempt=attempt) for group_id, attempt in tickets],
        )
        with mapped_errors(f"RenewLeases at {self.address}"):
            reply = await self.stub.RenewLeases(request, timeout=self.patience_seconds)
        return [(ticket.group_id, ticket.attempt) for ticket in reply.aborted]

    # The learner's calls

    async def open_run(
        self,
        spec: RunSpec,
        checkpoint: PolicyVersion,
        ledger: Sequence[tuple[int, Sequence[str]]],
        incarnation: bytes = b"",
    ) -> OpenedRun:
        """Fence older learners, commit the ledger's steps (step, ordered group ids), return everything else drawn.

        Raises:
            FencedError: a learner of this incarnation has opened the run before, and another one since.
        """
        request = replay_pb2.OpenRunRequest(
            spec=codec.spec_to_proto(spec),
            checkpoint=codec.version_to_proto(checkpoint),
            ledger=[replay_pb2.LedgerStep(step=step, group_ids=group_ids) for step, group_ids in ledger],
            incarnation=incarnation,
        )
        reply = await self._answered("OpenRun", lambda: self.stub.OpenRun(request, timeout=self.patience_seconds))
        return OpenedRun(reply.epoch, codec.version_from_proto(reply.head), reply.finished)

    async def draw_batch(
        self, epoch: int, step: int, timeout_seconds: float, *, rank: int = 0, world_size: int = 1
    ) -> list[TrajectoryGroup]:
        """The whole groups of a step, in their order; waits for them, also while the buffer restarts.

        Of `world_size` ranks each gets every world_size-th group, from the one of its own number on.

        Raises:
            DeadlineError: there were not enough groups in time; call again.
            FencedError: a newer learner has opened the run.
            CorruptDataError: a trajectory is not what its close sealed.
        """
        deadline = time.monotonic() + timeout_seconds
        request = replay_pb2.DrawBatchRequest(run=self.run, epoch=epoch, step=step, rank=rank, world_size=world_size)
        while True:
            try:
                with mapped_errors(f"DrawBatch at {self.address}"):
                    stream = self.stub.DrawBatch(request, timeout=max(deadline - time.monotonic(), 0.0))
                    pieces = [piece async for reply in stream for piece in reply.pieces]
            except UnavailableError:
                # The stream broke. A draw is idempotent: draw again; the call itself waits for the buffer to return.
                continue
            except ExhaustedError as error:
                if time.monotonic() > deadline:
                    raise
                await self._leave_alone(error)
                continue
            return assemble_groups(pieces)

    async def advance(self, epoch: int, version: PolicyVersion, parent: PolicyVersion) -> None:
        """Seal the step's batch and register its version; comes before publishing."""
        request = replay_pb2.AdvanceRequest(
            run=self.run,
            epoch=epoch,
            version=codec.version_to_proto(version),
            parent=codec.version_to_proto(parent),
        )
        await self._answered("Advance", lambda: self.stub.Advance(request, timeout=self.patience_seconds))

    async def commit(self, epoch: int, step: int, oldest_kept_step: int = 0) -> None:
        """A checkpoint of `step` is durable: its groups are consumed for good.

        Of the oldest checkpoint that is kept depends what may be retired; 0 keeps everything.
        """
        request = replay_pb2.CommitRequest(run=self.run, epoch=epoch, step=step, oldest_kept_step=oldest_kept_step)
        await self._answered("Commit", lambda: self.stub.Commit(request, timeout=self.patience_seconds))

    async def reject_group(self, epoch: int, group_id: str, message: str) -> None:
        """Set a group aside that cannot be trained on; draw the step again afterwards."""
        request = replay_pb2.RejectGroupRequest(run=self.run, epoch=epoch, group_id=group_id, message=message)
        await self._answered("RejectGroup", lambda: self.stub.RejectGroup(request, timeout=self.patience_seconds))

    async def create_evaluation(self, epoch: int, evaluation: Evaluation) -> None:
        """Ask for a measurement of one version."""
        request = codec.evaluation_to_proto(evaluation, epoch)
        await self._answered(
            "CreateEvaluation", lambda: self.stub.CreateEvaluation(request, timeout=self.patience_seconds)
        )

    async def await_evaluation(self, evaluation_id: str, wait_seconds: float) -> EvaluationResult:
        """Wait for an evaluation; `complete` says whether it has ended."""
        request = replay_pb2.AwaitEvaluationRequest(
            run=self.run, evaluation_id=evaluation_id, wait=codec.duration_to_proto(wait_seconds)
        )
        with mapped_errors(f"AwaitEvaluation at {self.address}"):
            reply = await self.stub.AwaitEvaluation(request, timeout=wait_seconds + _MARGIN_SECONDS)
        return EvaluationResult(reply.complete, tuple(reply.rewards), reply.failed)

    async def finish_run(self, epoch: int) -> None:
        """End the run; what is still live is dropped with reason run_end."""
        request = replay_pb2.FinishRunRequest(run=self.run, epoch=epoch)
        await self._answered("FinishRun", lambda: self.stub.FinishRun(request, timeout=self.patience_seconds))

    async def _answered(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        """The answer to a call that may be repeated, once the buffer has room for what it decides."""
        give_up_at = time.monotonic() + _FULL_PATIENCE_SECONDS
        while True:
            try:
                with mapped_errors(f"{name} at {self.address}"):
                    return await call()
            except ExhaustedError as error:
                if time.monotonic() > give_up_at:
                    raise
                await self._leave_alone(error)

    async def _leave_alone(self, error: ExhaustedError) -> None:
        pause_seconds = error.retry_seconds or _RETRY_SECONDS
        log.warning("the replay buffer has no room (%s); calling again in %g s", error.message, pause_seconds)
        await asyncio.sleep(pause_seconds)

    # For the learner and people

    async def servers(self) -> list[ServerStatus]:
        """The run's servers, by name."""
        with mapped_errors(f"ListServers at {self.address}"):
            reply = await self.stub.ListServers(
                replay_pb2.ListServersRequest(run=self.run), timeout=self.patience_seconds
            )
        return [codec.server_status_from_proto(server) for server in reply.servers]

    async def drain_server(
        self, server_id: str, reason: DrainReason, message: str, *, epoch: int = 0, force: bool = False
    ) -> tuple[Drain, int]:
        """Take a server out of the run; returns the drain that stands, and how many groups this call dropped.

        Raises:
            PreconditionError: no other server is at work, and `force` is not set.
            FencedError: `epoch` is that of an older learner.
        """
        request = replay_pb2.DrainServerRequest(
            run=self.run,
            server_id=server_id,
            reason=int(reason),  # type: ignore[arg-type]
            message=message,
            epoch=epoch,
            force=force,
        )
        with mapped_errors(f"DrainServer at {self.address}"):
            reply = await self.stub.DrainServer(request, timeout=self.patience_seconds)
        return codec.drain_from_proto(reply.drain), reply.dropped_count

    async def readmit_server(self, server_id: str) -> bool:
        """Let a drained server work again; returns whether it was drained."""
        request = replay_pb2.ReadmitServerRequest(run=self.run, server_id=server_id)
        with mapped_errors(f"ReadmitServer at {self.address}"):
            reply = await self.stub.ReadmitServer(request, timeout=self.patience_seconds)
        return reply.readmitted

    # For people and tools

    async def rollback_run(self, version: PolicyVersion) -> tuple[int, int]:
        """Return the run to an older version; returns the raised epoch and the number of groups dropped."""
        request = replay_pb2.RollbackRunRequest(run=self.run, version=codec.version_to_proto(version))
        with mapped_errors(f"RollbackRun at {self.address}"):
            reply = await self.stub.RollbackRun(request, timeout=self.patience_seconds)
        return reply.epoch, reply.dropped_count

    async def give_up_run(self) -> int:
        """End the run for good, whoever is at work on it; returns the number of groups dropped, 0 when it had ended."""
        request = replay_pb2.FinishRunRequest(run=self.run, give_up=True)
        with mapped_errors(f"FinishRun at {self.address}"):
            reply = await self.stub.FinishRun(request, timeout=self.patience_seconds)
        return reply.dropped_count

    async def dead_letters(self, limit: int = 0) -> list[DeadLetter]:
        """Groups that were set aside and whose tasks nobody queued again, oldest first; `limit` keeps the newest."""
        with mapped_errors(f"ListDeadLetters at {self.address}"):
            reply = await self.stub.ListDeadLetters(
                replay_pb2.ListDeadLettersRequest(run=self.run, limit=limit), timeout=self.patience_seconds
            )
        return [codec.letter_from_proto(letter) for letter in reply.letters]

    async def requeue_dead_letters(self, group_ids: Sequence[str] = ()) -> int:
        """Queue the tasks of dead letters again, of all when none is named; returns how many."""
        request = replay_pb2.RequeueDeadLettersRequest(run=self.run, group_ids=group_ids)
        with mapped_errors(f"RequeueDeadLetters at {self.address}"):
            reply = await self.stub.RequeueDeadLetters(request, timeout=self.patience_seconds)
        return reply.requeued_count

    async def run_status(self) -> RunStatus:
        """Counts and versions, as of now."""
        with mapped_errors(f"GetRunStatus at {self.address}"):
            reply = await self.stub.GetRunStatus(
                replay_pb2.GetRunStatusRequest(run=self.run), timeout=self.patience_seconds
            )
        return codec.status_from_proto(reply)

    async def back_up(self, directory: str) -> int:
        """Copy the log to a new folder of the buffer's host; returns the copy's size in bytes."""
        with mapped_errors(f"BackUp at {self.address}"):
            reply = await self.stub.BackUp(
                replay_pb2.BackUpRequest(directory=directory), timeout=self.patience_seconds * 10
            )
        return reply.size_bytes

    async def export_groups(
        self,
        *,
        purpose: Purpose | None = None,
        state: GroupState | None = None,
        step: int = 0,
        limit: int = 0,
    ) -> AsyncIterator[GroupRecord]:
        """Groups with their fate, in the order of their issue; `limit` keeps the newest."""
        request = replay_pb2.ExportGroupsRequest(
            run=self.run,
            purpose=purpose or 0,  # type: ignore[arg-type]
            state=state or 0,  # type: ignore[arg-type]
            step=step,
            limit=limit,
        )
        with mapped_errors(f"ExportGroups at {self.address}"):
            pieces: list[replay_pb2.GroupPiece] = []
            async for reply in self.stub.ExportGroups(request, timeout=self.patience_seconds * 10):
                for piece in reply.pieces:
                    if piece.WhichOneof("piece") == "group" and pieces:
                        for record in assemble_records(pieces):
                            yield record
                        pieces = []
                    pieces.append(piece)
            for record in assemble_records(pieces):
                yield record

    def write_stream(self, requests: AsyncIterator[replay_pb2.WriteTrajectoriesRequest]) -> _WriteCall:
        """One WriteTrajectories stream; driven by the rollout worker."""
        return self.stub.WriteTrajectories(requests)


_WriteCall = grpc.aio.StreamStreamCall[replay_pb2.WriteTrajectoriesRequest, replay_pb2.WriteTrajectoriesResponse]
