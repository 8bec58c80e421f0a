"""What is counted, for how many servers at most, and what a dropped group weighed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from prometheus_client import CollectorRegistry

from leeway.service.metrics import ReplayBufferMetrics
from leeway.types import Purpose, WriteItem, WriteResult, WriteStatus
from replay_buffer.metrics import BufferMetrics, GroupEnding, endings
from replay_buffer.rules.lifecycle import decide_advance, decide_commit
from tests.harness.replay_builders import RUN, Machine, spec, version


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def servers(registry: CollectorRegistry) -> set[str]:
    return {
        sample.labels["server"]
        for family in registry.collect()
        for sample in family.samples
        if "server" in sample.labels
    }


def written(status: WriteStatus = WriteStatus.ACKNOWLEDGED) -> tuple[Sequence[WriteItem], Sequence[WriteResult]]:
    return [WriteItem("t", 1, 0, b"12345")], [WriteResult("t", 1, 0, status)]


def test_series_of_servers_that_left_are_dropped(registry: CollectorRegistry) -> None:
    now = [0.0]
    watching = BufferMetrics(ReplayBufferMetrics(registry), lambda: now[0])
    for name in ("leaves", "stays"):
        watching.items_written(RUN, name, *written())
        watching.ticket_issued(RUN, Purpose.TRAIN, name, 1)
    assert servers(registry) == {"leaves", "stays"}
    now[0] = 800.0
    watching.items_written(RUN, "stays", *written())
    now[0] = 901.0
    watching.items_written(RUN, "new", *written())
    assert servers(registry) == {"stays", "new"}


def test_however_many_names_come_the_series_are_bounded(registry: CollectorRegistry) -> None:
    watching = BufferMetrics(ReplayBufferMetrics(registry), lambda: 0.0)
    for number in range(3000):
        watching.items_written(RUN, f"server-{number}", *written())
    assert len(servers(registry)) == 1000
    assert "server-2999" in servers(registry)


def test_only_what_was_accepted_counts_for_a_server(registry: CollectorRegistry) -> None:
    watching = BufferMetrics(ReplayBufferMetrics(registry))
    watching.items_written(RUN, "s0", *written())
    watching.items_written(RUN, "s0", *written(WriteStatus.ABORTED))
    labels = {"run": RUN, "server": "s0"}
    assert registry.get_sample_value("leeway_replay_written_bytes_total", labels) == 5
    aborted = {"run": RUN, "status": "aborted"}
    assert registry.get_sample_value("leeway_replay_written_items_total", aborted) == 1


def test_what_ends_is_weighed_by_its_fate() -> None:
    machine = Machine(spec(groups_per_step=1, max_staleness=1))
    young, old = machine.acquire()
    machine.fill([young])
    machine.draw()
    machine.advance()
    commit = decide_commit(machine.state, 1, 1)
    assert commit is not None
    (consumed,) = endings(machine.state, commit)
    assert consumed.fate == "consumed"
    assert consumed.written_bytes > 0
    machine.record(commit)
    machine.fill(machine.acquire(max_members=2), [version(1)])
    machine.draw()
    advanced = decide_advance(machine.state, 1, version(2), version(1))
    assert advanced is not None
    assert advanced.stale_group_ids == (old.group_id,)
    assert endings(machine.state, advanced) == [GroupEnding("stale", 0)]
