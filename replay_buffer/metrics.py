"""The buffer's metrics: gauges look at the state when they are scraped, counters are told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from leeway.metrics import ReplayBufferMetrics
from leeway.types import DropReason, GroupState, Purpose, RunStatus, WriteResult
from replay_buffer.buffer import Observer
from replay_buffer.state import RunState


def observer(metrics: ReplayBufferMetrics) -> Observer:
    """Feeds the metrics of a buffer."""

    def items_written(run: str, results: Sequence[WriteResult]) -> None:
        for status, count in Counter(result.status for result in results).items():
            metrics.written_items.labels(run, status.name.lower()).inc(count)

    return Observer(
        run_opened=lambda state: _watch_run(metrics, state),
        ticket_issued=lambda run, purpose, server: metrics.issued_tickets.labels(run, _PURPOSE[purpose], server).inc(),
        items_written=items_written,
        draw_waited=lambda run, seconds: metrics.draw_wait_seconds.labels(run).observe(seconds),
    )


_PURPOSE = {Purpose.TRAIN: "train", Purpose.EVAL: "eval"}

_COUNTS: dict[GroupState, Callable[[RunStatus], int]] = {
    GroupState.OPEN: lambda status: status.open,
    GroupState.READY: lambda status: status.ready,
    GroupState.DRAWN: lambda status: status.drawn,
    GroupState.CONSUMED: lambda status: status.consumed,
    GroupState.DROPPED: lambda status: sum(status.dropped.values()),
}


def _watch_run(metrics: ReplayBufferMetrics, state: RunState) -> None:
    run = state.spec.run
    for group_state, count in _COUNTS.items():
        metrics.groups.labels(run, group_state.name.lower()).set_function(lambda count=count: count(state.status()))
    for reason in DropReason:
        metrics.dropped_groups.labels(run, reason.name.lower()).set_function(
            lambda reason=reason: state.dropped[reason]
        )
    metrics.head_step.labels(run).set_function(lambda: state.head.step)
    metrics.epoch.labels(run).set_function(lambda: state.epoch)
