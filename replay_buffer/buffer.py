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

Nothing is read into memory but the index; chunks stay in the log.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from leeway.errors import CorruptDataError, DeadlineError, NotFoundError, UnavailableError
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
from replay_buffer.backup import Backup
from replay_buffer.completion import decide_after_restart
from replay_buffer.dead_letters import decide_requeue
from replay_buffer.drafts import Drafts
from replay_buffer.draw import decide_draw, decide_reject, drawn_batch
from replay_buffer.evaluation import decide_evaluation, result_of
from replay_buffer.groups import Group, Location
from replay_buffer.index import Filter
from replay_buffer.intake import Cause, Intake
from replay_buffer.leases import Leases
from replay_buffer.lifecycle import (
    Ledger,
    check_fit,
    decide_advance,
    decide_after_open,
    decide_commit,
    decide_finish,
    decide_open_run,
    decide_restored,
    decide_rollback,
)
from replay_buffer.log import Log
from replay_buffer.observer import ENDS, Observer, endings
from replay_buffer.options import ReplayBufferOptions
from replay_buffer.records import Record, decode, encode
from replay_buffer.selection import check_kept, select
from replay_buffer.signals import Signal
from replay_buffer.state import RunState
from replay_buffer.storage import Storage
from replay_buffer.tickets import Expired, Server, TicketOffice, decide_expired
from replay_buffer.transitions import (
    ChunkWritten,
    RunOpened,
    StepsCommitted,
    TicketIssued,
    TrajectoryClosed,
    Transition,
)
from replay_buffer.views import GroupView, view_group
from replay_buffer.writing import decide_write

_FAR_FROM_FULL_BYTES: Final = 1 << 30
_ROOM_SECONDS: Final = 0.05

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Run:
    """A run's state, and what lives only as long as the process."""

    state: RunState
    leases: Leases
    capacities: dict[str, int] = field(default_factory=dict[str, int])  # most members each server asked for at once
    work: Signal = field(default_factory=Signal)  # tickets may have become available
    results: Signal = field(default_factory=Signal)  # a group is ready or has ended
    asked: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    """(epoch, step) of the newest version that each server has asked for work at."""


