"""The replay buffer as its callers see it: dataclasses in, dataclasses out, LeewayErrors for failures.

Each process has one `ReplayClient`. A unary call waits for the connection and repeats while the buffer restarts, up to
`patience_seconds`. The learner's calls may all be repeated, so they also wait while the buffer has no room (its disk is
full); the buffer says when to come back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Final, TypeVar

import grpc.aio
from google.protobuf.message import Message

from leeway import codec
from leeway.errors import ExhaustedError, UnavailableError
from leeway.rpc import Backoff, Security, mapped_errors, open_channel
from leeway.trajectory.assembly import assemble_groups, assemble_records
from leeway.types import (
    AcquiredTickets,
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
    TrajectoryGroup,
)
from leeway.v1 import replay_pb2, replay_pb2_grpc

_MARGIN_SECONDS: Final = 10.0
"""Added to a call's own wait, so that the server's answer wins over the client's deadline."""
_FULL_PATIENCE_SECONDS: Final = 6 * 3600.0
"""How long the learner's calls wait for room."""
_PAUSE_SECONDS: Final = 2.0
"""Pause before a call is repeated that the buffer had no room for, unless it says how long."""
_BULK_PATIENCE: Final = 10
"""Backups and exports may take so many times `patience_seconds`."""

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

log = logging.getLogger(__name__)


