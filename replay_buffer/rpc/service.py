"""ReplayService over gRPC: messages in, calls of the buffer, messages out. Write streams: write_stream.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final, cast

import grpc

from leeway import codec
from leeway.errors import InvalidDataError
from leeway.types import DrainReason
from leeway.v1 import replay_pb2, replay_pb2_grpc
from replay_buffer.buffer import ReplayBuffer
from replay_buffer.rpc.response_stream import messages
from replay_buffer.rpc.write_stream import WriteStream
from replay_buffer.rules.groups import Group
from replay_buffer.storage.index_file import Filter

SERVICE_NAME: Final = replay_pb2.DESCRIPTOR.services_by_name["ReplayService"].full_name
_DRAW_WAIT_SECONDS: Final = 3600.0
"""How long a draw without a deadline of its own waits."""
_DEADLINE_MARGIN_SECONDS: Final = 0.2
"""A draw gives up this much before its caller does, so that its explanation arrives."""

_Context = grpc.aio.ServicerContext[Any, Any]


class ReplayService(replay_pb2_grpc.ReplayServiceServicer):
    """See proto/leeway/v1/replay.proto, which says what each call means."""

    def __init__(self, buffer: ReplayBuffer) -> None:
        self._buffer = buffer
        self._write_streams: set[WriteStream] = set()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        replay_pb2_grpc.add_ReplayServiceServicer_to_server(self, server)
        # Bulk data is read and made as it lies on the wire.
        streams: dict[str, Any] = {
            "WriteTrajectories": grpc.stream_stream_rpc_method_handler(self.WriteTrajectories),
            "DrawBatch": grpc.unary_stream_rpc_method_handler(
                self.DrawBatch, request_deserializer=replay_pb2.DrawBatchRequest.FromString
            ),
            "ExportGroups": grpc.unary_stream_rpc_method_handler(
                self.ExportGroups, request_deserializer=replay_pb2.ExportGroupsRequest.FromString
            ),
        }
        registered: Any = server
        registered.add_registered_method_handlers(SERVICE_NAME, streams)

    def stop(self) -> None:
        """End write streams after what was read so far; their clients go on elsewhere or later."""
        for stream in self._write_streams:
            stream.stop()

    # The learner's calls

    async def OpenRun(self, request: replay_pb2.OpenRunRequest, context: _Context) -> replay_pb2.OpenRunResponse:
        opened = await self._buffer.open_run(
            codec.spec_from_proto(request.spec),
            codec.version_from_proto(request.checkpoint),
            [(entry.step, tuple(entry.group_ids)) for entry in request.ledger],
            request.incarnation,
        )
        return replay_pb2.OpenRunResponse(
            epoch=opened.epoch, head=codec.version_to_proto(opened.head), finished=opened.finished
        )

    async def DrawBatch(self, request: replay_pb2.DrawBatchRequest, context: _Context) -> AsyncIterator[Any]:
        world_size = request.world_size or 1
        if request.rank >= world_size:
            raise InvalidDataError(f"rank {request.rank} does not exist among {world_size}")
        groups = await self._buffer.draw(request.run, request.epoch, request.step, _deadline(context))
        async with aclosing(self._streamed(groups[request.rank :: world_size])) as replies:
            async for reply in replies:
                yield reply

    async def Advance(self, request: replay_pb2.AdvanceRequest, context: _Context) -> replay_pb2.AdvanceResponse:
        version, parent = codec.version_from_proto(request.version), codec.version_from_proto(request.parent)
        await self._buffer.advance(request.run, request.epoch, version, parent)
        return replay_pb2.AdvanceResponse()

    async def Commit(self, request: replay_pb2.CommitRequest, context: _Context) -> replay_pb2.CommitResponse:
        await self._buffer.commit(request.run, request.epoch, request.step, request.oldest_kept_step)
        return replay_pb2.CommitResponse()

    async def RejectGroup(
        self, request: replay_pb2.RejectGroupRequest, context: _Context
    ) -> replay_pb2.RejectGroupResponse:
        await self._buffer.reject_group(request.run, request.epoch, request.group_id, request.message)
        return replay_pb2.RejectGroupResponse()

    async def CreateEvaluation(
        self, request: replay_pb2.CreateEvaluationRequest, context: _Context
    ) -> replay_pb2.CreateEvaluationResponse:
        evaluation = codec.evaluation_from_proto(request)
        if evaluation.version.run != request.run:
            raise InvalidDataError(f"run {request.run!r} cannot measure {evaluation.version} of another run")
        await self._buffer.create_evaluation(request.epoch, evaluation)
        return replay_pb2.CreateEvaluationResponse()

    async def AwaitEvaluation(
        self, request: replay_pb2.AwaitEvaluationRequest, context: _Context
    ) -> replay_pb2.AwaitEvaluationResponse:
        result = await self._buffer.await_evaluation(
            request.run, request.evaluation_id, codec.seconds_from_proto(request.wait)
        )
        return replay_pb2.AwaitEvaluationResponse(
            complete=result.complete, rewards=result.rewards, failed=result.failed
        )

    async def FinishRun(self, request: replay_pb2.FinishRunRequest, context: _Context) -> replay_pb2.FinishRunResponse:
        if request.give_up:
            dropped = await self._buffer.give_up_run(request.run)
        else:
            dropped = await self._buffer.finish_run(request.run, request.epoch)
        return replay_pb2.FinishRunResponse(dropped_count=dropped)

    # The workers' calls

    async def JoinRun(self, request: replay_pb2.JoinRunRequest, context: _Context) -> replay_pb2.JoinRunResponse:
        spec, finished = await self._buffer.join_run(
            request.run,
            request.server_id,
            codec.signature_from_proto(request.signature),
            request.dataset_digest,
            codec.seconds_from_proto(request.wait),
        )
        return replay_pb2.JoinRunResponse(spec=codec.spec_to_proto(spec), finished=finished)

    async def AcquireTickets(
        self, request: replay_pb2.AcquireTicketsRequest, context: _Context
    ) -> replay_pb2.AcquireTicketsResponse:
        tickets, finished, drain = await self._buffer.acquire_tickets(
            request.run,
            request.server_id,
            codec.version_from_proto(request.version),
            request.max_members,
            codec.seconds_from_proto(request.wait),
        )
        return replay_pb2.AcquireTicketsResponse(
            tickets=[codec.ticket_to_proto(ticket) for ticket in tickets],
            finished=finished,
            drained=None if drain is None else codec.drain_to_proto(drain),
        )

    async def LeaveRun(self, request: replay_pb2.LeaveRunRequest, context: _Context) -> replay_pb2.LeaveRunResponse:
        await self._buffer.leave_run(request.run, request.server_id)
        return replay_pb2.LeaveRunResponse()

    async def RenewLeases(
        self, request: replay_pb2.RenewLeasesRequest, context: _Context
    ) -> replay_pb2.RenewLeasesResponse:
        aborted = await self._buffer.renew_leases(
            request.run, [(ticket.group_id, ticket.attempt) for ticket in request.tickets], request.server_id
        )
        return replay_pb2.RenewLeasesResponse(
            aborted=[replay_pb2.TicketReference(group_id=group_id, attempt=attempt) for group_id, attempt in aborted]
        )

    async def WriteTrajectories(self, request_iterator: AsyncIterator[Any], context: _Context) -> AsyncIterator[Any]:
        stream = WriteStream(self._buffer, request_iterator)
        self._write_streams.add(stream)
        try:
            async with aclosing(stream.answers()) as answers:
                async for answer in answers:
                    yield answer
        finally:
            self._write_streams.discard(stream)

    # For the learner and people

    async def DrainServer(
        self, request: replay_pb2.DrainServerRequest, context: _Context
    ) -> replay_pb2.DrainServerResponse:
        drain, dropped = await self._buffer.drain_server(
            request.run,
            request.server_id,
            codec.enum_from_proto(DrainReason, request.reason),
            request.message,
            epoch=request.epoch,
            force=request.force,
        )
        return replay_pb2.DrainServerResponse(drain=codec.drain_to_proto(drain), dropped_count=dropped)

    async def ReadmitServer(
        self, request: replay_pb2.ReadmitServerRequest, context: _Context
    ) -> replay_pb2.ReadmitServerResponse:
        return replay_pb2.ReadmitServerResponse(
            readmitted=await self._buffer.readmit_server(request.run, request.server_id)
        )

    async def ListServers(
        self, request: replay_pb2.ListServersRequest, context: _Context
    ) -> replay_pb2.ListServersResponse:
        servers = await self._buffer.servers(request.run)
        return replay_pb2.ListServersResponse(servers=[codec.server_status_to_proto(server) for server in servers])

    # For people and tools

    async def RollbackRun(
        self, request: replay_pb2.RollbackRunRequest, context: _Context
    ) -> replay_pb2.RollbackRunResponse:
        epoch, dropped = await self._buffer.rollback_run(request.run, codec.version_from_proto(request.version))
        return replay_pb2.RollbackRunResponse(epoch=epoch, dropped_count=dropped)

    async def ListDeadLetters(
        self, request: replay_pb2.ListDeadLettersRequest, context: _Context
    ) -> replay_pb2.ListDeadLettersResponse:
        letters = await self._buffer.dead_letters(request.run, request.limit)
        return replay_pb2.ListDeadLettersResponse(letters=[codec.letter_to_proto(letter) for letter in letters])

    async def RequeueDeadLetters(
        self, request: replay_pb2.RequeueDeadLettersRequest, context: _Context
    ) -> replay_pb2.RequeueDeadLettersResponse:
        requeued = await self._buffer.requeue_dead_letters(request.run, list(request.group_ids))
        return replay_pb2.RequeueDeadLettersResponse(requeued_count=requeued)

    async def GetRunStatus(
        self, request: replay_pb2.GetRunStatusRequest, context: _Context
    ) -> replay_pb2.GetRunStatusResponse:
        return codec.status_to_proto(await self._buffer.status(request.run))

    async def BackUp(self, request: replay_pb2.BackUpRequest, context: _Context) -> replay_pb2.BackUpResponse:
        directory = Path(request.directory)
        if not directory.is_absolute():
            raise InvalidDataError(f"a backup needs an absolute path, not {request.directory!r}")
        backup = await self._buffer.back_up(directory)
        return replay_pb2.BackUpResponse(
            generation=backup.generation,
            segment=backup.end.segment,
            offset=backup.end.offset,
            size_bytes=backup.size_bytes,
        )

    async def ExportGroups(self, request: replay_pb2.ExportGroupsRequest, context: _Context) -> AsyncIterator[Any]:
        wanted = Filter(codec.optional_purpose(request.purpose), codec.optional_state(request.state), request.step)
        async for group in self._buffer.export(request.run, wanted, request.limit):
            async with aclosing(self._streamed([group])) as replies:
                async for reply in replies:
                    yield reply

    async def _streamed(self, groups: Sequence[Group]) -> AsyncGenerator[bytes]:
        """Serialized messages, read from disk beside the event loop, one ahead of the network."""
        source = messages(groups, self._buffer.read_many)
        ahead = asyncio.create_task(asyncio.to_thread(next, source, None))
        try:
            while (message := await asyncio.shield(ahead)) is not None:
                ahead = asyncio.create_task(asyncio.to_thread(next, source, None))
                yield message
        finally:
            await asyncio.wait([ahead])  # a thread cannot be cancelled; it reads one message at most
            if not ahead.cancelled():
                ahead.exception()


def _deadline(context: _Context) -> float:
    remaining = cast("float | None", context.time_remaining())  # None without a deadline, whatever the stub says
    wait_seconds = _DRAW_WAIT_SECONDS if remaining is None else max(remaining - _DEADLINE_MARGIN_SECONDS, 0.0)
    return asyncio.get_running_loop().time() + wait_seconds
