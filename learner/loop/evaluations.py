"""Measurements of a version on held-out tasks, while training goes on.

begin ── hold publication ── CreateEvaluation ──> servers sample at the pinned version ──> rewards ──> journal
             └─────────────── released when the rewards are there, or given up ───────────────┘

waits for    the evaluation before it: one is in flight at a time
unblocks     publication; training itself goes on, as far as the staleness bound lets it
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from learner.loop.context import Context
from learner.loop.reports import Reports
from leeway.config import EvaluationOptions
from leeway.errors import LeewayError
from leeway.rpc import cancel_and_wait
from leeway.service.process import unless_stopped
from leeway.types import Evaluation, PolicyVersion, RunSpec

log = logging.getLogger(__name__)

_LAST_EVALUATION_SECONDS: Final = 2.0
"""How long a stopping learner waits for an evaluation in flight."""


class Evaluations:
    """The evaluations that one epoch asks for.

    Args:
        context: of the loop.
        reports: gets the results.
        spec: says how long the run is, and how it samples.
        options: when, and on how many tasks.
        timeout_seconds: how long servers may take for one.
    """

    def __init__(
        self,
        context: Context,
        reports: Reports,
        spec: RunSpec,
        options: EvaluationOptions,
        timeout_seconds: float,
    ) -> None:
        self._context = context
        self._reports = reports
        self._spec = spec
        self._options = options
        self._timeout_seconds = timeout_seconds
        self._evaluating: asyncio.Task[None] | None = None

    def due(self, step: int) -> bool:
        """True where the version of `step` is to be measured."""
        if not self._options.tasks:
            return False
        every = self._options.every_steps
        return step in (0, self._spec.total_steps) or (every > 0 and step % every == 0)

    async def begin_if_due(self, epoch: int, head: PolicyVersion) -> None:
        """Start the head's evaluation if it is due and has none; the head is published already."""
        if not self.due(head.step) or self._reports.has_evaluation(head.step) or not await self.finished():
            return
        evaluation = Evaluation(
            evaluation_id=f"{head.epoch}.{head.step}",
            version=head,
            task_count=self._options.tasks,
            members=self._options.members,
            sampling=self._spec.sampling,
        )
        self._context.publisher.hold()
        await self._context.answered(self._context.buffer.create_evaluation(epoch, evaluation))
        self._evaluating = asyncio.create_task(self._evaluate(evaluation), name="evaluation")

    async def finished(self) -> bool:
        """Wait for the evaluation in flight; false when a stop comes first."""
        if self._evaluating is not None:
            if await unless_stopped(self._context.stop, _ended(self._evaluating)) is None:
                return False
            self._evaluating = None
        return True

    async def give_up(self) -> None:
        """Before a clean stop: the evaluation in flight gets a moment to end."""
        if self._evaluating is not None:
            await asyncio.wait([self._evaluating], timeout=_LAST_EVALUATION_SECONDS)
            await cancel_and_wait(self._evaluating)

    async def _evaluate(self, evaluation: Evaluation) -> None:
        step = evaluation.version.step
        try:
            result = await self._context.buffer.await_evaluation(evaluation.evaluation_id, self._timeout_seconds)
        except LeewayError as error:
            log.error("evaluation of step %d is lost: %s", step, error.message)
            return
        finally:
            await self._context.publisher.release()
        if result.complete and result.rewards:
            self._reports.evaluated(evaluation.version, result)
            return
        log.error(
            "evaluation of step %d gave %d rewards of %d within %g s; it is left out of the curve",
            step,
            len(result.rewards),
            evaluation.task_count * evaluation.members,
            self._timeout_seconds,
        )


async def _ended(task: asyncio.Task[None]) -> bool:
    await asyncio.wait([task])
    return True
