"""What the learner asks of the replay buffer. Every call may be repeated, and waits while there is no room."""

from __future__ import annotations

import time
from collections.abc import Sequence

from leeway import codec
from leeway.errors import ExhaustedError, UnavailableError
from leeway.replay_client.connection import MARGIN_SECONDS, Connection
from leeway.rpc import mapped_errors
from leeway.trajectory.assembly import assemble_groups
from leeway.types import (
    Evaluation,
    EvaluationResult,
    OpenedRun,
    PolicyVersion,
    RunSpec,
    TrajectoryGroup,
)
from leeway.v1 import replay_pb2


class LearnerCalls(Connection):
    """Opening a run, drawing, advancing, committing, measuring, finishing."""

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
        reply = await self.answered("OpenRun", lambda: self.stub.OpenRun(request, timeout=self.patience_seconds))
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
                await self.leave_alone(error)
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
        await self.answered("Advance", lambda: self.stub.Advance(request, timeout=self.patience_seconds))

    async def commit(self, epoch: int, step: int, oldest_kept_step: int = 0) -> None:
        """A checkpoint of `step` is durable: its groups are consumed for good.

        Of the oldest checkpoint that is kept depends what may be retired; 0 keeps everything.
        """
        request = replay_pb2.CommitRequest(run=self.run, epoch=epoch, step=step, oldest_kept_step=oldest_kept_step)
        await self.answered("Commit", lambda: self.stub.Commit(request, timeout=self.patience_seconds))

    async def reject_group(self, epoch: int, group_id: str, message: str) -> None:
        """Set a group aside that cannot be trained on; draw the step again afterwards."""
        request = replay_pb2.RejectGroupRequest(run=self.run, epoch=epoch, group_id=group_id, message=message)
        await self.answered("RejectGroup", lambda: self.stub.RejectGroup(request, timeout=self.patience_seconds))

    async def create_evaluation(self, epoch: int, evaluation: Evaluation) -> None:
        """Ask for a measurement of one version."""
        request = codec.evaluation_to_proto(evaluation, epoch)
        await self.answered(
            "CreateEvaluation", lambda: self.stub.CreateEvaluation(request, timeout=self.patience_seconds)
        )

    async def await_evaluation(self, evaluation_id: str, wait_seconds: float) -> EvaluationResult:
        """Wait for an evaluation; `complete` says whether it has ended."""
        request = replay_pb2.AwaitEvaluationRequest(
            run=self.run, evaluation_id=evaluation_id, wait=codec.duration_to_proto(wait_seconds)
        )
        with mapped_errors(f"AwaitEvaluation at {self.address}"):
            reply = await self.stub.AwaitEvaluation(request, timeout=wait_seconds + MARGIN_SECONDS)
        return EvaluationResult(reply.complete, tuple(reply.rewards), reply.failed)

    async def finish_run(self, epoch: int) -> None:
        """End the run; what is still live is dropped with reason run_end."""
        request = replay_pb2.FinishRunRequest(run=self.run, epoch=epoch)
        await self.answered("FinishRun", lambda: self.stub.FinishRun(request, timeout=self.patience_seconds))
