"""The learner's watch: it drains through the buffer, names whom it may not drain, and never stops training."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from learner.fleet.mismatch import Sample
from learner.fleet.watch import FleetWatch, Verdict
from leeway.config import FleetOptions
from leeway.errors import FencedError, LeewayError, PreconditionError, UnavailableError
from leeway.rpc import cancel_and_wait
from leeway.service.metrics import LearnerMetrics
from leeway.types import Drain, DrainReason, ServerStatus
from tests.unit.learner.fleet.test_server_mismatch import MOMENT


class Buffer:
    """Servers and drains, as the watch sees them."""

    def __init__(self, *names: str) -> None:
        self.drains: dict[str, Drain] = {}
        self.names = names
        self.refusal: LeewayError | None = None
        self.failure: LeewayError | None = None
        self.looks = asyncio.Queue[None]()

    async def servers(self) -> list[ServerStatus]:
        self.looks.put_nowait(None)
        if self.failure is not None:
            raise self.failure
        return [ServerStatus(name, True, self.drains.get(name), None, 0, 0.0, 0, 0.0) for name in self.names]

    async def drain_server(self, server_id: str, reason: DrainReason, message: str, *, epoch: int) -> tuple[Drain, int]:
        assert epoch == 7
        if self.refusal is not None:
            raise self.refusal
        self.drains[server_id] = Drain(reason, message, MOMENT)
        return self.drains[server_id], 0


def make(buffer: Buffer, **options: Any) -> tuple[FleetWatch, CollectorRegistry, list[Verdict]]:
    registry, told = CollectorRegistry(), list[Verdict]()
    values: dict[str, Any] = {"min_tokens": 10, "check_seconds": 3600.0, **options}
    settings = FleetOptions(**values)
    watch = FleetWatch(cast("Any", buffer), settings, LearnerMetrics(registry), told.append)
    return watch, registry, told


def odd(watch: FleetWatch) -> None:
    samples = [
        Sample("odd", 0, 10, 20.0),
        Sample("odd", 0, 10, 21.0),
        Sample("s0", 0, 10, 0.0),
        Sample("s0", 0, 10, 0.1),
    ]
    watch._window.add(samples)


async def test_a_diverging_server_is_drained_once_and_judged_afresh() -> None:
    buffer = Buffer("odd", "s0")
    watch, registry, told = make(buffer)
    odd(watch)
    await watch.check(7)
    assert list(buffer.drains) == ["odd"]
    assert [verdict.server_id for verdict in told] == ["odd"]
    assert registry.get_sample_value("leeway_learner_server_mismatch_nats", {"server": "odd"}) == pytest.approx(2.045)
    assert registry.get_sample_value("leeway_learner_suspect_servers") == 0
    buffer.drains.clear()  # readmitted
    await watch.check(7)
    assert not buffer.drains
    assert registry.get_sample_value("leeway_learner_server_mismatch_nats", {"server": "odd"}) is None


@pytest.mark.parametrize("allowed", [True, False])
async def test_whom_it_may_not_drain_it_names_once(allowed: bool, caplog: pytest.LogCaptureFixture) -> None:
    buffer = Buffer("odd", "s0")
    buffer.refusal = PreconditionError("server 'odd' is the only one at work")
    watch, registry, told = make(buffer, drain=allowed)
    odd(watch)
    for _ in range(2):
        await watch.check(7)
    lines = [record.message for record in caplog.records if record.levelname == "WARNING"]
    why = "server 'odd' is the only one at work" if allowed else "learner.fleet.drain is off"
    assert lines == [f"server odd is not drained although it should be: {why}"]
    assert registry.get_sample_value("leeway_learner_suspect_servers") == 1
    assert not told
    buffer.refusal = None
    await watch.check(7)
    assert list(buffer.drains) == (["odd"] if allowed else [])


async def test_it_looks_after_each_step_and_outlives_a_buffer_that_is_away() -> None:
    buffer = Buffer("odd", "s0")
    buffer.failure = UnavailableError("restarting")
    watch, _, told = make(buffer)
    task = asyncio.create_task(watch.run(7))
    watch.trained([], {}, 0, [])
    await buffer.looks.get()
    buffer.failure = None
    odd(watch)
    watch.trained([], {}, 1, [])
    await buffer.looks.get()
    while not told:
        await asyncio.wait({task}, timeout=0.001)
    await cancel_and_wait(task)


async def test_it_looks_in_its_own_time_too_and_ends_with_its_learner() -> None:
    buffer = Buffer("s0")
    watch, _, _ = make(buffer, check_seconds=0.01)
    task = asyncio.create_task(watch.run(7))
    for _ in range(2):
        await buffer.looks.get()
    buffer.failure = FencedError("another learner has taken over")
    await task
