"""No server ever serves a mixture and every label is right, under kills, corruption, loss and disorder."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from inference_server.served_policy import ServedPolicy
from leeway.types import WeightSnapshot
from tests.push.chaos import RUN, History, Outcome, Receiver, _look, chaos
from tests.push.engine import WeightsEngine


@pytest.mark.e2e
@pytest.mark.timeout(180)
async def test_whatever_is_served_is_what_its_label_says() -> None:
    outcome = await chaos(60, seed=7, fault_probability=0.08)
    assert not outcome.violations
    assert outcome.looks > 100
    assert outcome.kinds["receiver killed"] >= 3
    assert outcome.kinds["learner killed"] >= 1
    for what in ("spoilt", "announcement", "KiB as delta", "KiB as snapshot"):
        assert sum(count for kind, count in outcome.kinds.items() if what in kind) > 2, what


async def test_an_update_is_finished_though_whoever_asked_is_gone() -> None:
    history, engine = History(1), WeightsEngine()
    policy = ServedPolicy(engine, RUN)
    first = history.snapshot(1, 0, 1)
    await policy.update(first)
    history.train(1)
    following = history.snapshot(1, 1, 1)
    asking = asyncio.create_task(policy.update(following))
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # in the middle of the copy
    assert engine.paused
    asking.cancel()
    await policy.wait_for_change(first.version)
    assert policy.version == engine.label == following.version
    assert engine.looks_right()


@pytest.mark.parametrize("bug", ["resumes too early", "labels too early", "trusts what came"])
async def test_the_watcher_sees_each_kind_of_mixture(bug: str) -> None:
    class Wrong(WeightsEngine):
        async def update_weights(self, snapshot: WeightSnapshot) -> float:
            if bug == "labels too early":
                self.label = snapshot.version
                await asyncio.sleep(0.01)
            elif bug == "trusts what came":
                snapshot = replace(snapshot, buffers=[bytes(len(buffer)) for buffer in snapshot.buffers])
            return await super().update_weights(snapshot)

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, False if (name, bug) == ("paused", "resumes too early") else value)

    receiver, history, outcome = Receiver("server-0", []), History(1), Outcome()
    await receiver.engine.update_weights(history.snapshot(1, 0, 1))
    wrong = Wrong()
    wrong.__dict__.update(receiver.engine.__dict__)
    receiver.engine = wrong
    looking = asyncio.create_task(_look([receiver], history, outcome))
    for step in range(1, 200):
        history.train(step)
        await wrong.update_weights(history.snapshot(1, step, 1))
        await asyncio.sleep(0.001)
        if outcome.violations:
            break
    looking.cancel()
    assert "serves other weights than its label" in outcome.violations[0]
