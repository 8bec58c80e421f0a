"""The buffer's metrics: gauges look at the state when they are scraped, counters are told."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from prometheus_client import Counter

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
from replay_buffer.live.observer import Ending, Observer
from replay_buffer.live.servers import Fleet
from replay_buffer.rules.leases import Leases
from replay_buffer.rules.state import RunState

_PURPOSE: Final = {Purpose.TRAIN: "train", Purpose.EVAL: "eval"}
_COUNTS: Final[dict[GroupState, Callable[[RunStatus], int]]] = {
    GroupState.OPEN: lambda status: status.open,
    GroupState.READY: lambda status: status.ready,
    GroupState.DRAWN: lambda status: status.drawn,
    GroupState.CONSUMED: lambda status: status.consumed,
    GroupState.DROPPED: lambda status: sum(status.dropped.values()),
}
_SILENT_SECONDS: Final = 900.0
"""After so long the series of a server that says nothing are dropped."""
_MOST_SERVERS: Final = 1000
"""Servers with series of their own; beyond it those that were silent longest lose theirs."""


def observer(metrics: ReplayBufferMetrics, now: Callable[[], float] = time.monotonic) -> Observer:
    """Feeds the metrics of a buffer."""
    servers = _Servers(metrics, now)

    def ticket_issued(run: str, purpose: Purpose, server: str, attempt: int) -> None:
        servers.seen(run, server)
        metrics.issued_tickets.labels(run, _PURPOSE[purpose], server).inc()
        if attempt > 1:
            metrics.reissued_tickets.labels(run, _PURPOSE[purpose]).inc()

    def items_written(run: str, server: str, items: Sequence[WriteItem], results: Sequence[WriteResult]) -> None:
        acknowledged = size_bytes = closed = 0
        for item, result in zip(items, results, strict=True):
            if result.status is not WriteStatus.ACKNOWLEDGED:
                metrics.written_items.labels(run, result.status.name.lower()).inc()
                continue
            acknowledged += 1
            if isinstance(item.content, bytes):
                size_bytes += len(item.content)
            elif isinstance(item.content, TrajectoryClose):
                closed += 1
        series = servers.seen(run, server)
        if acknowledged:
            series.acknowledged_items.inc(acknowledged)
            series.written_bytes.inc(size_bytes)
        if closed:
            series.closed_trajectories.inc(closed)

    def groups_ended(run: str, endings: Iterable[Ending]) -> None:
        for ending in endings:
            metrics.ended_groups.labels(run, ending.fate).inc()
            metrics.ended_group_bytes.labels(run, ending.fate).inc(ending.written_bytes)

    for cause in Cause:
        metrics.refusals.labels(cause)
    return Observer(
        run_opened=lambda state, leases, fleet: _watch_run(metrics, state, leases, fleet),
        drains_changed=lambda state: _show_drained(metrics, state),
        ticket_issued=ticket_issued,
        tickets_waited=lambda run, seconds: metrics.ticket_wait_seconds.labels(run).observe(seconds),
        items_written=items_written,
        groups_ended=groups_ended,
        draw_waited=lambda run, seconds: metrics.draw_wait_seconds.labels(run).observe(seconds),
        refused=lambda cause: metrics.refusals.labels(cause).inc(),
    )


class _Series(NamedTuple):
    """What is counted for each message of a server, looked up once."""

    acknowledged_items: Counter  # of the run
    written_bytes: Counter
    closed_trajectories: Counter


class _Servers:
    """Which servers have series of their own: bounded, however many come and go."""

    def __init__(self, metrics: ReplayBufferMetrics, now: Callable[[], float]) -> None:
        self._metrics = metrics
        self._now = now
        self._seen: OrderedDict[tuple[str, str], tuple[float, _Series]] = OrderedDict()

    def seen(self, run: str, server: str) -> _Series:
        """A server said something."""
        now = self._now()
        known = self._seen.get((run, server))
        series = self._series(run, server) if known is None else known[1]
        self._seen[run, server] = now, series
        self._seen.move_to_end((run, server))
        while len(self._seen) > _MOST_SERVERS or next(iter(self._seen.values()))[0] < now - _SILENT_SECONDS:
            self._forget(*self._seen.popitem(last=False)[0])
        return series

    def _series(self, run: str, server: str) -> _Series:
        metrics = self._metrics
        return _Series(
            metrics.written_items.labels(run, WriteStatus.ACKNOWLEDGED.name.lower()),
            metrics.written_bytes.labels(run, server),
            metrics.closed_trajectories.labels(run, server),
        )

    def _forget(self, run: str, server: str) -> None:
        metrics = self._metrics
        for purpose in _PURPOSE.values():
            with suppress(KeyError):  # it had none of these
                metrics.issued_tickets.remove(run, purpose, server)
        for counter in (metrics.written_bytes, metrics.closed_trajectories):
            with suppress(KeyError):
                counter.remove(run, server)


def _show_drained(metrics: ReplayBufferMetrics, state: RunState) -> None:
    run = state.spec.run
    metrics.drained_servers.remove_by_labels({"run": run})
    for server_id, drain in state.drained.items():
        metrics.drained_servers.labels(run, server_id, drain.reason.name.lower()).set(1)


def _watch_run(metrics: ReplayBufferMetrics, state: RunState, leases: Leases, fleet: Fleet) -> None:
    run = state.spec.run
    _show_drained(metrics, state)
    metrics.present_servers.labels(run).set_function(
        lambda: len(fleet.present(time.monotonic()).difference(state.drained))
    )
    for group_state, count in _COUNTS.items():
        metrics.groups.labels(run, group_state.name.lower()).set_function(lambda count=count: count(state.status()))
    for group_state in (GroupState.OPEN, GroupState.READY):
        metrics.oldest_group_age_seconds.labels(run, group_state.name.lower()).set_function(
            lambda group_state=group_state: _oldest_age_seconds(state, group_state)
        )
    for reason in DropReason:
        metrics.dropped_groups.labels(run, reason.name.lower()).set_function(
            lambda reason=reason: state.dropped[reason]
        )
    for fate in ("consumed", *(reason.name.lower() for reason in DropReason)):
        metrics.ended_groups.labels(run, fate)
        metrics.ended_group_bytes.labels(run, fate)
    for purpose in _PURPOSE.values():
        metrics.reissued_tickets.labels(run, purpose)
    metrics.head_step.labels(run).set_function(lambda: state.head.step)
    metrics.committed_step.labels(run).set_function(lambda: state.committed_step)
    metrics.epoch.labels(run).set_function(lambda: state.epoch)
    metrics.dead_letters.labels(run).set_function(lambda: state.dead_letter_count)
    metrics.leases.labels(run).set_function(lambda: len(leases))


def _oldest_age_seconds(state: RunState, group_state: GroupState) -> float:
    """By the wall clock, which the log keeps across restarts; for people only."""
    issued = [group.issued_at_ns for group in list(state.live.values()) if group.state is group_state]
    return max((time.time_ns() - min(issued)) * 1e-9, 0.0) if issued else 0.0
