"""The runs of one directory: a decision is appended to the log, applied to its run's state, and wakes those who wait.

decision ──> log (storage) ──> state ──> metrics, and everyone who waits       one turn of the loop

start      folds a snapshot's runs, then every later record; leases of open groups begin
timer      runs at the earliest lease's end: what its server left is dropped or can be issued again
aclose     writes a snapshot of the end
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass, field

from leeway.config import ReplayBufferOptions
from leeway.errors import CorruptDataError, NotFoundError, UnavailableError
from leeway.types import GroupState, Purpose
from replay_buffer.live.servers import Fleet
from replay_buffer.live.wakeup import Wakeup
from replay_buffer.metrics import BufferMetrics, endings
from replay_buffer.rules.completion import decide_after_restart
from replay_buffer.rules.fold import apply
from replay_buffer.rules.groups import Group, RecordHandle
from replay_buffer.rules.leases import Leases
from replay_buffer.rules.opening import decide_restored, leap_of
from replay_buffer.rules.state import RunState
from replay_buffer.rules.tickets import Expired, TaskOrder, decide_expired
from replay_buffer.rules.transitions import (
    ChunkWritten,
    RunOpened,
    ServerDrained,
    ServerReadmitted,
    StepsCommitted,
    TicketIssued,
    TrajectoryClosed,
    Transition,
)
from replay_buffer.storage.directory import Storage
from replay_buffer.storage.log import Log
from replay_buffer.storage.records import Record, decode, encode
from replay_buffer.storage.run_index import RunIndex
from replay_buffer.storage.segments import Location

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Run:
    """A run's state, and what lives only as long as the process."""

    state: RunState
    leases: Leases
    fleet: Fleet
    task_order: TaskOrder
    tickets_changed: Wakeup = field(default_factory=Wakeup)  # tickets may have become available
    groups_changed: Wakeup = field(default_factory=Wakeup)  # a group is ready or has ended


