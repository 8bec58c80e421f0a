"""The learner's loop.

    replay buffer ── DrawBatch(step) ──> groups ──> trainer.train_step ──> Advance ──> publisher ──> servers
          ▲                                                                  │
          └── Commit(step) <── checkpoint, every few steps <─────────────────┘

    waits for    whole groups of the next step (the draw blocks in the buffer)
    unblocks     admission in the buffer (Advance moves the head), servers (publish)
    order        draw, train, Advance, publish; a checkpoint holds only advanced steps; commit comes after it is durable

Training runs in a thread, so that the event loop goes on to serve weights and to await evaluations. A checkpoint is
copied between two steps and written while the next ones are trained; its commit follows when it is durable. An
evaluation pins a version: it holds back newer ones until its tickets are done, while training goes on as far as the
staleness bound lets it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace

from learner.fleet.watch import FleetWatch
from learner.lineage import Branch, token_staleness
from learner.loop.checkpointing import Checkpointing
from learner.loop.context import Context
from learner.loop.evaluations import Evaluations
from learner.loop.reports import Reports, Trained
from learner.run_artifacts.checkpoint import Checkpoint
from learner.trainer import UnusableGroupError
from leeway.config import EvaluationOptions, LearnerOptions
from leeway.errors import DeadlineError
from leeway.rpc import cancel_and_wait
from leeway.service.process import unless_stopped
from leeway.types import DropReason, PolicyVersion, RunSpec, RunStatus, TrajectoryGroup, WeightSnapshot
from leeway.weights.digests import weights_digest

log = logging.getLogger(__name__)


class Learner:
    """One incarnation of the learner of one run.

    Args:
        context: its trainer holds the weights of `restored`.
        spec: what the run is.
        options: of the learner.
        evaluation: when a version is measured.
        restored: the checkpoint that this incarnation starts from.
    """

    def __init__(
        self,
        context: Context,
        spec: RunSpec,
        options: LearnerOptions,
        evaluation: EvaluationOptions,
        restored: Checkpoint,
    ) -> None:
        self._context = context
        self._spec = spec
        self._options = options
        self._epoch = 0
        self._head = restored.version
        self._restored_ledger = restored.ledger
        self._branches: list[Branch] = list(restored.branches)
        self._snapshot: WeightSnapshot | None = None  # of the head; None until the trainer is asked for it
        self._batch_wait_seconds = 0.0
        self._reports = Reports(context, policy_logprobs=options.record_policy_logprobs)
        self._checkpointing = Checkpointing(context, restored.version.step)
        self._evaluations = Evaluations(context, self._reports, spec, evaluation, options.evaluation_timeout_seconds)
        self._fleet = FleetWatch(
            context.buffer,
            options.fleet,
            context.metrics,
            lambda verdict: self._reports.drained(self._head.step, verdict),
        )

    @property
    def opened(self) -> bool:
        """True once the replay buffer has opened the run for this incarnation."""
        return self._epoch > 0

    @property
    def step(self) -> int:
        """The newest trained step."""
        return self._head.step

    async def run(self) -> bool:
        """Train until the last step or until a stop; returns whether the run is finished.

        However it ends, what was trained is in a durable, committed checkpoint.
        """
        opened = await unless_stopped(
            self._context.stop,
            self._context.buffer.open_run(self._spec, self._head, self._restored_ledger, secrets.token_bytes(16)),
        )
        if opened is None:
            return False
        if opened.finished:
            return True
        self._epoch = opened.epoch
        self._branches.append((opened.epoch, self._head.step))
        self._context.metrics.epoch.set(opened.epoch)
        log.info("epoch %d opens the run at step %d of %d", self._epoch, self._head.step, self._spec.total_steps)
        watching = asyncio.create_task(self._fleet.run(self._epoch), name="fleet watch")
        try:
            return await self._take_all_steps()
        finally:
            await cancel_and_wait(watching)
            await self._checkpointing.leave()

    async def _take_all_steps(self) -> bool:
        await self._publish()
        await self._evaluations.begin_if_due(self._epoch, self._head)
        while self._head.step < self._spec.total_steps:
            groups = await self._draw()
            if groups is None:
                return await self._stop_early()
            if await self._train(groups):
                await self._checkpoint_if_due()
                await self._evaluations.begin_if_due(self._epoch, self._head)
            if self._context.stop.is_set():
                return await self._stop_early()
        await self._checkpoint()
        await self._checkpointing.durable()
        if not await self._evaluations.finished():
            return await self._stop_early()
        await self._context.answered(self._context.buffer.finish_run(self._epoch))
        return True

    async def _stop_early(self) -> bool:
        """A clean stop: a checkpoint now; an evaluation in flight gets a moment to end."""
        await self._checkpoint()
        await self._checkpointing.durable()
        await self._evaluations.give_up()
        return False

    # One step

    async def _draw(self) -> Sequence[TrajectoryGroup] | None:
        """The next step's groups, or None when a stop came first."""
        step, began = self._head.step + 1, time.monotonic()
        draw = self._context.buffer.draw_batch(self._epoch, step, self._options.draw_timeout_seconds)
        try:
            groups = await unless_stopped(self._context.stop, draw)
        except DeadlineError as error:
            raise DeadlineError(await self._name_blocker(step)) from error
        self._batch_wait_seconds = time.monotonic() - began
        return groups

    async def _train(self, groups: Sequence[TrajectoryGroup]) -> bool:
        """One step: train, advance, publish, report. False when a group had to be set aside: draw the step again."""
        trained = await self._take_step(groups)
        if trained is None:
            return False
        parent = self._head
        await self._advance(trained)
        await self._publish_if_due()
        self._reports.stepped(parent, self._head, self._branches, self._current_snapshot().manifest, trained)
        return True

    async def _take_step(self, groups: Sequence[TrajectoryGroup]) -> Trained | None:
        """Train on the groups, or set one aside."""
        step = self._head.step + 1
        started_at, began = time.time(), time.monotonic()
        try:
            result = await asyncio.to_thread(self._context.trainer.train_step, step, groups, tuple(self._branches))
        except UnusableGroupError as error:
            log.error("group %s is set aside: %s", error.group_id, error.message)
            self._context.metrics.rejected_groups.inc()
            rejection = self._context.buffer.reject_group(self._epoch, error.group_id, error.message)
            await self._context.answered(rejection)
            return None
        step_seconds = time.monotonic() - began
        staleness = token_staleness(groups, self._head.step, self._branches)
        self._fleet.trained(groups, result.policy_logprobs, self._head.step, self._branches)
        return Trained(groups, result, staleness, self._batch_wait_seconds, started_at, step_seconds)

    async def _advance(self, trained: Trained) -> None:
        """Register the version that was just trained with the buffer, and make it the head."""
        step = self._head.step + 1
        manifest, buffers = await asyncio.to_thread(self._context.trainer.published)
        version = PolicyVersion(self._spec.run, self._epoch, step, weights_digest(manifest))
        await self._context.answered(self._context.buffer.advance(self._epoch, version, self._head))
        self._head = version
        self._snapshot = WeightSnapshot(version, self._epoch, manifest, buffers)
        self._checkpointing.trained(step, trained.groups)

    async def _publish_if_due(self) -> None:
        step = self._head.step
        if step % self._options.publish_every == 0 or step == self._spec.total_steps or self._evaluations.due(step):
            await self._publish()

    async def _publish(self) -> None:
        """Announce the head."""
        await self._context.publisher.publish(self._current_snapshot())

    def _current_snapshot(self) -> WeightSnapshot:
        if self._snapshot is None or self._snapshot.version != self._head:
            manifest, buffers = self._context.trainer.published()
            self._snapshot = WeightSnapshot(self._head, self._epoch, manifest, buffers)
        return replace(self._snapshot, publisher_epoch=self._epoch)

    async def _checkpoint_if_due(self) -> None:
        if self._head.step % self._options.checkpoint_every_steps == 0:
            await self._checkpoint()

    async def _checkpoint(self) -> None:
        await self._checkpointing.begin(self._epoch, self._head, self._branches)

    async def _name_blocker(self, step: int) -> str:
        """Why no batch came."""
        status = await self._context.buffer.run_status()
        servers = ", ".join(
            f"{name} at {version or 'no version'}" for name, version in self._context.publisher.servers.items()
        )
        return (
            f"no batch for step {step} within {self._options.draw_timeout_seconds:g} s: "
            f"{status.ready} groups are ready and {status.open} open, {self._spec.groups_per_step} are needed; "
            f"{_filtered(status)}"
            f"connected servers: {servers or 'none'}"
        )


def _filtered(status: RunStatus) -> str:
    dropped = status.dropped.get(DropReason.NO_SIGNAL, 0)
    return f"{dropped} of {status.issued} groups had equal rewards and were dropped; " if dropped else ""