class ReplayBuffer:
    """Every run of one log directory."""

    def __init__(
        self,
        options: ReplayBufferOptions,
        durable_log: Log,
        observer: Observer | None = None,
        free_bytes: Callable[[Path], int] | None = None,
    ) -> None:
        self._options = options
        self._log = durable_log
        self._observer = observer or Observer()
        self._free_bytes = free_bytes or free_bytes_of
        self.intake = Intake(options, durable_log, self._observer.refused)
        self._runs: dict[str, _Run] = {}
        self._storage = Storage(options, durable_log)
        self._drafts = Drafts()
        self._room_until = 0.0  # until then there is room for chunks
        self._opened = Signal()
        self._stopping = False
        self._lease_timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Fold the log and begin to serve. Leases of open tickets begin now.

        Raises:
            CorruptDataError: the log is damaged.
        """
        self._storage.recover(self._restore, self._replay)
        self._log.start()
        now = self._now()
        for run in self._runs.values():
            for group in _open_groups(run.state):
                run.leases.renew(group.group_id, now)
            self._observer.run_opened(run.state, run.leases)
            if self._storage.restored_from is not None:
                self._record_restored(run.state)
            for drop in decide_after_restart(run.state):
                self._record(run.state.spec.run, drop)
            self._drop_expired(run)
        self._arm_lease_timer()
        if self._storage.restored_from is not None:
            self._storage.begin_generation()

    def _record_restored(self, state: RunState) -> None:
        restored = decide_restored(state, int(time.time()))
        if restored is not None:
            self._record(state.spec.run, restored)
            log.warning(
                "run %s is restored from a backup at %s; %d open groups are dropped, epochs below %d are fenced",
                *(state.spec.run, state.head, len(restored.group_ids), restored.epoch),
            )

    def _restore(self, state: RunState) -> None:
        self._runs[state.spec.run] = _Run(state, Leases(self._options.lease_seconds))

    def _replay(self, payload: bytes, location: Location) -> None:
        try:
            record = decode(payload)
            self._apply(record, location)
        except CorruptDataError as error:
            raise CorruptDataError(
                f"{self._options.directory}: segment {location.segment}, byte {location.offset}: {error.message}"
            ) from error

    def stop(self) -> None:
        """Refuse new calls and release everyone who waits; `aclose` comes next."""
        self._stopping = True
        if self._lease_timer is not None:
            self._lease_timer.cancel()
        self._opened.notify()
        for run in self._runs.values():
            run.work.notify()
            run.results.notify()

    async def aclose(self) -> None:
        """Leave the directory so that the next start has nothing to fold; `Log.aclose` comes next."""
        await self._storage.aclose(self._states())

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
        held = [group.group_id for group in _open_groups(run.state) if group.server_id == server_id]
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

    # Deciding and recording

    async def _decided(self, name: str, transition: Transition | None) -> None:
        if transition is not None:
            self._record(name, transition)
        await self.intake.settled()

    def _record(self, name: str, transition: Transition) -> None:
        """Append, apply, and wake whom it concerns: one turn of the loop."""
        record = Record(name, time.time_ns(), transition)
        location = self._storage.append(encode(record), self._states)
        is_new = name not in self._runs
        ended = list(endings(self._runs[name].state, transition)) if isinstance(transition, ENDS) and not is_new else []
        self._apply(record, location)
        run = self._runs[name]
        if ended:
            self._observer.groups_ended(name, ended)
        match transition:
            case StepsCommitted():
                return
            case ChunkWritten():
                if transition.versions:
                    run.results.notify()  # now that its tokens are known, the group may not be due yet
            case TicketIssued():
                run.leases.renew(transition.ticket.group_id, self._now())
                self._arm_lease_timer()
                run.results.notify()
            case TrajectoryClosed():
                found = run.state.find(transition.trajectory_id)
                if found is not None and found[0].state is not GroupState.OPEN:
                    run.leases.release(found[0].group_id)
                    run.results.notify()
            case RunOpened() if is_new:
                self._observer.run_opened(run.state, run.leases)
                self._opened.notify()
            case _:
                run.work.notify()
                run.results.notify()

    def _apply(self, record: Record, location: Location) -> None:
        run = self._runs.get(record.run)
        if run is None:
            if not isinstance(record.transition, RunOpened):
                raise CorruptDataError(f"run {record.run!r} goes on before it was opened")
            self._restore(RunState(record.transition.spec, self._storage.index.of(record.run)))
            run = self._runs[record.run]
        run.state.apply(record.transition, record.recorded_at_ns, location)

    def _states(self) -> list[RunState]:
        return [run.state for run in self._runs.values()]

    def _read_transition(self, location: Location) -> Transition:
        return decode(self._log.read(location)).transition

    def _renew_written(self, run: _Run, results: Sequence[WriteResult]) -> None:
        now = self._now()
        for trajectory_id in {result.trajectory_id for result in results if result.status is WriteStatus.ACKNOWLEDGED}:
            found = run.state.find(trajectory_id)
            if found is not None and found[0].state is GroupState.OPEN:
                run.leases.renew(found[0].group_id, now)

    def _run(self, name: str) -> _Run:
        self._check_running()
        run = self._runs.get(name)
        if run is None:
            raise NotFoundError(f"run {name!r} is unknown here: no learner has opened it")
        return run

    def _check_running(self) -> None:
        if self._stopping:
            raise UnavailableError("the replay buffer is stopping; call again when it is back")

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

    # Leases

    def _arm_lease_timer(self) -> None:
        if self._lease_timer is not None or self._stopping:
            return
        now = self._now()
        due = [deadline for run in self._runs.values() if (deadline := run.leases.next_deadline(now)) is not None]
        if due:
            self._lease_timer = asyncio.get_running_loop().call_at(min(due), self._on_lease_timer)

    def _on_lease_timer(self) -> None:
        self._lease_timer = None
        for run in self._runs.values():
            self._drop_expired(run)
        self._arm_lease_timer()

    def _drop_expired(self, run: _Run) -> None:
        for drop in decide_expired(run.state, self._expired(run)):
            self._record(run.state.spec.run, drop)
        run.leases.retain(run.state.groups.unended)
        run.work.notify()
        run.results.notify()  # a draw waits for nobody whose lease ran out

    def _expired(self, run: _Run) -> Expired:
        now = self._now()
        return lambda group_id: run.leases.expired(group_id, now)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _open_groups(state: RunState) -> list[Group]:
    groups = [*state.live.values(), *state.live_evaluation.values()]
    return [group for group in groups if group.state is GroupState.OPEN]


def _blocker(state: RunState, step: int) -> str:
    status = state.status()
    holders = sorted({group.server_id for group in _open_groups(state)})
    return (
        f"run {state.spec.run!r}: step {step} needs {state.spec.groups_per_step} groups; {status.ready} are ready and "
        f"{status.open} are open at {', '.join(holders) or 'no server'}"
    )


def free_bytes_of(directory: Path) -> int:
    """Space that this process may still use on the directory's disk."""
    statistics = os.statvfs(directory)
    return statistics.f_bavail * statistics.f_frsize