class RunStore:
    """Every run of one log directory, without the calls.

    Args:
        options: the section [replay_buffer].
        durable_log: the log of its directory.
        metrics: are told what happens.
    """

    def __init__(self, options: ReplayBufferOptions, durable_log: Log, metrics: BufferMetrics) -> None:
        self._options = options
        self._log = durable_log
        self._metrics = metrics
        self.runs: dict[str, Run] = {}
        self.storage = Storage(options, durable_log)
        self.opened = Wakeup()  # a run has been opened for the first time
        self._stopping = False
        self._lease_timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Fold the log and begin to serve. Leases of open tickets begin now.

        Raises:
            CorruptDataError: the log is damaged.
        """
        self.storage.recover(self._restore, self._replay)
        self._log.start()
        now = self.now()
        for run in self.runs.values():
            for group in open_groups(run.state):
                run.leases.renew(group.group_id, now)
            self._metrics.watch_run(run.state, run.leases, run.fleet)
            if self.storage.restored_from is not None:
                self._record_restored(run.state)
            for drop in decide_after_restart(run.state):
                self.record(run.state.spec.run, drop)
            self.drop_expired(run)
        self.arm_lease_timer()
        if self.storage.restored_from is not None:
            self.storage.begin_generation()

    def _record_restored(self, state: RunState) -> None:
        restored = decide_restored(state, leap_of(int(time.time()), secrets.randbits(20)))
        if restored is not None:
            self.record(state.spec.run, restored)
            log.warning(
                "run %s is restored from a backup at %s; %d open groups are dropped, epochs below %d are fenced",
                *(state.spec.run, state.head, len(restored.group_ids), restored.epoch),
            )

    def _restore(self, state: RunState) -> None:
        lease_seconds = self._options.lease_seconds
        order = TaskOrder(state.spec.seed, state.spec.train_task_count)
        self.runs[state.spec.run] = Run(state, Leases(lease_seconds), Fleet(lease_seconds), order)

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
        self.opened.notify()
        for run in self.runs.values():
            run.tickets_changed.notify()
            run.groups_changed.notify()

    async def aclose(self) -> None:
        """Leave the directory so that the next start has nothing to fold; `Log.aclose` comes next."""
        await self.storage.aclose(self._states())

    # Deciding and recording

    def record(self, name: str, transition: Transition, recorded_at_ns: int | None = None) -> None:
        """Append, apply, and wake whom it concerns: one turn of the loop."""
        record = Record(name, time.time_ns() if recorded_at_ns is None else recorded_at_ns, transition)
        location = self.storage.append(encode(record), self._states)
        is_new = name not in self.runs
        ended = [] if is_new else endings(self.runs[name].state, transition)
        self._apply(record, location)
        run = self.runs[name]
        if ended:
            self._metrics.groups_ended(name, ended)
        match transition:
            case StepsCommitted():
                return
            case ChunkWritten():
                if transition.versions:
                    run.groups_changed.notify()  # now that its tokens are known, the group may not be due yet
            case TicketIssued():
                run.leases.renew(transition.ticket.group_id, self.now())
                if transition.ticket.purpose is Purpose.TRAIN:
                    run.fleet.ticket_issued(transition.ticket.group_id, transition.server_id, self.now())
                self.arm_lease_timer()
                run.groups_changed.notify()
            case TrajectoryClosed():
                found = run.state.find(transition.trajectory_id)
                if found is not None and found[0].state is not GroupState.OPEN:
                    run.leases.release(found[0].group_id)
                    run.fleet.finished(found[0].group_id, self.now())
                    run.groups_changed.notify()
            case RunOpened() if is_new:
                self._metrics.watch_run(run.state, run.leases, run.fleet)
                self.opened.notify()
            case ServerDrained() | ServerReadmitted():
                self._metrics.drains_changed(run.state)
                run.tickets_changed.notify()
                run.groups_changed.notify()
            case _:
                run.tickets_changed.notify()
                run.groups_changed.notify()

    def _apply(self, record: Record, location: Location) -> None:
        run = self.runs.get(record.run)
        if run is None:
            if not isinstance(record.transition, RunOpened):
                raise CorruptDataError(f"run {record.run!r} goes on before it was opened")
            self._restore(RunState(record.transition.spec, RunIndex(self.storage.index, record.run)))
            run = self.runs[record.run]
        apply(run.state, record.transition, record.recorded_at_ns, location.handle)

    def _states(self) -> list[RunState]:
        return [run.state for run in self.runs.values()]

    def read_transition(self, record: RecordHandle) -> Transition:
        """What a record says, whether it is on disk yet or not."""
        return decode(self._log.read(Location.of(record))).transition

    def run(self, name: str) -> Run:
        self.check_running()
        run = self.runs.get(name)
        if run is None:
            raise NotFoundError(f"run {name!r} is unknown here: no learner has opened it")
        return run

    def check_running(self) -> None:
        if self._stopping:
            raise UnavailableError("the replay buffer is stopping; call again when it is back")

    # Leases

    def arm_lease_timer(self) -> None:
        if self._lease_timer is not None or self._stopping:
            return
        now = self.now()
        due = [deadline for run in self.runs.values() if (deadline := run.leases.next_deadline(now)) is not None]
        if due:
            self._lease_timer = asyncio.get_running_loop().call_at(min(due), self._on_lease_timer)

    def _on_lease_timer(self) -> None:
        self._lease_timer = None
        for run in self.runs.values():
            self.drop_expired(run)
        self.arm_lease_timer()

    def drop_expired(self, run: Run) -> None:
        for drop in decide_expired(run.state, self.expired(run)):
            self.record(run.state.spec.run, drop)
        run.leases.retain(run.state.groups.unended)
        run.tickets_changed.notify()
        run.groups_changed.notify()  # a draw waits for nobody whose lease ran out

    def end_leases(self, run: Run, server_id: str) -> None:
        """The tickets that a server holds can go to others now."""
        held = [group.group_id for group in open_groups(run.state) if group.server_id == server_id]
        if held:
            run.leases.expire(held)
            self.drop_expired(run)

    def expired(self, run: Run) -> Expired:
        now = self.now()
        return lambda group_id: run.leases.expired(group_id, now)

    @staticmethod
    def now() -> float:
        return asyncio.get_running_loop().time()


def open_groups(state: RunState) -> list[Group]:
    """Groups of either purpose whose members are missing."""
    groups = [*state.live.values(), *state.live_evaluation.values()]
    return [group for group in groups if group.state is GroupState.OPEN]
