"""The learner's loop.

    replay buffer ── DrawBatch(step) ──> groups ──> trainer.train_step ──> Advance ──> publisher ──> servers
          ▲                                                                  │
          └── Commit(step) <── checkpoint, every few steps <─────────────────┘

    waits for    whole groups of the next step (the draw blocks in the buffer)
    unblocks     admission in the buffer (Advance moves the head), servers (publish)
    order        draw, train, Advance, publish; a checkpoint holds only advanced steps; commit comes after it is durable

Training runs in a thread, so that weights are served and evaluations awaited meanwhile. A checkpoint is copied between
two steps and written while the next ones are trained; its commit follows when it is durable. An evaluation pins a
version: it holds back newer ones until its tickets are done, while training goes on as far as the bound lets it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from learner.errors import UnusableGroupError
from learner.fleet.watch import FleetWatch, Verdict
from learner.options import LearnerOptions
from learner.records.checkpoint import Branch, Checkpoint, CheckpointStore, LedgerStep, PendingCheckpoint
from learner.records.journal import Journal
from learner.records.policy_logprobs import write_policy_logprobs
from learner.records.receipts import ReceiptBook, make_receipt
from learner.records.summary import merge_intervals
from learner.staleness import token_staleness
from learner.trainer import FinishSave, StepResult, Trainer
from learner.weights.publisher import Publisher
from leeway.config import EvaluationOptions
from leeway.errors import DeadlineError, LeewayError
from leeway.metrics import STALENESS_BUCKETS, LearnerMetrics
from leeway.process import unless_stopped
from leeway.replay_client import ReplayClient
from leeway.rpc import cancel_and_wait
from leeway.types import DropReason, Evaluation, PolicyVersion, RunSpec, RunStatus, TrajectoryGroup, WeightSnapshot
from leeway.weights import weights_digest

log = logging.getLogger(__name__)
T = TypeVar("T")

_LAST_EVALUATION_SECONDS: Final = 2.0
"""How long a stopping learner waits for an evaluation in flight."""
_LAST_CHECKPOINT_SECONDS: Final = 60.0
"""How long a failing learner waits for a checkpoint on its way."""
LAST_ANSWER_SECONDS: Final = 3.0
"""How long a stopping learner waits for an answer of the buffer, which may have stopped before it."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What the loop joins together."""

    trainer: Trainer
    buffer: ReplayClient
    publisher: Publisher
    checkpoints: CheckpointStore
    metrics: LearnerMetrics
    receipts: ReceiptBook
    run_directory: Path


