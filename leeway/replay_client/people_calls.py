"""What people and tools ask of the replay buffer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from leeway import codec
from leeway.replay_client.connection import Connection
from leeway.rpc import mapped_errors
from leeway.trajectory.assembly import assemble_records
from leeway.types import (
    DeadLetter,
    GroupRecord,
    GroupState,
    PolicyVersion,
    Purpose,
    RunStatus,
)
from leeway.v1 import replay_pb2


class PeopleCalls(Connection):
    """Rollback, dead letters, status, backups, exports."""

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
