"""The replay buffer: one event loop, one state per run, one log.

    caller ──> decide (pure) ──> append to the log ──> apply to the state ──> wait until durable ──> answer
                    ▲                                        │
                    └────────── the same turn of the loop ───┘   so the log's order is the state's order

    who waits                     for what                           who unblocks it
    JoinRun                       the run                            OpenRun
    AcquireTickets                work: admission, a lapsed loan     Advance, OpenRun, drops, failures, the lease timer,
                                                                     the same server asking at a newer version,
                                                                     DrainServer, ReadmitServer
    DrawBatch, AwaitEvaluation    whole groups                       closes, drops, OpenRun, the lease timer
    every answer                  the log up to what it shows        fsync

Decisions and answers are here, in `learner_calls`, `fleet_calls` and `people_calls`; `recorder` does what lies between.
What is live is in memory; chunks stay in the log.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from leeway.errors import DeadlineError
from leeway.types import (
    GroupState,
    ModelSignature,
    PolicyVersion,
    RunSpec,
    Ticket,
    WriteItem,
    WriteResult,
    WriteStatus,
)
from replay_buffer.fleet_calls import FleetCalls
from replay_buffer.learner_calls import LearnerCalls
from replay_buffer.live.backpressure import Cause
from replay_buffer.live.writing import decide_write
from replay_buffer.people_calls import PeopleCalls
from replay_buffer.rules.groups import Location
from replay_buffer.rules.lifecycle import check_fit
from replay_buffer.rules.tickets import Server, TicketOffice
from replay_buffer.rules.transitions import TicketIssued
from replay_buffer.run_store import Run

_FAR_FROM_FULL_BYTES: Final = 1 << 30
_ROOM_SECONDS: Final = 0.05


class ReplayBuffer(LearnerCalls, FleetCalls, PeopleCalls):
    """Every run of one log directory, as its callers see it."""

    # The workers' calls

    async def join_run(
        self, name: str, server_id: str, signature: ModelSignature, dataset_digest: bytes, wait_seconds: float
    ) -> tuple[RunSpec, bool]:
        """Wait until the run is open; returns its specification and whether it has finished.

        Whatever an earlier process of this name had on loan can go to others.

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
        run.fleet.seen(server_id, self._now())
        self._take_loans_back(run, server_id)
        spec, finished = run.state.spec, run.state.finished
        await self.intake.settled()
        return spec, finished

    async def acquire_tickets(
        self, name: str, server_id: str, version: PolicyVersion, max_members: int, wait_seconds: float
    ) -> tuple[list[Ticket], bool]:
        """Tickets, after waiting for some, and whether the run has finished.

        When its server asks again at a newer version, a waiting call ends with none: it may never get any. That of a
        server that is drained meanwhile ends at once, to tell it; one that was drained before waits to be readmitted.

        Raises:
            PreconditionError: the version was never registered.
            ExhaustedError: the disk is nearly full.
        """
        run, began = self._run(name), self._now()
        deadline = began + max(wait_seconds, 0.0)
        issued: list[TicketIssued] = []
        ask, is_newer = run.asks.take(server_id, version, max_members)
        if is_newer:
            run.work.notify()
        run.fleet.seen(server_id, began, version)
        was_drained = server_id in run.state.drained
        while not run.state.finished:
            self._check_soft_mark()
            server = Server(server_id, version, ask.capacity)
            office = TicketOffice(run.state, server, self._expired(run), self._options.lease_seconds)
            if server_id in run.state.drained:
                if not was_drained or not await run.work.wait(deadline):
                    break
                self._check_running()
                continue
            was_drained = False
            issued = office.issue(max_members)
            for ticket in issued:
                self._record(name, ticket)
                self._observer.ticket_issued(name, ticket.ticket.purpose, server_id, ticket.ticket.attempt)
            if issued or not await run.work.wait(deadline):
                break
            self._check_running()
            if ask.epoch_and_step > (version.epoch, version.step):
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
        run.fleet.seen(server_id, self._now())
        room = not self._log.stalled and self._has_room()
        now_ns = time.time_ns()
        results: list[WriteResult] = []
        for item in items:
            decision = decide_write(run.state, item, self._read_transition, self._drafts, room=room)
            for transition in decision.transitions:
                self._record(name, transition, now_ns)
            result = decision.result
            if result.status is WriteStatus.EXHAUSTED:
                self._observer.refused(Cause.DISK if self._log.stalled else Cause.FREE_BYTES)
                result = result._replace(retry_seconds=self._options.retry_seconds)
            results.append(result)
        self._renew_written(run, results)
        self._observer.items_written(name, server_id, items, results)
        return results

    async def renew_leases(
        self, name: str, tickets: Sequence[tuple[str, int]], server_id: str = ""
    ) -> list[tuple[str, int]]:
        """Extend loans of (group, attempt); returns those that no longer stand."""
        run, now = self._run(name), self._now()
        run.fleet.seen(server_id, now)
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
