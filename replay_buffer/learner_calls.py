"""What the learner asks of the replay buffer. Its dataflow: buffer.py."""

from __future__ import annotations

import logging

from leeway.errors import DeadlineError
from leeway.types import (
    Evaluation,
    EvaluationResult,
    OpenedRun,
    PolicyVersion,
    RunSpec,
)
from replay_buffer.live.views import GroupView, view_group
from replay_buffer.rules.draw import decide_draw, decide_reject, drawn_batch
from replay_buffer.rules.evaluation import decide_evaluation, result_of
from replay_buffer.rules.lifecycle import decide_advance, decide_commit, decide_finish
from replay_buffer.rules.opening import Ledger, decide_after_open, decide_open_run
from replay_buffer.rules.state import RunState
from replay_buffer.run_store import Recorder, open_groups

log = logging.getLogger(__name__)


class LearnerCalls(Recorder):
    """Opening a run, drawing, advancing, committing, measuring, finishing."""

    async def open_run(
        self, spec: RunSpec, checkpoint: PolicyVersion, ledger: Ledger, incarnation: bytes = b""
    ) -> OpenedRun:
        """Fence older learners, commit the checkpoint's steps, return everything else drawn.

        Raises:
            FencedError, PreconditionError: see ReplayService.OpenRun.
        """
        self._check_running()
        known = self._runs.get(spec.run)
        opened = decide_open_run(known.state if known else None, spec, checkpoint, ledger, incarnation)
        if opened is not None:
            self._record(spec.run, opened)
            run = self._runs[spec.run]
            for drop in decide_after_open(run.state):
                self._record(spec.run, drop)
            log.info("run %s: epoch %d opens it at %s", spec.run, opened.epoch, checkpoint)
        state = self._runs[spec.run].state
        answer = OpenedRun(state.epoch, state.head, state.finished)
        await self.intake.settled()
        return answer

    async def draw(self, name: str, epoch: int, step: int, deadline: float) -> list[GroupView]:
        """The groups of a step, once there are enough; `deadline` is on the loop's clock.

        Raises:
            FencedError, PreconditionError: see ReplayService.DrawBatch.
            DeadlineError: there were not enough groups in time.
        """
        run, began = self._run(name), self._now()
        while (batch := drawn_batch(run.state, epoch, step)) is None:
            drawn = decide_draw(run.state, epoch, step, self._expired(run))
            if drawn is not None:
                self._record(name, drawn)
            elif not await run.results.wait(deadline):
                raise DeadlineError(_blocker(run.state, step))
            self._check_running()
        self._observer.draw_waited(name, self._now() - began)
        views = [view_group(run.state.groups[group_id]) for group_id in batch.group_ids]
        await self.intake.settled()
        return views

    async def advance(self, name: str, epoch: int, version: PolicyVersion, parent: PolicyVersion) -> None:
        """Seal a step. Raises: see ReplayService.Advance."""
        run = self._run(name)
        advanced = decide_advance(run.state, epoch, version, parent, self._expired(run))
        if advanced is not None:
            self._record(name, advanced)
            self._drop_expired(run)
        await self.intake.settled()

    async def commit(self, name: str, epoch: int, step: int, oldest_kept_step: int = 0) -> None:
        """Consume steps for good. Raises: see ReplayService.Commit."""
        await self._decided(name, decide_commit(self._run(name).state, epoch, step, oldest_kept_step))

    async def reject_group(self, name: str, epoch: int, group_id: str, message: str) -> None:
        """Set a drawn group aside. Raises: see ReplayService.RejectGroup."""
        await self._decided(name, decide_reject(self._run(name).state, epoch, group_id, message))

    async def create_evaluation(self, epoch: int, evaluation: Evaluation) -> None:
        """Ask for a measurement. Raises: see ReplayService.CreateEvaluation."""
        name = evaluation.version.run
        await self._decided(name, decide_evaluation(self._run(name).state, epoch, evaluation))

    async def await_evaluation(self, name: str, evaluation_id: str, wait_seconds: float) -> EvaluationResult:
        """Results so far, after waiting for them to be complete.

        Raises:
            NotFoundError: no such evaluation.
        """
        run, deadline = self._run(name), self._now() + max(wait_seconds, 0.0)
        while not (result := result_of(run.state, evaluation_id)).complete and await run.results.wait(deadline):
            self._check_running()
        await self.intake.settled()
        return result

    async def finish_run(self, name: str, epoch: int) -> int:
        """End a run; returns how many groups this call dropped. Raises: see ReplayService.FinishRun."""
        finished = decide_finish(self._run(name).state, epoch)
        await self._decided(name, finished)
        return 0 if finished is None else len(finished.group_ids)


def _blocker(state: RunState, step: int) -> str:
    status = state.status()
    holders = sorted({group.server_id for group in open_groups(state)})
    return (
        f"run {state.spec.run!r}: step {step} needs {state.spec.groups_per_step} groups; {status.ready} are ready and "
        f"{status.open} are open at {', '.join(holders) or 'no server'}"
    )
