"""The replay buffer: one event loop, one state per run, one log.

    caller ──> decide (pure) ──> append to the log ──> apply to the state ──> wait until durable ──> answer
                    ▲                                        │
                    └────────── the same turn of the loop ───┘   so the log's order is the state's order

    who waits                     for what                           who wakes it
    JoinRun                       the run                            OpenRun
    AcquireTickets                a ticket: admission, a lapsed      Advance, OpenRun, drops, failures, the lease timer,
                                  lease                              the same server's request at a newer version,
                                                                     DrainServer, ReadmitServer
    DrawBatch, AwaitEvaluation    whole groups                       closes, drops, OpenRun, the lease timer
    every answer                  the log up to what it shows        fsync

`ReplayBuffer` decides and answers; the `RunStore` that it holds appends, applies and wakes. What is live is in memory;
chunks stay in the log.

Fleet: the buffer measures how long servers take for their tickets; the learner (learner/fleet/watch.py) measures how
far their log-probs are from its own. The learner or an operator decides that a server is drained. The buffer then gives
it no tickets, takes its leases back and drops groups, all in one durable record, and tells the server in the answer to
its next request for tickets.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from leeway.config import ReplayBufferOptions
from leeway.errors import DeadlineError
from leeway.types import (
    AcquiredTickets,
    DeadLetter,
    Drain,
    DrainReason,
    Evaluation,
    EvaluationResult,
    GroupState,
    ModelSignature,
    OpenedRun,
    PolicyVersion,
    RunSpec,
    RunStatus,
    ServerStatus,
    WriteItem,
    WriteResult,
    WriteStatus,
)
from replay_buffer.live.backpressure import Backpressure, Cause
from replay_buffer.live.open_trajectories import OpenTrajectories
from replay_buffer.live.writing import decide_write
from replay_buffer.metrics import BufferMetrics
from replay_buffer.rules.dead_letters import decide_requeue, decide_requeue_all, list_dead_letters
from replay_buffer.rules.drain import decide_drain, decide_readmit
from replay_buffer.rules.draw import decide_draw, decide_reject, drawn_batch
from replay_buffer.rules.evaluation import decide_evaluation, result_of
from replay_buffer.rules.groups import Group
from replay_buffer.rules.lifecycle import check_fit, decide_advance, decide_commit, decide_finish, decide_give_up
from replay_buffer.rules.opening import Ledger, decide_after_open, decide_open_run, decide_rollback
from replay_buffer.rules.state import RunState
from replay_buffer.rules.tickets import TicketOffice, TicketRequest
from replay_buffer.rules.transitions import TicketIssued, Transition
from replay_buffer.run_store import Run, RunStore, open_groups
from replay_buffer.storage.backup import Backup
from replay_buffer.storage.index_file import Filter
from replay_buffer.storage.log import Log
from replay_buffer.storage.run_index import check_kept, select
from replay_buffer.storage.segments import Location

log = logging.getLogger(__name__)


class ReplayBuffer:
    """Every run of one log directory, as its callers see it. The errors of a call are those that ReplayService lists.

    Args:
        options: the section [replay_buffer].
        durable_log: the log of its directory, not started yet.
        metrics: are told what happens.
        free_bytes: space left on the directory's disk.
    """

    def __init__(
        self,
        options: ReplayBufferOptions,
        durable_log: Log,
        metrics: BufferMetrics | None = None,
        free_bytes: Callable[[Path], int] | None = None,
    ) -> None:
        self._options = options
        self._log = durable_log
        self._metrics = metrics or BufferMetrics()
        self.backpressure = Backpressure(options, durable_log, self._metrics.refused, free_bytes)
        self._store = RunStore(options, durable_log, self._metrics)
        self._open_trajectories = OpenTrajectories()

    def start(self) -> None:
        """Fold the log and begin to serve. Leases of open tickets begin now.

        Raises:
            CorruptDataError: the log is damaged.
        """
        self._store.start()

    def stop(self) -> None:
        """Refuse new calls and release everyone who waits; `aclose` comes next."""
        self._store.stop()

    async def aclose(self) -> None:
        """Leave the directory so that the next start has nothing to fold; `Log.aclose` comes next."""
        await self._store.aclose()

    # For rollout workers

    async def join_run(
        self, name: str, server_id: str, signature: ModelSignature, dataset_digest: bytes, wait_seconds: float
    ) -> tuple[RunSpec, bool]:
        """Wait until the run is open; returns its specification and whether it has finished.

        Tickets that an earlier process of this name held can go to others.

        Raises:
            PreconditionError: the server does not fit.
            DeadlineError: the run is not open yet.
        """
        store = self._store
        store.check_running()
        deadline = store.now() + max(wait_seconds, 0.0)
        while name not in store.runs:
            if not await store.opened.wait(deadline):
                raise DeadlineError(
                    f"run {name!r} is not open yet: no learner has opened it; start one, and call again"
                )
            store.check_running()
        run = store.runs[name]
        check_fit(run.state, server_id, signature, dataset_digest)
        run.fleet.seen(server_id, store.now())
        store.end_leases(run, server_id)
        spec, finished = run.state.spec, run.state.finished
        await self.backpressure.settled()
        return spec, finished

    async def acquire_tickets(
        self, name: str, server_id: str, version: PolicyVersion, max_members: int, wait_seconds: float
    ) -> AcquiredTickets:
        """Tickets, after waiting for some.

        A waiting call ends with none when its server requests tickets again at a newer version: this version may never
        get any. A call of a server that is drained while it waits ends at once, to tell it. A call of a server that was
        drained before waits until it is readmitted.

        Raises:
            PreconditionError: the version was never registered.
            ExhaustedError: the disk is nearly full.
        """
        store, run = self._store, self._store.run(name)
        began = store.now()
        deadline = began + max(wait_seconds, 0.0)
        issued: list[TicketIssued] = []
        entry, is_newer = run.fleet.requested(server_id, began, version, max_members)
        if is_newer:
            run.tickets_changed.notify()
        was_drained = server_id in run.state.drained
        while not run.state.finished:
            self.backpressure.check_free_space()
            request = TicketRequest(server_id, version, entry.capacity)
            office = TicketOffice(run.state, request, run.task_order, store.expired(run), self._options.lease_seconds)
            if server_id in run.state.drained:
                if not was_drained or not await run.tickets_changed.wait(deadline):
                    break
                store.check_running()
                continue
            was_drained = False
            issued = office.issue(max_members)
            for ticket in issued:
                store.record(name, ticket)
                self._metrics.ticket_issued(name, ticket.ticket.purpose, server_id, ticket.ticket.attempt)
            if issued or not await run.tickets_changed.wait(deadline):
                break
            store.check_running()
            if entry.newest is not None and entry.newest > (version.epoch, version.step):
                break
        finished, drained = run.state.finished, run.state.drained.get(server_id)
        if issued:
            self._metrics.exposed.ticket_wait_seconds.labels(name).observe(store.now() - began)
        await self.backpressure.settled()
        return AcquiredTickets([entry.ticket for entry in issued], finished, drained)

    def write(self, name: str, items: Sequence[WriteItem], server_id: str = "") -> list[WriteResult]:
        """Take items in order. Their answers may go out when `durable(mark)` returns, with `mark` read right after.

        Raises:
            NotFoundError: no such run.
        """
        store, run = self._store, self._store.run(name)
        run.fleet.seen(server_id, store.now())
        room = self.backpressure.has_room_for_chunks()
        now_ns = time.time_ns()
        results: list[WriteResult] = []
        for item in items:
            decision = decide_write(run.state, item, store.read_transition, self._open_trajectories, room=room)
            for transition in decision.transitions:
                store.record(name, transition, now_ns)
            result = decision.result
            if result.status is WriteStatus.EXHAUSTED:
                self._metrics.refused(Cause.DISK if self._log.stalled else Cause.FREE_BYTES)
                result = result._replace(retry_seconds=self._options.retry_seconds)
            results.append(result)
        now = store.now()
        for trajectory_id in {result.trajectory_id for result in results if result.status is WriteStatus.ACKNOWLEDGED}:
            found = run.state.find(trajectory_id)
            if found is not None and found[0].state is GroupState.OPEN:
                run.leases.renew(found[0].group_id, now)
        self._metrics.items_written(name, server_id, items, results)
        return results

    async def renew_leases(
        self, name: str, tickets: Sequence[tuple[str, int]], server_id: str = ""
    ) -> list[tuple[str, int]]:
        """Extend the leases of (group, attempt); returns those that no longer stand."""
        store, run = self._store, self._store.run(name)
        now = store.now()
        run.fleet.seen(server_id, now)
        aborted: list[tuple[str, int]] = []
        for group_id, attempt in tickets:
            group = run.state.groups.get(group_id)
            if group is None or group.attempt != attempt or group.state is GroupState.DROPPED:
                aborted.append((group_id, attempt))
            elif group.state is GroupState.OPEN:
                run.leases.renew(group_id, now)
        store.arm_lease_timer()
        await self.backpressure.settled()
        return aborted

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
        await self.backpressure.settled(mark)

    # For the learner

    async def open_run(
        self, spec: RunSpec, checkpoint: PolicyVersion, ledger: Ledger, incarnation: bytes = b""
    ) -> OpenedRun:
        """Fence older learners, commit the checkpoint's steps, return everything else drawn."""
        store = self._store
        store.check_running()
        known = store.runs.get(spec.run)
        opened = decide_open_run(known.state if known else None, spec, checkpoint, ledger, incarnation)
        if opened is not None:
            store.record(spec.run, opened)
            for drop in decide_after_open(store.runs[spec.run].state):
                store.record(spec.run, drop)
            log.info("run %s: epoch %d opens it at %s", spec.run, opened.epoch, checkpoint)
        state = store.runs[spec.run].state
        answer = OpenedRun(state.epoch, state.head, state.finished)
        await self.backpressure.settled()
        return answer

    async def draw(self, name: str, epoch: int, step: int, deadline: float) -> list[Group]:
        """The groups of a step, once there are enough; `deadline` is on the loop's clock.

        Raises:
            DeadlineError: there were not enough groups in time.
        """
        store, run = self._store, self._store.run(name)
        began = store.now()
        while (batch := drawn_batch(run.state, epoch, step)) is None:
            drawn = decide_draw(run.state, epoch, step, store.expired(run))
            if drawn is not None:
                store.record(name, drawn)
            elif not await run.groups_changed.wait(deadline):
                raise DeadlineError(_missing_groups(run.state, step))
            store.check_running()
        self._metrics.exposed.draw_wait_seconds.labels(name).observe(store.now() - began)
        groups = [run.state.groups[group_id].frozen() for group_id in batch.group_ids]
        await self.backpressure.settled()
        return groups

    async def advance(self, name: str, epoch: int, version: PolicyVersion, parent: PolicyVersion) -> None:
        """Seal a step and register its version."""
        store, run = self._store, self._store.run(name)
        advanced = decide_advance(run.state, epoch, version, parent, store.expired(run))
        if advanced is not None:
            store.record(name, advanced)
            store.drop_expired(run)
        await self.backpressure.settled()

    async def commit(self, name: str, epoch: int, step: int, oldest_kept_step: int = 0) -> None:
        """Consume every step up to this one; no later call returns their groups."""
        await self._decided(name, decide_commit(self._state(name), epoch, step, oldest_kept_step))

    async def reject_group(self, name: str, epoch: int, group_id: str, message: str) -> None:
        """Set a drawn group aside."""
        await self._decided(name, decide_reject(self._state(name), epoch, group_id, message))

    async def create_evaluation(self, epoch: int, evaluation: Evaluation) -> None:
        """Begin a measurement: its tickets go out before any for training."""
        name = evaluation.version.run
        await self._decided(name, decide_evaluation(self._state(name), epoch, evaluation))

    async def await_evaluation(self, name: str, evaluation_id: str, wait_seconds: float) -> EvaluationResult:
        """Results so far, after waiting for them to be complete."""
        run, deadline = self._store.run(name), self._store.now() + max(wait_seconds, 0.0)
        while not (result := result_of(run.state, evaluation_id)).complete and await run.groups_changed.wait(deadline):
            self._store.check_running()
        await self.backpressure.settled()
        return result

    async def finish_run(self, name: str, epoch: int) -> int:
        """End a run; returns how many groups this call dropped."""
        finished = decide_finish(self._state(name), epoch)
        await self._decided(name, finished)
        return 0 if finished is None else len(finished.group_ids)

    # The run's servers: for the learner and operators

    async def leave_run(self, name: str, server_id: str) -> None:
        """A server leaves: others may have the tickets that it holds."""
        run = self._store.run(name)
        run.fleet.left(server_id)
        self._store.end_leases(run, server_id)
        await self.backpressure.settled()

    async def drain_server(
        self, name: str, server_id: str, reason: DrainReason, message: str, *, epoch: int = 0, force: bool = False
    ) -> tuple[Drain, int]:
        """Take a server out; returns the drain that stands and how many groups this call dropped."""
        store, run = self._store, self._store.run(name)
        others = run.fleet.present(store.now()) - {server_id} - set(run.state.drained)
        drained = decide_drain(run.state, server_id, reason, message, epoch=epoch, others_active=others, force=force)
        if drained is not None:
            store.record(name, drained)
            if reason is not DrainReason.OPERATOR:
                store.end_leases(run, server_id)
            log.warning(
                "run %s: server %s is drained (%s): %s; %d groups are dropped",
                *(name, server_id, reason.name.lower(), message, len(drained.group_ids)),
            )
        drain = run.state.drained[server_id]
        await self.backpressure.settled()
        return drain, 0 if drained is None else len(drained.group_ids)

    async def readmit_server(self, name: str, server_id: str) -> bool:
        """Give a drained server tickets again; returns whether it was drained."""
        readmitted = decide_readmit(self._state(name), server_id)
        if readmitted is not None:
            log.warning("run %s: server %s is readmitted", name, server_id)
        await self._decided(name, readmitted)
        return readmitted is not None

    async def servers(self, name: str) -> list[ServerStatus]:
        """Those heard of since the start, and those that are drained."""
        statuses = _statuses(self._store.run(name), self._store.now())
        await self.backpressure.settled()
        return statuses

    # For operators and tools

    async def rollback_run(self, name: str, version: PolicyVersion) -> tuple[int, int]:
        """Return to an older version; returns the raised epoch and how many groups this call dropped."""
        state = self._state(name)
        rolled_back = decide_rollback(state, version)
        if rolled_back is not None:
            self._store.record(name, rolled_back)
            for drop in decide_after_open(state):
                self._store.record(name, drop)
            log.warning("run %s is rolled back to %s; %d groups are dropped", name, version, len(rolled_back.group_ids))
        epoch = state.epoch
        await self.backpressure.settled()
        return epoch, len(rolled_back.group_ids) if rolled_back is not None else 0

    async def give_up_run(self, name: str) -> int:
        """End a run permanently, with or without its learner; returns how many groups this call dropped."""
        state = self._state(name)
        finished = decide_give_up(state)
        dropped = 0 if finished is None else len(finished.group_ids)
        if finished is not None:
            log.warning("run %s is given up at %s; %d groups are dropped", name, state.head, dropped)
        await self._decided(name, finished)
        return dropped

    async def dead_letters(self, name: str, limit: int) -> list[DeadLetter]:
        """Groups that were set aside, oldest first; a limit keeps the newest."""
        letters = list_dead_letters(self._state(name), limit)
        await self.backpressure.settled()
        return letters

    async def requeue_dead_letters(self, name: str, group_ids: Sequence[str]) -> int:
        """Queue the tasks of these dead letters again, of all when none is named; returns how many."""
        state, count = self._state(name), 0
        if group_ids:
            requeued = decide_requeue(state, group_ids)
            count = 0 if requeued is None else len(requeued.group_ids)
            await self._decided(name, requeued)
            return count
        while (requeued := decide_requeue_all(state)) is not None:
            count += len(requeued.group_ids)
            await self._decided(name, requeued)
        return count

    async def status(self, name: str) -> RunStatus:
        """Counts and versions."""
        status = self._state(name).status()
        await self.backpressure.settled()
        return status

    async def export(self, name: str, wanted: Filter, limit: int) -> AsyncIterator[Group]:
        """Groups that match, in the order of issue, each as it is when its turn comes; a limit keeps the newest.

        Raises:
            NotFoundError: no such run, or the groups of the wanted step have been retired.
        """
        state = self._state(name)
        check_kept(state, wanted)
        for group_id in select(state, wanted, limit):
            group = state.groups.get(group_id)
            if group is not None:
                seen = group.frozen()
                await self.backpressure.settled()
                yield seen

    async def back_up(self, directory: Path) -> Backup:
        """Copy everything that is acknowledged, and perhaps more, to a new folder.

        Raises:
            PreconditionError: the folder exists or cannot be written.
        """
        self._store.check_running()
        await self._log.durable()
        return await self._store.storage.back_up(directory)

    def read_many(self, locations: Sequence[Location]) -> list[bytes]:
        """Records' payloads. Safe from any thread once they are durable."""
        return self._log.read_many(locations)

    # What the calls share

    def _state(self, name: str) -> RunState:
        return self._store.run(name).state

    async def _decided(self, name: str, transition: Transition | None) -> None:
        """Record a decision, if there is one, and wait until everything so far is durable."""
        if transition is not None:
            self._store.record(name, transition)
        await self.backpressure.settled()