class Learner:
    """One incarnation of the learner of one run."""

    def __init__(
        self,
        parts: Parts,
        spec: RunSpec,
        options: LearnerOptions,
        evaluation: EvaluationOptions,
        journal: Journal,
        restored: Checkpoint,
    ) -> None:
        self._parts = parts
        self._spec = spec
        self._options = options
        self._evaluation = evaluation
        self._journal = journal
        self._epoch = 0
        self._head = restored.version
        self._ledger: list[LedgerStep] = list(restored.ledger)  # steps whose commit was not confirmed
        self._branches: list[Branch] = list(restored.branches)
        self._checkpointed_step = restored.version.step
        self._evaluating: asyncio.Task[None] | None = None
        self._saving: asyncio.Task[None] | None = None  # the checkpoint on its way
        self._fleet: FleetWatch | None = None  # once the run is open
        self._watching: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()  # becomes the one that `run` is given
        elapsed = max((record["elapsed_seconds"] for record in journal.records), default=0.0)
        self._clock_started = time.monotonic() - elapsed

    @property
    def opened(self) -> bool:
        """Whether the replay buffer knows this incarnation."""
        return self._epoch > 0

    @property
    def epoch(self) -> int:
        """Of this incarnation; 0 until the run is open."""
        return self._epoch

    @property
    def step(self) -> int:
        """The newest trained step."""
        return self._head.step

    async def run(self, stop: asyncio.Event) -> bool:
        """Train until the last step or until `stop`; returns whether the run is finished.

        However it ends, what was trained is in a durable, committed checkpoint.
        """
        self._stop = stop
        try:
            return await self._run(stop)
        finally:
            if self._watching is not None:
                await cancel_and_wait(self._watching)
            await self._leave_checkpoint()

    async def _run(self, stop: asyncio.Event) -> bool:
        opened = await unless_stopped(
            stop, self._parts.buffer.open_run(self._spec, self._head, self._ledger, secrets.token_bytes(16))
        )
        if opened is None:
            return False
        if opened.finished:
            return True
        self._epoch = opened.epoch
        self._ledger = []
        self._branches.append((opened.epoch, self._head.step))
        self._parts.metrics.epoch.set(opened.epoch)
        log.info("epoch %d opens the run at step %d of %d", self._epoch, self._head.step, self._spec.total_steps)
        self._fleet = FleetWatch(
            self._parts.buffer, self._epoch, self._options.fleet, self._parts.metrics, self._record_drained
        )
        self._watching = asyncio.create_task(self._fleet.run(), name="fleet watch")
        await self._publish()
        await self._evaluate_if_due()
        while self._head.step < self._spec.total_steps:
            groups = await self._draw(self._head.step + 1, stop)
            if groups is None:
                return await self._stop_early()
            if not await self._train(groups):
                continue  # a group was set aside: draw the step again
            await self._checkpoint_if_due()
            await self._evaluate_if_due()
            if stop.is_set():
                return await self._stop_early()
        await self._checkpoint()
        await self._checkpoint_is_durable()
        if not await self._finish_evaluation():
            return await self._stop_early()
        await self._answered(self._parts.buffer.finish_run(self._epoch))
        return True

    async def _draw(self, step: int, stop: asyncio.Event) -> list[TrajectoryGroup] | None:
        """The step's groups, or None when `stop` came first."""
        began = time.monotonic()
        draw = self._parts.buffer.draw_batch(self._epoch, step, self._options.draw_timeout_seconds)
        try:
            groups = await unless_stopped(stop, draw)
        except DeadlineError as error:
            raise DeadlineError(await self._name_blocker(step)) from error
        self._batch_wait_seconds = time.monotonic() - began
        return groups

    async def _name_blocker(self, step: int) -> str:
        status = await self._parts.buffer.run_status()
        servers = ", ".join(
            f"{name} at {version or 'no version'}" for name, version in self._parts.publisher.servers.items()
        )
        return (
            f"no batch for step {step} within {self._options.draw_timeout_seconds:g} s: "
            f"{status.ready} groups are ready and {status.open} open, {self._spec.groups_per_step} are needed; "
            f"{_filtered(status)}"
            f"connected servers: {servers or 'none'}"
        )

    async def _train(self, groups: Sequence[TrajectoryGroup]) -> bool:
        """One step: train, advance, publish, record. False when a group had to be set aside."""
        step = self._head.step + 1
        wall_began, began = time.time(), time.monotonic()
        try:
            result = await asyncio.to_thread(self._parts.trainer.train_step, step, groups, tuple(self._branches))
        except UnusableGroupError as error:
            log.error("group %s is set aside: %s", error.group_id, error.message)
            self._parts.metrics.rejected_groups.inc()
            await self._answered(self._parts.buffer.reject_group(self._epoch, error.group_id, error.message))
            return False
        step_seconds = time.monotonic() - began
        staleness = token_staleness(groups, self._head.step, self._branches)
        if self._fleet is not None:
            self._fleet.trained(groups, result.policy_logprobs, self._head.step, self._branches)
        parent = self._head
        await self._advance(step)
        self._write_receipt(parent, groups, result)
        self._ledger.append((step, tuple(group.group_id for group in groups)))
        if step % self._options.publish_every == 0 or step == self._spec.total_steps or self._evaluation_due(step):
            await self._publish()
        if self._options.record_policy_logprobs:
            write_policy_logprobs(self._parts.run_directory, step, result.policy_logprobs)
        self._record(
            {
                "kind": "step",
                "step": step,
                "version": str(self._head),
                **result.statistics,
                "staleness_histogram": {str(key): count for key, count in sorted(staleness.items())},
                "batch_wait_seconds": self._batch_wait_seconds,
                "step_seconds": step_seconds,
                "training_interval": [wall_began, wall_began + step_seconds],
                "generation_intervals": _generation_intervals(groups),
            }
        )
        self._observe(step, result, staleness, step_seconds)
        return True

    def _write_receipt(self, parent: PolicyVersion, groups: Sequence[TrajectoryGroup], result: StepResult) -> None:
        receipts, manifest = self._parts.receipts, self._current_snapshot().manifest
        receipts.append(
            make_receipt(receipts.options, self._branches, parent, self._head, groups, result.statistics, manifest)
        )

    def _observe(self, step: int, result: StepResult, staleness: Counter[int], step_seconds: float) -> None:
        metrics = self._parts.metrics
        metrics.step.set(step)
        metrics.step_seconds.observe(step_seconds)
        metrics.batch_wait_seconds.observe(self._batch_wait_seconds)
        for name, value in result.statistics.items():
            metrics.statistic.labels(name).set(value)
        for steps, num_tokens in staleness.items():
            bucket = max(bound for bound in STALENESS_BUCKETS if bound <= steps)
            metrics.trained_tokens.labels(str(bucket)).inc(num_tokens)

    async def _advance(self, step: int) -> None:
        manifest, buffers = await asyncio.to_thread(self._parts.trainer.published)
        version = PolicyVersion(self._spec.run, self._epoch, step, weights_digest(manifest))
        await self._answered(self._parts.buffer.advance(self._epoch, version, self._head))
        self._head = version
        self._snapshot = WeightSnapshot(version, self._epoch, manifest, buffers)

    async def _publish(self) -> None:
        """Announce the head."""
        await self._parts.publisher.publish(self._current_snapshot())

    def _current_snapshot(self) -> WeightSnapshot:
        if self._snapshot is None or self._snapshot.version != self._head:
            manifest, buffers = self._parts.trainer.published()
            self._snapshot = WeightSnapshot(self._head, self._epoch, manifest, buffers)
        return replace(self._snapshot, publisher_epoch=self._epoch)

    _snapshot: WeightSnapshot | None = None
    _batch_wait_seconds = 0.0

    # Checkpoints

    async def _checkpoint_if_due(self) -> None:
        if self._head.step % self._options.checkpoint_every_steps == 0:
            await self._checkpoint()

    async def _checkpoint(self) -> None:
        """Begin to make the head durable; training may go on meanwhile. One checkpoint is on its way at a time."""
        if self._checkpointed_step == self._head.step:
            return
        await self._checkpoint_is_durable()
        began = time.monotonic()
        self._journal.sync()
        self._parts.receipts.sync()
        pending = self._parts.checkpoints.begin(self._head, self._ledger, self._branches)
        finish_save = await asyncio.to_thread(self._parts.trainer.begin_save, pending.partial)
        self._checkpointed_step = self._head.step
        self._saving = asyncio.create_task(self._commit(pending, finish_save, began))

    async def _commit(self, pending: PendingCheckpoint, finish_save: FinishSave, began: float) -> None:
        """Once a checkpoint is durable, tell the buffer that its groups are consumed."""

        def finish() -> None:
            finish_save()
            self._parts.checkpoints.finish(pending)

        await asyncio.to_thread(finish)
        step = pending.version.step
        kept_step = await asyncio.to_thread(self._parts.checkpoints.oldest_kept_step)
        await self._answered(self._parts.buffer.commit(self._epoch, step, kept_step))
        self._ledger = [entry for entry in self._ledger if entry[0] > step]
        await asyncio.to_thread(self._parts.checkpoints.remove_old)
        self._parts.metrics.checkpoint_seconds.observe(time.monotonic() - began)

    async def _checkpoint_is_durable(self) -> None:
        """Wait for the checkpoint on its way, if there is one."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            await saving

    async def _leave_checkpoint(self) -> None:
        """After an error: let the checkpoint on its way end, so that the next incarnation need not repeat its steps."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        await asyncio.wait([saving], timeout=_LAST_CHECKPOINT_SECONDS)
        await cancel_and_wait(saving)

    async def _stop_early(self) -> bool:
        """A clean stop: a checkpoint now; an evaluation in flight gets a moment to end."""
        await self._checkpoint()
        await self._checkpoint_is_durable()
        if self._evaluating is not None:
            await asyncio.wait([self._evaluating], timeout=_LAST_EVALUATION_SECONDS)
            await cancel_and_wait(self._evaluating)
        return False

    # Evaluation

    def _evaluation_due(self, step: int) -> bool:
        if not self._evaluation.tasks:
            return False
        every = self._evaluation.every_steps
        return step in (0, self._spec.total_steps) or (every > 0 and step % every == 0)

    async def _evaluate_if_due(self) -> None:
        step = self._head.step
        if not self._evaluation_due(step):
            return
        if any(record["kind"] == "evaluation" and record["step"] == step for record in self._journal.records):
            return
        if not await self._finish_evaluation():
            return
        evaluation = Evaluation(
            evaluation_id=f"{self._head.epoch}.{step}",
            version=self._head,
            task_count=self._evaluation.tasks,
            members=self._evaluation.members,
            sampling=self._spec.sampling,
        )
        self._parts.publisher.hold()
        await self._answered(self._parts.buffer.create_evaluation(self._epoch, evaluation))
        self._evaluating = asyncio.create_task(self._evaluate(evaluation))

    async def _evaluate(self, evaluation: Evaluation) -> None:
        try:
            result = await self._parts.buffer.await_evaluation(
                evaluation.evaluation_id, self._options.evaluation_timeout_seconds
            )
        except LeewayError as error:
            log.error("evaluation of step %d is lost: %s", evaluation.version.step, error.message)
            return
        finally:
            await self._parts.publisher.release()
        if not result.complete or not result.rewards:
            log.error(
                "evaluation of step %d gave %d rewards of %d within %g s; it is left out of the curve",
                evaluation.version.step,
                len(result.rewards),
                evaluation.task_count * evaluation.members,
                self._options.evaluation_timeout_seconds,
            )
            return
        mean = sum(result.rewards) / len(result.rewards)
        self._parts.metrics.heldout_reward.set(mean)
        self._record(
            {
                "kind": "evaluation",
                "step": evaluation.version.step,
                "version": str(evaluation.version),
                "reward_mean": mean,
                "draws": len(result.rewards),
                "failed": result.failed,
            }
        )

    async def _finish_evaluation(self) -> bool:
        """Wait for the evaluation in flight; false when a stop comes first."""
        if self._evaluating is not None:
            if await unless_stopped(self._stop, _ended(self._evaluating)) is None:
                return False
            self._evaluating = None
        return True

    async def _answered(self, call: Coroutine[Any, Any, None]) -> None:
        """Wait for an answer of the buffer, but not for long once a stop is asked for.

        Raises:
            DeadlineError: the buffer is gone as well. Nothing beyond the newest checkpoint counts.
        """
        answer, stopping = asyncio.create_task(call), asyncio.create_task(self._stop.wait())
        await asyncio.wait([answer, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        _, waiting = await asyncio.wait([answer], timeout=LAST_ANSWER_SECONDS)
        if waiting:
            await cancel_and_wait(answer)
            raise DeadlineError(
                f"stopped without an answer of the replay buffer at {self._parts.buffer.address}; "
                f"the run goes on from its checkpoint of step {self._checkpointed_step}"
            )
        answer.result()

    def _record_drained(self, verdict: Verdict) -> None:
        self._record(
            {
                "kind": "drain",
                "step": self._head.step,
                "server": verdict.server_id,
                "reason": verdict.reason.name.lower(),
                "message": verdict.message,
            }
        )

    def _record(self, record: dict[str, Any]) -> None:
        self._journal.append({**record, "elapsed_seconds": time.monotonic() - self._clock_started})


async def _ended(task: asyncio.Task[None]) -> bool:
    await asyncio.wait([task])
    return True


def _filtered(status: RunStatus) -> str:
    dropped = status.dropped.get(DropReason.NO_SIGNAL, 0)
    return f"{dropped} of {status.issued} groups had equal rewards and were dropped; " if dropped else ""


def _generation_intervals(groups: Sequence[TrajectoryGroup]) -> list[tuple[float, float]]:
    """When the batch's tokens were sampled, by the engines' clocks: disjoint [start, end) in Unix seconds."""
    return merge_intervals(
        [
            (trajectory.generation_started_at.timestamp(), trajectory.generation_finished_at.timestamp())
            for group in groups
            for trajectory in group.trajectories
        ]
    )
