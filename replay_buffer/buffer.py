"""The replay buffer: one event loop, one state per run, one log.

    caller ──> decide (pure) ──> append to the log ──> apply to the state ──> wait until durable ──> answer
                    ▲                                        │
                    └────────── the same turn of the loop ───┘   so the log's order is the state's order

    who waits                     for what                           who unblocks it
    JoinRun                       the run                            OpenRun
    AcquireTickets                work: admission, a lapsed loan     Advance, OpenRun, drops, failures, the lease timer,
                                                                     the same server asking at a newer version
    DrawBatch, AwaitEvaluation    whole groups                       closes, drops, OpenRun, the lease timer
    every answer                  the log up to what it shows        fsync

Decisions and answers are here; `recorder` does what lies between. What is live is in memory; chunks stay in the log.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from leeway.errors import DeadlineError
from leeway.types import (
    DeadLetter,
    Evaluation,
    EvaluationResult,
    GroupState,
    ModelSignature,
    OpenedRun,
    PolicyVersion,
    RunSpec,
    RunStatus,
    Ticket,
    WriteItem,
    WriteResult,
    WriteStatus,
)
from replay_buffer.intake import Cause
from replay_buffer.recorder import Recorder, Run, open_groups
from replay_buffer.rules.dead_letters import decide_requeue
from replay_buffer.rules.draw import decide_draw, decide_reject, drawn_batch
from replay_buffer.rules.evaluation import decide_evaluation, result_of
from replay_buffer.rules.groups import Location
from replay_buffer.rules.lifecycle import (
    Ledger,
    check_fit,
    decide_advance,
    decide_after_open,
    decide_commit,
    decide_finish,
    decide_open_run,
    decide_rollback,
)
from replay_buffer.rules.state import RunState
from replay_buffer.rules.tickets import Server, TicketOffice
from replay_buffer.rules.transitions import (
    TicketIssued,
)
from replay_buffer.storage.backup import Backup
from replay_buffer.storage.index import Filter
from replay_buffer.storage.selection import check_kept, select
from replay_buffer.views import GroupView, view_group
from replay_buffer.writing import decide_write

_FAR_FROM_FULL_BYTES: Final = 1 << 30
_ROOM_SECONDS: Final = 0.05

log = logging.getLogger(__name__)


class ReplayBuffer(Recorder):
    """Every run of one log directory, as its callers see it."""

    # The learner's calls

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

    async def finish_run(self, name: str, epoch: int) -> None:
        """End a run. Raises: see ReplayService.FinishRun."""
        await self._decided(name, decide_finish(self._run(name).state, epoch))

    # The workers' calls

    async def join_run(
        self, name: str, server_id: str, signature: ModelSignature, dataset_digest: bytes, wait_seconds: float
    ) -> RunSpec:
        """Wait until the run is open; whatever an earlier process of this name had on loan can go to others.

        Raises:
            PreconditionError: the server does not fit.
            DeadlineError: the run is not open yet.
        """
        self._check_running()
        deadline = self._now() + max(wait_seconds, 0.0)
        while name not in self._runs:
            if not await self._opened.wait(deadline):
                raise DeadlineError(
                    f"run {name!r} is not open yet: no learner has opened it; start one, and call again"
                )
            self._check_running()
        run = self._runs[name]
        check_fit(run.state, server_id, signature, dataset_digest)
        held = [group.group_id for group in open_groups(run.state) if group.server_id == server_id]
        if held:
            run.leases.expire(held)
            self._drop_expired(run)
        spec = run.state.spec
        await self.intake.settled()
        return spec

    async def acquire_tickets(
        self, name: str, server_id: str, version: PolicyVersion, max_members: int, wait_seconds: float
    ) -> tuple[list[Ticket], bool]:
        """Tickets, after waiting for some, and whether the run has finished.

        When its server asks again at a newer version, a waiting call ends with none: it may never get any.

        Raises:
            PreconditionError: the version was never registered.
            ExhaustedError: the disk is nearly full.
        """
        run, began = self._run(name), self._now()
        deadline = began + max(wait_seconds, 0.0)
        issued: list[TicketIssued] = []
        asked_at = (version.epoch, version.step)
        if asked_at > run.asked.get(server_id, asked_at):
            run.work.notify()
        run.asked[server_id] = max(asked_at, run.asked.get(server_id, asked_at))
        run.capacities[server_id] = max(max_members, run.capacities.get(server_id, 0))
        while not run.state.finished:
            self._check_soft_mark()
            server = Server(server_id, version, run.capacities[server_id])
            office = TicketOffice(run.state, server, self._expired(run), self._options.lease_seconds)
            issued = office.issue(max_members)
            for ticket in issued:
                self._record(name, ticket)
                self._observer.ticket_issued(name, ticket.ticket.purpose, server_id, ticket.ticket.attempt)
            if issued or not await run.work.wait(deadline):
                break
            self._check_running()
            if run.asked[server_id] > asked_at:
                break
        finished = run.state.finished
        if issued:
            self._observer.tickets_waited(name, self._now() - began)
        await self.intake.settled()
        return [entry.ticket for entry in issued], finished

    def write(self, name: str, items: Sequence[WriteItem], server_id: str = "") -> list[WriteResult]:
        """Take items in order. Their answers may go out when `durable(mark)` returns, with `mark` read right after.

        Raises:
            NotFoundError: no such run.
        """
        run = self._run(name)
        room = not self._log.stalled and self._has_room()
        results: list[WriteResult] = []
        for item in items:
            decision = decide_write(run.state, item, self._read_transition, self._drafts, room=room)
            for transition in decision.transitions:
                self._record(name, transition)
            result = decision.result
            if result.status is WriteStatus.EXHAUSTED:
                self._observer.refused(Cause.DISK if self._log.stalled else Cause.FREE_BYTES)
                result = replace(result, retry_seconds=self._options.retry_seconds)
            results.append(result)
        self._renew_written(run, results)
        self._observer.items_written(name, server_id, items, results)
        return results

    async def renew_leases(self, name: str, tickets: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        """Extend loans of (group, attempt); returns those that no longer stand."""
        run, now = self._run(name), self._now()
        aborted: list[tuple[str, int]] = []
        for group_id, attempt in tickets:
            group = run.state.groups.get(group_id)
            if group is None or group.attempt != attempt or group.state is GroupState.DROPPED:
                aborted.append((group_id, attempt))
            elif group.state is GroupState.OPEN:
                run.leases.renew(group_id, now)
        self._arm_lease_timer()
        await self.intake.settled()
        return aborted

    # For people and tools

    async def rollback_run(self, name: str, version: PolicyVersion) -> tuple[int, int]:
        """Return to an older version; returns the raised epoch and how many groups this call dropped.

        Raises:
            PreconditionError: see ReplayService.RollbackRun.
        """
        run = self._run(name)
        rolled_back = decide_rollback(run.state, version)
        if rolled_back is not None:
            self._record(name, rolled_back)
            for drop in decide_after_open(run.state):
                self._record(name, drop)
            log.warning("run %s is rolled back to %s; %d groups are dropped", name, version, len(rolled_back.group_ids))
        epoch = run.state.epoch
        await self.intake.settled()
        return epoch, len(rolled_back.group_ids) if rolled_back is not None else 0

    async def dead_letters(self, name: str, limit: int) -> list[DeadLetter]:
        """Groups that were set aside, oldest first; a limit keeps the newest. Raises NotFoundError: no such run."""
        letters = list(self._run(name).state.dead_letters.values())
        await self.intake.settled()
        return letters[-limit:] if limit else letters

    async def requeue_dead_letters(self, name: str, group_ids: Sequence[str]) -> int:
        """Queue tasks again; returns how many this call queued. Raises: see ReplayService.RequeueDeadLetters."""
        requeued = decide_requeue(self._run(name).state, group_ids)
        await self._decided(name, requeued)
        return 0 if requeued is None else len(requeued.group_ids)

    async def status(self, name: str) -> RunStatus:
        """Counts and versions. Raises NotFoundError for an unknown run."""
        status = self._run(name).state.status()
        await self.intake.settled()
        return status

    async def export(self, name: str, wanted: Filter, limit: int) -> AsyncIterator[GroupView]:
        """Groups that match, in the order of issue, each as it is when its turn comes; a limit keeps the newest.

        Raises:
            NotFoundError: no such run, or the groups of the step that is asked for have been retired.
        """
        state = self._run(name).state
        check_kept(state, wanted)
        for group_id in select(state, wanted, limit):
            group = state.groups.get(group_id)
            if group is not None:
                seen = view_group(group)
                await self.intake.settled()
                yield seen

    def read_many(self, locations: Sequence[Location]) -> list[bytes]:
        """Records' payloads. Safe from any thread once they are durable."""
        return self._log.read_many(locations)

    @property
    def mark(self) -> int:
        """Everything decided so far, for `durable`."""
        return self._log.mark

    @property
    def durable_mark(self) -> int:
        """What is on disk: everything decided before this mark."""
        return self._log.durable_mark

    async def durable(self, mark: int) -> None:
        """Wait until everything decided before `mark` is on disk.

        Raises:
            ExhaustedError: the disk takes nothing.
        """
        await self.intake.settled(mark)

    async def back_up(self, directory: Path) -> Backup:
        """Copy everything that is acknowledged, and perhaps more, to a new folder.

        Raises:
            PreconditionError: the folder exists or cannot be written.
        """
        self._check_running()
        await self._log.durable()
        return await self._storage.back_up(directory)

    # What the calls share

    def _renew_written(self, run: Run, results: Sequence[WriteResult]) -> None:
        now = self._now()
        for trajectory_id in {result.trajectory_id for result in results if result.status is WriteStatus.ACKNOWLEDGED}:
            found = run.state.find(trajectory_id)
            if found is not None and found[0].state is GroupState.OPEN:
                run.leases.renew(found[0].group_id, now)

    def _has_room(self) -> bool:
        """Whether chunks may be taken; far from the mark the disk is not asked for each message."""
        now = self._now()
        if now >= self._room_until:
            spare = self._free_bytes(self._options.directory) - self._options.hard_free_bytes
            if spare < _FAR_FROM_FULL_BYTES:
                return spare >= 0
            self._room_until = now + _ROOM_SECONDS
        return True

    def _check_soft_mark(self) -> None:
        if self._log.stalled:
            message = "the disk is full; no new work is given out until there is room"
            raise self.intake.refusal(Cause.DISK, message)
        free, wanted = self._free_bytes(self._options.directory), self._options.soft_free_bytes
        if free < wanted:
            self._room_until = 0.0
            raise self.intake.refusal(
                Cause.FREE_BYTES,
                f"{free >> 20} MiB free, below replay_buffer.soft_free_bytes ({wanted >> 20} MiB): "
                "no new work is given out until there is room",
            )


def _blocker(state: RunState, step: int) -> str:
    status = state.status()
    holders = sorted({group.server_id for group in open_groups(state)})
    return (
        f"run {state.spec.run!r}: step {step} needs {state.spec.groups_per_step} groups; {status.ready} are ready and "
        f"{status.open} are open at {', '.join(holders) or 'no server'}"
    )
