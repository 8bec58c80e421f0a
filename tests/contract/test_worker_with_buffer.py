"""The rollout worker and the real replay buffer: a short run, drawn, advanced, evaluated and finished."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from inference_server.engines.arithmetic import ArithmeticEngine
from inference_server.rollout.worker import RolloutWorker
from inference_server.served_policy import ServedPolicy
from leeway import arithmetic
from leeway.arithmetic import ArithmeticTokenizer, ArithmeticWeights
from leeway.config import ArithmeticEngineOptions, WorkerOptions, WriterOptions
from leeway.replay_client import ReplayClient
from leeway.rpc import cancel_and_wait
from leeway.service.metrics import InferenceServerMetrics
from leeway.tasks import TaskSet
from leeway.types import Evaluation, PolicyVersion, TrajectoryGroup, WeightSnapshot
from tests.contract.fake_replay import RUN, SAMPLING, run_spec
from tests.contract.rewards import InProcessReward
from tests.deadlines import WAIT_SECONDS
from tests.harness.arithmetic_law import behavior_logprob, policy_version
from tests.harness.buffer_server import connected, serving

pytestmark = pytest.mark.processes

TASKS = TaskSet(
    [{"prompt": f"train {n}"} for n in range(8)], [{"prompt": f"held out {n}"} for n in range(4)], b"d" * 32
)
SPEC = run_spec(sampling=replace(SAMPLING, max_tokens=40, topk=3), total_steps=6)


def snapshot(epoch: int, step: int) -> WeightSnapshot:
    manifest, buffers = arithmetic.published_weights(0, step)
    return WeightSnapshot(policy_version(RUN, epoch, step), epoch, manifest, buffers)


def check(groups: list[TrajectoryGroup], head: PolicyVersion) -> None:
    """Mu equals the law at every label, and no label is older than the bound."""
    assert len(groups) == SPEC.groups_per_step
    for group in groups:
        assert [trajectory.member for trajectory in group.trajectories] == list(range(SPEC.members))
        for trajectory in group.trajectories:
            tokens = trajectory.token_ids
            for span in trajectory.version_spans:
                assert head.step - span.version.step <= SPEC.max_staleness
                weights = ArithmeticWeights.of(span.version)
                for at in range(span.start_token, span.end_token):
                    law = behavior_logprob(weights, tokens[:at], int(tokens[at]))
                    assert trajectory.behavior_logprobs[at] == np.float32(law)


async def test_a_short_run(tmp_path: Path) -> None:
    engine = ArithmeticEngine(ArithmeticEngineOptions(chunk_tokens=4))
    policy = ServedPolicy(engine, RUN)
    metrics = InferenceServerMetrics(CollectorRegistry())
    async with serving(tmp_path) as address, connected(address, RUN) as learner, connected(address, RUN) as client:
        worker = RolloutWorker(
            engine=engine,
            policy=policy,
            client=client,
            server_id="server-0",
            tasks=TASKS,
            tokenizer=ArithmeticTokenizer(),
            reward=InProcessReward(lambda completion: len(completion) % 5),
            options=WorkerOptions(ticket_wait_seconds=0.5),
            writer_options=WriterOptions(flush_seconds=0.001),
            metrics=metrics,
        )
        working = asyncio.create_task(worker.run(asyncio.Event()))
        try:
            await _learn(learner, policy)
            async with asyncio.timeout(WAIT_SECONDS):
                await working
        finally:
            await cancel_and_wait(working)
            await engine.aclose()
        status = await learner.run_status()
        assert status.finished
        assert status.issued == status.consumed + sum(status.dropped.values())
        assert status.consumed == SPEC.groups_per_step * SPEC.total_steps


async def _learn(learner: ReplayClient, policy: ServedPolicy) -> None:
    opened = await learner.open_run(SPEC, SPEC.root, [])
    head = SPEC.root
    await policy.update(snapshot(0, 0))
    for step in range(1, SPEC.total_steps + 1):
        check(await learner.draw_batch(opened.epoch, step, WAIT_SECONDS), head)
        version = snapshot(opened.epoch, step).version
        await learner.advance(opened.epoch, version, head)
        head = version
        await policy.update(snapshot(opened.epoch, step))
        await learner.commit(opened.epoch, step)
    evaluation = Evaluation("e", head, len(TASKS.heldout), 3, replace(SAMPLING, max_tokens=5))
    await learner.create_evaluation(opened.epoch, evaluation)
    result = await learner.await_evaluation("e", WAIT_SECONDS)
    assert result.complete
    assert len(result.rewards) == 12
    assert result.failed == 0
    await learner.finish_run(opened.epoch)
