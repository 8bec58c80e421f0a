"""No server ever serves a mixture and every label is right, under kills, corruption, loss and disorder."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inference_server.served_policy import ServedPolicy
from leeway.types import PolicyVersion, WeightSnapshot
from tests.harness.weights_engine import WeightsEngine
from tests.push.driver import push_under_faults
from tests.push.history import RUN, History
from tests.push.oracle import Oracle, Outcome


@pytest.mark.e2e
@pytest.mark.timeout(600)
async def test_whatever_is_served_is_what_its_label_says() -> None:
    outcome = await push_under_faults(80, seed=7, fault_probability=0.08)
    assert not outcome.violations
    assert outcome.looks > 100
    assert outcome.kinds["receiver killed"] >= 3
    assert sum(count for kind, count in outcome.kinds.items() if "learner killed" in kind) >= 4
    sent = ("KiB as delta", "KiB as snapshot", "over collective")
    for what in ("learner killed in", "corrupted", "announcement", *sent):
        assert sum(count for kind, count in outcome.kinds.items() if what in kind) >= 1, what


async def test_an_update_is_finished_though_whoever_asked_is_gone() -> None:
    history, engine = History(1, epoch=1), WeightsEngine()
    policy = ServedPolicy(engine, RUN)
    first = history.snapshot()
    await policy.update(first)
    history.train()
    following = history.snapshot()
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

    history, outcome = History(1, epoch=1), Outcome()
    oracle, engine = Oracle(outcome), WeightsEngine()
    await engine.update_weights(history.snapshot())
    wrong = Wrong()
    wrong.__dict__.update(engine.__dict__)
    for _ in range(20):
        history.train()
        updating = asyncio.create_task(wrong.update_weights(history.snapshot()))
        while not updating.done():
            oracle.look("server-0", wrong)
            await asyncio.sleep(0)
        oracle.look("server-0", wrong)
    assert "serves other weights than its label" in outcome.violations[0]


def test_a_name_is_given_to_one_version_and_by_the_newest_learner() -> None:
    outcome = Outcome()
    oracle = Oracle(outcome)
    one, other = PolicyVersion(RUN, 1, 5, b"a" * 32), PolicyVersion(RUN, 1, 5, b"b" * 32)
    oracle.registered(one, 1)
    oracle.registered(one, 2)
    assert not outcome.violations
    oracle.registered(other, 2)
    oracle.registered(PolicyVersion(RUN, 1, 6, b"c" * 32), 1)
    assert [("names two versions" in line, "epoch 1 publishes" in line) for line in outcome.violations] == [
        (True, False),
        (False, True),
    ]


async def test_an_engine_that_goes_back_or_serves_what_nobody_published_is_seen() -> None:
    history, outcome, engine = History(1, epoch=1), Outcome(), WeightsEngine()
    oracle = Oracle(outcome)
    first = history.snapshot()
    history.train()
    second = history.snapshot()
    oracle.registered(second.version, 1)
    for snapshot in (second, first):
        await engine.update_weights(snapshot)
        oracle.look("server-0", engine)
    oracle.end()
    assert "went back to" in outcome.violations[0]
    assert "never registered" in outcome.violations[1]


def test_a_learner_goes_on_from_its_checkpoint_with_versions_of_its_own(tmp_path: Path) -> None:
    before = History(1, epoch=1)
    before.train()
    before.save(tmp_path)
    saved = before.snapshot()
    before.train()
    after = History(1, epoch=2, start=1)
    after.restore(tmp_path)
    assert (after.snapshot().version, after.snapshot().publisher_epoch) == (saved.version, 2)
    after.train()
    assert (after.snapshot().version.epoch, after.snapshot().version.step) == (2, 2)
    assert after.snapshot().version.digest != before.snapshot().version.digest
