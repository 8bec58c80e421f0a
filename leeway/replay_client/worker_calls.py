"""What a rollout worker asks of the replay buffer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import grpc

from leeway import codec
from leeway.replay_client.connection import MARGIN_SECONDS, Connection
from leeway.rpc import mapped_errors
from leeway.types import (
    Drain,
    ModelSignature,
    PolicyVersion,
    RunSpec,
    Ticket,
)
from leeway.v1 import replay_pb2

WriteCall = grpc.aio.StreamStreamCall[replay_pb2.WriteTrajectoriesRequest, replay_pb2.WriteTrajectoriesResponse]


@dataclass(frozen=True, slots=True)
class Work:
    """An answer to a server that asked for work."""

    tickets: list[Ticket]
    finished: bool  # the run; stop asking
    drained: Drain | None  # set while this server gets nothing


class WorkerCalls(Connection):
    """Joining, tickets, leases, the write stream."""

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
            reply = await self.stub.JoinRun(request, timeout=wait_seconds + MARGIN_SECONDS)
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
            reply = await self.stub.AcquireTickets(request, timeout=wait_seconds + MARGIN_SECONDS)
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

    def write_stream(self, requests: AsyncIterator[replay_pb2.WriteTrajectoriesRequest]) -> WriteCall:
        """One WriteTrajectories stream; driven by the rollout worker."""
        return self.stub.WriteTrajectories(requests)