class ReplayClient:
    """A connection to one replay buffer for one run, with every call.

    Args:
        address: host:port of the replay buffer.
        run: whose calls these are.
        security: certificates, if any.
        patience_seconds: how long a call waits while the buffer is away.
    """

    def __init__(self, address: str, run: str, security: Security, *, patience_seconds: float = 60.0) -> None:
        self.address = address
        self.run = run
        self.patience_seconds = patience_seconds
        self._channel = open_channel(address, security)
        self.stub: replay_pb2_grpc.ReplayServiceAsyncStub = replay_pb2_grpc.ReplayServiceStub(self._channel)

    async def aclose(self) -> None:
        await self._channel.close()

    # For rollout workers, which write through `stub.WriteTrajectories`

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
        reply = await self._call(self.stub.JoinRun, request, wait_seconds + _MARGIN_SECONDS)
        return codec.spec_from_proto(reply.spec), reply.finished

    async def acquire_tickets(
        self, server_id: str, version: PolicyVersion, max_members: int, wait_seconds: float
    ) -> AcquiredTickets:
        """Wait for tickets; there may be none."""
        request = replay_pb2.AcquireTicketsRequest(
            run=self.run,
            server_id=server_id,
            version=codec.version_to_proto(version),
            max_members=max_members,
            wait=codec.duration_to_proto(wait_seconds),
        )
        reply = await self._call(self.stub.AcquireTickets, request, wait_seconds + _MARGIN_SECONDS)
        tickets = [codec.ticket_from_proto(ticket) for ticket in reply.tickets]
        drained = codec.drain_from_proto(reply.drained) if reply.HasField("drained") else None
        return AcquiredTickets(tickets, reply.finished, drained)

    async def leave_run(self, server_id: str) -> None:
        """The server leaves: the tickets that it holds can go to others at once."""
        await self._call(self.stub.LeaveRun, replay_pb2.LeaveRunRequest(run=self.run, server_id=server_id))

    async def renew_leases(self, server_id: str, tickets: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        """Extend the leases of (group id, attempt); returns those that no longer stand."""
        request = replay_pb2.RenewLeasesRequest(
            run=self.run,
            server_id=server_id,
            tickets=[replay_pb2.TicketReference(group_id=group_id, attempt=attempt) for group_id, attempt in tickets],
        )
        reply = await self._call(self.stub.RenewLeases, request)
        return [(ticket.group_id, ticket.attempt) for ticket in reply.aborted]

    # For the learner: every call may be repeated, and waits while there is no room

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
        reply = await self._call_until_room(self.stub.OpenRun, request)
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
                await _wait_for_room(error)
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
        await self._call_until_room(self.stub.Advance, request)

    async def commit(self, epoch: int, step: int, oldest_kept_step: int = 0) -> None:
        """A checkpoint of `step` is durable, so the buffer consumes the groups of every step up to it.

        The step of the oldest checkpoint that is kept decides what may be retired; 0 keeps everything.
        """
        request = replay_pb2.CommitRequest(run=self.run, epoch=epoch, step=step, oldest_kept_step=oldest_kept_step)
        await self._call_until_room(self.stub.Commit, request)

    async def reject_group(self, epoch: int, group_id: str, message: str) -> None:
        """Set a group aside that cannot be trained on; draw the step again afterwards."""
        request = replay_pb2.RejectGroupRequest(run=self.run, epoch=epoch, group_id=group_id, message=message)
        await self._call_until_room(self.stub.RejectGroup, request)

    async def create_evaluation(self, epoch: int, evaluation: Evaluation) -> None:
        """Request a measurement of one version."""
        await self._call_until_room(self.stub.CreateEvaluation, codec.evaluation_to_proto(evaluation, epoch))

    async def await_evaluation(self, evaluation_id: str, wait_seconds: float) -> EvaluationResult:
        """Wait for an evaluation; `complete` says whether it has ended."""
        request = replay_pb2.AwaitEvaluationRequest(
            run=self.run, evaluation_id=evaluation_id, wait=codec.duration_to_proto(wait_seconds)
        )
        reply = await self._call(self.stub.AwaitEvaluation, request, wait_seconds + _MARGIN_SECONDS)
        return EvaluationResult(reply.complete, tuple(reply.rewards), reply.failed)

    async def finish_run(self, epoch: int) -> None:
        """End the run; what is still live is dropped with reason run_end."""
        await self._call_until_room(self.stub.FinishRun, replay_pb2.FinishRunRequest(run=self.run, epoch=epoch))

    # The run's servers: for the learner and operators

    async def servers(self) -> list[ServerStatus]:
        """The run's servers, by name."""
        reply = await self._call(self.stub.ListServers, replay_pb2.ListServersRequest(run=self.run))
        return [codec.server_status_from_proto(server) for server in reply.servers]

    async def drain_server(
        self, server_id: str, reason: DrainReason, message: str, *, epoch: int = 0, force: bool = False
    ) -> tuple[Drain, int]:
        """Take a server out of the run; returns the drain that stands, and how many groups this call dropped.

        Raises:
            PreconditionError: no other server is active, and `force` is not set.
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
        reply = await self._call(self.stub.DrainServer, request)
        return codec.drain_from_proto(reply.drain), reply.dropped_count

    async def readmit_server(self, server_id: str) -> bool:
        """Give a drained server tickets again; returns whether it was drained."""
        request = replay_pb2.ReadmitServerRequest(run=self.run, server_id=server_id)
        return (await self._call(self.stub.ReadmitServer, request)).readmitted

    # For operators and tools

    async def rollback_run(self, version: PolicyVersion) -> tuple[int, int]:
        """Return the run to an older version; returns the raised epoch and the number of groups dropped."""
        request = replay_pb2.RollbackRunRequest(run=self.run, version=codec.version_to_proto(version))
        reply = await self._call(self.stub.RollbackRun, request)
        return reply.epoch, reply.dropped_count

    async def give_up_run(self) -> int:
        """End the run permanently, with or without its learner; returns how many groups this call dropped."""
        request = replay_pb2.FinishRunRequest(run=self.run, give_up=True)
        return (await self._call(self.stub.FinishRun, request)).dropped_count

    async def dead_letters(self, limit: int = 0) -> list[DeadLetter]:
        """Groups that were set aside and whose tasks nobody queued again, oldest first; `limit` keeps the newest."""
        request = replay_pb2.ListDeadLettersRequest(run=self.run, limit=limit)
        reply = await self._call(self.stub.ListDeadLetters, request)
        return [codec.letter_from_proto(letter) for letter in reply.letters]

    async def requeue_dead_letters(self, group_ids: Sequence[str] = ()) -> int:
        """Queue the tasks of dead letters again, of all when none is named; returns how many."""
        request = replay_pb2.RequeueDeadLettersRequest(run=self.run, group_ids=group_ids)
        return (await self._call(self.stub.RequeueDeadLetters, request)).requeued_count

    async def run_status(self) -> RunStatus:
        """Counts and versions, as of now."""
        return codec.status_from_proto(
            await self._call(self.stub.GetRunStatus, replay_pb2.GetRunStatusRequest(run=self.run))
        )

    async def back_up(self, directory: str) -> int:
        """Copy the log to a new folder of the buffer's host; returns the copy's size in bytes."""
        request = replay_pb2.BackUpRequest(directory=directory)
        return (await self._call(self.stub.BackUp, request, self.patience_seconds * _BULK_PATIENCE)).size_bytes

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
            async for reply in self.stub.ExportGroups(request, timeout=self.patience_seconds * _BULK_PATIENCE):
                for piece in reply.pieces:
                    if piece.WhichOneof("piece") == "group" and pieces:
                        for record in assemble_records(pieces):
                            yield record
                        pieces = []
                    pieces.append(piece)
            for record in assemble_records(pieces):
                yield record

    # What the calls share

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        timeout_seconds: float | None = None,
    ) -> Response:
        """One call; its deadline is `patience_seconds` unless another is given."""
        name = type(request).__name__.removesuffix("Request")
        with mapped_errors(f"{name} at {self.address}"):
            return await method(request, timeout=timeout_seconds or self.patience_seconds)

    async def _call_until_room(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Request, Response], request: Request
    ) -> Response:
        """The answer to a call that may be repeated, once the buffer has room for what it decides."""
        give_up_at = time.monotonic() + _FULL_PATIENCE_SECONDS
        while True:
            try:
                return await self._call(method, request)
            except ExhaustedError as error:
                if time.monotonic() > give_up_at:
                    raise
                await _wait_for_room(error)


async def _wait_for_room(error: ExhaustedError) -> None:
    """Wait as long as a buffer without room told its caller to."""
    pause_seconds = Backoff(_PAUSE_SECONDS).next_seconds(error.retry_seconds)
    log.warning("the replay buffer has no room (%s); calling again in %g s", error.message, pause_seconds)
    await asyncio.sleep(pause_seconds)
