"""The buffer's metrics: gauges look at the state when they are scraped; counters are set where the event happens.

A metric is declared in `leeway.service.metrics` and set at its event, through `BufferMetrics.exposed`. Here is what
needs more than one line: the series of a run and those of a server, and what a transition says about ended groups.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, Counter

from leeway.service.metrics import ReplayBufferMetrics
from leeway.types import (
    DropReason,
    GroupState,
    Purpose,
    RunStatus,
    TrajectoryClose,
    WriteItem,
    WriteResult,
    WriteStatus,
)
from replay_buffer.live.backpressure import Cause
from replay_buffer.live.servers import Fleet
from replay_buffer.rules.leases import Leases
from replay_buffer.rules.state import RunState
from replay_buffer.rules.transitions import (
    GroupsDropped,
    PolicyAdvanced,
    RunOpened,
    ServerDrained,
    StepsCommitted,
    Transition,
)
from replay_buffer.storage.segments import locations_of

_PURPOSE: Final = {Purpose.TRAIN: "train", Purpose.EVAL: "eval"}
_COUNTS: Final[dict[GroupState, Callable[[RunStatus], int]]] = {
    GroupState.OPEN: lambda status: status.open,
    GroupState.READY: lambda status: status.ready,
    GroupState.DRAWN: lambda status: status.drawn,
    GroupState.CONSUMED: lambda status: status.consumed,
    GroupState.DROPPED: lambda status: sum(status.dropped.values()),
}
_SILENT_SECONDS: Final = 900.0
"""The series of a server that says nothing for so long are dropped."""
_MOST_SERVERS: Final = 1000
"""Servers with series of their own; beyond it those that were silent longest lose theirs."""
_ENDING: Final = (GroupsDropped, PolicyAdvanced, RunOpened, ServerDrained, StepsCommitted)
"""Transitions that `endings` has something to say about."""


class GroupEnding(NamedTuple):
    """A training group that ended."""

    fate: str  # consumed, or the reason it was dropped for
    written_bytes: int  # of its newest attempts, in the log


class _ServerSeries(NamedTuple):
    """What is counted for each message of a server, looked up once."""

    acknowledged_items: Counter  # of the run
    written_bytes: Counter
    closed_trajectories: Counter


class BufferMetrics:
    """What a buffer counts and shows; the number of servers with series of their own is bounded.

    Args:
        exposed: the metrics; made for nobody to see unless given.
        now: the clock by which a server is silent.
    """

    def __init__(self, exposed: ReplayBufferMetrics | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self.exposed = exposed or ReplayBufferMetrics(CollectorRegistry())
        self._now = now
        self._servers: OrderedDict[tuple[str, str], tuple[float, _ServerSeries]] = OrderedDict()
        for cause in Cause:
            self.exposed.refusals.labels(cause)

    def refused(self, cause: str) -> None:
        """A caller was refused for want of room."""
        self.exposed.refusals.labels(cause).inc()

    def ticket_issued(self, run: str, purpose: Purpose, server: str, attempt: int) -> None:
        """A server got a ticket."""
        self._seen(run, server)
        self.exposed.issued_tickets.labels(run, _PURPOSE[purpose], server).inc()
        if attempt > 1:
            self.exposed.reissued_tickets.labels(run, _PURPOSE[purpose]).inc()

    def items_written(self, run: str, server: str, items: Sequence[WriteItem], results: Sequence[WriteResult]) -> None:
        """A server wrote items, which were answered with these results."""
        acknowledged = size_bytes = closed = 0
        for item, result in zip(items, results, strict=True):
            if result.status is not WriteStatus.ACKNOWLEDGED:
                self.exposed.written_items.labels(run, result.status.name.lower()).inc()
                continue
            acknowledged += 1
            if isinstance(item.content, bytes):
                size_bytes += len(item.content)
            elif isinstance(item.content, TrajectoryClose):
                closed += 1
        series = self._seen(run, server)
        if acknowledged:
            series.acknowledged_items.inc(acknowledged)
            series.written_bytes.inc(size_bytes)
        if closed:
            series.closed_trajectories.inc(closed)

    def groups_ended(self, run: str, ended: Sequence[GroupEnding]) -> None:
        """Training groups ended."""
        for ending in ended:
            self.exposed.ended_groups.labels(run, ending.fate).inc()
            self.exposed.ended_group_bytes.labels(run, ending.fate).inc(ending.written_bytes)

    def drains_changed(self, state: RunState) -> None:
        """A server was drained or readmitted."""
        run, drained_servers = state.spec.run, self.exposed.drained_servers
        drained_servers.remove_by_labels({"run": run})
        for server_id, drain in state.drained.items():
            drained_servers.labels(run, server_id, drain.reason.name.lower()).set(1)

    def watch_run(self, state: RunState, leases: Leases, fleet: Fleet) -> None:
        """Show a run from now on."""
        run, exposed = state.spec.run, self.exposed
        self.drains_changed(state)
        exposed.present_servers.labels(run).set_function(
            lambda: len(fleet.present(time.monotonic()).difference(state.drained))
        )
        for group_state, count in _COUNTS.items():
            exposed.groups.labels(run, group_state.name.lower()).set_function(lambda count=count: count(state.status()))
        for group_state in (GroupState.OPEN, GroupState.READY):
            exposed.oldest_group_age_seconds.labels(run, group_state.name.lower()).set_function(
                lambda group_state=group_state: _oldest_age_seconds(state, group_state)
            )
        for reason in DropReason:
            exposed.dropped_groups.labels(run, reason.name.lower()).set_function(
                lambda reason=reason: state.dropped[reason]
            )
        for fate in ("consumed", *(reason.name.lower() for reason in DropReason)):
            exposed.ended_groups.labels(run, fate)
            exposed.ended_group_bytes.labels(run, fate)
        for purpose in _PURPOSE.values():
            exposed.reissued_tickets.labels(run, purpose)
        exposed.head_step.labels(run).set_function(lambda: state.head.step)
        exposed.committed_step.labels(run).set_function(lambda: state.committed_step)
        exposed.epoch.labels(run).set_function(lambda: state.epoch)
        exposed.dead_letters.labels(run).set_function(lambda: state.dead_letter_count)
        exposed.leases.labels(run).set_function(lambda: len(leases))

    def _seen(self, run: str, server: str) -> _ServerSeries:
        """A server said something; returns its series."""
        now, known, exposed = self._now(), self._servers.get((run, server)), self.exposed
        series = (
            known[1]
            if known
            else _ServerSeries(
                exposed.written_items.labels(run, WriteStatus.ACKNOWLEDGED.name.lower()),
                exposed.written_bytes.labels(run, server),
                exposed.closed_trajectories.labels(run, server),
            )
        )
        self._servers[run, server] = now, series
        self._servers.move_to_end((run, server))
        while len(self._servers) > _MOST_SERVERS or next(iter(self._servers.values()))[0] < now - _SILENT_SECONDS:
            self._forget(*self._servers.popitem(last=False)[0])
        return series

    def _forget(self, run: str, server: str) -> None:
        for purpose in _PURPOSE.values():
            with suppress(KeyError):  # it had none of these
                self.exposed.issued_tickets.remove(run, purpose, server)
        for counter in (self.exposed.written_bytes, self.exposed.closed_trajectories):
            with suppress(KeyError):
                counter.remove(run, server)


def endings(run: RunState, transition: Transition) -> list[GroupEnding]:
    """The training groups that a transition is about to end. Those that end otherwise (run_end) are not listed."""
    return list(_endings(run, transition)) if isinstance(transition, _ENDING) else []


def _endings(run: RunState, transition: Transition) -> Iterator[GroupEnding]:
    match transition:
        case GroupsDropped(group_ids=group_ids, reason=reason):
            fate = reason.name.lower()
        case PolicyAdvanced(stale_group_ids=group_ids):
            fate = DropReason.STALE.name.lower()
        case ServerDrained(group_ids=group_ids):
            fate = DropReason.DIVERGED.name.lower()
        case StepsCommitted(step=step) | RunOpened(checkpoint=step):
            last = step if isinstance(step, int) else step.step
            steps = range(run.committed_step + 1, last + 1)
            group_ids = [group_id for at in steps if at in run.batches for group_id in run.batches[at].group_ids]
            fate = "consumed"
        case _:
            return
    for group_id in group_ids:
        group = run.live.get(group_id)
        if group is not None:
            locations = (location for member in group.members for location in locations_of(member))
            yield GroupEnding(fate, sum(location.size_bytes for location in locations))


def _oldest_age_seconds(state: RunState, group_state: GroupState) -> float:
    """By the wall clock, which the log keeps across restarts; for people only."""
    issued = [group.issued_at_ns for group in list(state.live.values()) if group.state is group_state]
    return max((time.time_ns() - min(issued)) * 1e-9, 0.0) if issued else 0.0