def _missing_groups(state: RunState, step: int) -> str:
    status = state.status()
    holders = sorted({group.server_id for group in open_groups(state)})
    return (
        f"run {state.spec.run!r}: step {step} needs {state.spec.groups_per_step} groups; {status.ready} are ready and "
        f"{status.open} are open at {', '.join(holders) or 'no server'}"
    )


def _statuses(run: Run, now: float) -> list[ServerStatus]:
    fleet, drained = run.fleet, run.state.drained
    present = fleet.present(now)
    held = [group.server_id for group in open_groups(run.state) if group.being_sampled]
    ages = fleet.open_ticket_seconds(run.state.groups.unended, now)
    result: list[ServerStatus] = []
    for server_id in sorted({*fleet.servers, *drained}):
        entry, still_open = fleet.servers.get(server_id), ages.get(server_id, [])
        timed = [*(entry.ticket_seconds if entry else ()), *still_open]
        result.append(
            ServerStatus(
                server_id=server_id,
                present=server_id in present,
                drained=drained.get(server_id),
                version=None if entry is None else entry.version,
                tickets=held.count(server_id),
                oldest_ticket_seconds=max(still_open, default=0.0),
                timed_tickets=len(timed),
                median_ticket_seconds=statistics.median(timed) if timed else 0.0,
            )
        )
    return result
