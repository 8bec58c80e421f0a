"""The rollout worker with the arithmetic engine, over real gRPC against a replay buffer that follows the contract."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from inference_server.engine import Engine
from inference_server.engines.arithmetic import ArithmeticEngine
from inference_server.rollout import run_joiner
from inference_server.rollout.reward import RewardRunner
from inference_server.rollout.worker import RolloutWorker
from inference_server.served_policy import ServedPolicy
from leeway import arithmetic
from leeway.arithmetic import ArithmeticTokenizer, ArithmeticWeights
from leeway.config import ArithmeticEngineOptions, RewardOptions, WorkerOptions, WriterOptions
from leeway.errors import ConfigError, PreconditionError, UnavailableError
from leeway.replay_client import ReplayClient
from leeway.rpc import Security, cancel_and_wait
from leeway.service.metrics import InferenceServerMetrics
from leeway.tasks import TaskSet
from leeway.types import (
    Drain,
    DrainReason,
    LogprobMode,
    PolicyVersion,
    Purpose,
    SegmentKind,
    Trajectory,
    TrajectoryFailure,
    WeightSnapshot,
    WriteItem,
    WriteResult,
    WriteStatus,
)
from tests.contract.fake_replay import RUN, SAMPLING, FakeReplay, result, run_spec, serving, ticket
from tests.contract.rewards import InProcessReward, faulty_reward
from tests.deadlines import WAIT_SECONDS
from tests.harness.arithmetic_law import behavior_logprob, policy_version

pytestmark = pytest.mark.processes

TASKS = TaskSet(
    train=[{"prompt": f"train {index}", "index": index} for index in range(6)]
    + [{"prompt": ""}, {"prompt": "x" * 4096}],
    heldout=[{"prompt": f"held out {index}"} for index in range(4)],
    digest=b"d" * 32,
)


def snapshot(step: int, epoch: int = 1) -> WeightSnapshot:
    manifest, buffers = arithmetic.published_weights(epoch, step)
    return WeightSnapshot(policy_version(RUN, epoch, step, history=epoch), epoch, manifest, buffers)


class Rig:
    """A worker that runs against a fake replay buffer."""

    def __init__(self, replay: FakeReplay, engine: Any, policy: ServedPolicy, worker: RolloutWorker) -> None:
        self.replay = replay
        self.engine = engine
        self.policy = policy
        self.stop = asyncio.Event()
        self.registry = CollectorRegistry()
        self.task = asyncio.create_task(worker.run(self.stop))
        self.worker = worker

    async def ended(self, count: int) -> None:
        """Wait until so many trajectories have ended; a worker that dies meanwhile says why."""
        endings = asyncio.ensure_future(self.replay.ended(count))
        await asyncio.wait({endings, self.task}, return_when=asyncio.FIRST_COMPLETED)
        if not endings.done():
            endings.cancel()
            await self.task
            pytest.fail("the worker returned before the trajectories ended")

    async def finish(self) -> None:
        await self.replay.finish()
        await asyncio.wait_for(self.task, WAIT_SECONDS)

    def trajectory(self, trajectory_id: str) -> Trajectory:
        return self.replay.written[trajectory_id, 1].assemble()

    def failure(self, trajectory_id: str) -> TrajectoryFailure:
        failure = self.replay.written[trajectory_id, 1].failure
        assert failure is not None
        return failure


@asynccontextmanager
async def working(
    replay: FakeReplay,
    *,
    rewards: RewardRunner | None = None,
    step: int | None = 0,
    options: WorkerOptions | None = None,
    drain_seconds: float = WAIT_SECONDS,
    engine: Engine | None = None,
    **engine_options: Any,
) -> AsyncGenerator[Rig, None]:
    engine = engine or ArithmeticEngine(ArithmeticEngineOptions(**engine_options))
    policy = ServedPolicy(engine, RUN)
    if step is not None:
        await policy.update(snapshot(step))
    metrics = InferenceServerMetrics(CollectorRegistry())
    rewards = rewards or InProcessReward()
    await rewards.start()
    async with serving(replay) as server:
        client = ReplayClient(f"127.0.0.1:{server.port}", RUN, Security())
        worker = RolloutWorker(
            engine=engine,
            policy=policy,
            client=client,
            server_id="server-0",
            tasks=TASKS,
            tokenizer=ArithmeticTokenizer(),
            reward=rewards,
            options=(options or WorkerOptions(ticket_wait_seconds=0.5)).model_copy(
                update={"drain_seconds": drain_seconds}
            ),
            writer_options=WriterOptions(flush_seconds=0.001, exhausted_wait_seconds=0.01),
            metrics=metrics,
        )
        rig = Rig(replay, engine, policy, worker)
        try:
            yield rig
        finally:
            await cancel_and_wait(rig.task)
            await engine.aclose()
            await client.aclose()
            await rewards.aclose()


async def until(condition: Callable[[], bool], turn: Callable[[], Awaitable[Any]] | None = None) -> None:
    """Let the loop turn until something holds; the test's timeout bounds it."""
    while not condition():
        await (turn() if turn is not None else asyncio.wait({asyncio.ensure_future(asyncio.sleep(0.002))}))


def check_provenance(trajectory: Trajectory, num_prompt: int) -> set[int]:
    tokens = trajectory.token_ids
    for span in trajectory.version_spans:
        weights = ArithmeticWeights.of(span.version)
        for position in range(span.start_token, span.end_token):
            law = behavior_logprob(weights, tokens[:position], int(tokens[position]))
            assert trajectory.behavior_logprobs[position] == np.float32(law)
    assert trajectory.version_spans[0].start_token == num_prompt
    return {span.version.step for span in trajectory.version_spans}


@pytest.mark.parametrize("late_columns", [False, True])
async def test_tickets_become_whole_trajectories(late_columns: bool) -> None:
    replay = FakeReplay()
    await replay.add(ticket(1), ticket(2), ticket(3, attempt=1))
    async with working(replay, chunk_tokens=2, late_columns=late_columns) as rig:
        await rig.ended(12)
        await rig.finish()
        for number in (1, 2, 3):
            for member in range(4):
                trajectory = rig.trajectory(f"g{number}.{member}")
                prompt = ArithmeticTokenizer().encode(f"train {number}")
                check_provenance(trajectory, len(prompt))
                assert trajectory.token_ids[: len(prompt)].tolist() == prompt
                prompt_segment, model = trajectory.segments
                assert (prompt_segment.kind, prompt_segment.in_loss) == (SegmentKind.PROMPT, False)
                assert (model.kind, model.in_loss, model.engine) == (SegmentKind.MODEL, True, "arithmetic/1")
                assert model.sampling == replace(SAMPLING, seed=1000 * number + member)
                assert trajectory.routing is not None
                text = ArithmeticTokenizer().decode(trajectory.token_ids[len(prompt) :].tolist())
                assert trajectory.reward == len(text)
                assert trajectory.generation_started_at <= trajectory.generation_finished_at
        assert len({tuple(rig.trajectory(f"g1.{m}").token_ids.tolist()) for m in range(4)}) > 1  # seeds differ


class HaltingEngine(ArithmeticEngine):
    """Stands still after each 16 steps until it is told to go on, however late that is."""

    def __init__(self, options: ArithmeticEngineOptions) -> None:
        super().__init__(options)
        self.steps = 0
        self.halts = True

    @property
    def halted(self) -> bool:
        return not self._running.is_set()

    def _step(self, version: PolicyVersion, weights: ArithmeticWeights) -> None:
        super()._step(version, weights)
        self.steps += 1
        if self.halts and self.steps % 16 == 0:
            self._running.clear()

    async def go_on(self) -> None:
        self.halts = False
        await self.resume()


async def test_labels_hold_while_versions_change() -> None:
    replay = FakeReplay()
    long = replace(SAMPLING, max_tokens=800, stop_token_ids=())
    await replay.add(*(ticket(number, sampling=long) for number in range(4)))
    engine = HaltingEngine(ArithmeticEngineOptions(chunk_tokens=4))
    async with working(replay, engine=engine) as rig:
        for step in range(1, 8):
            await until(lambda: engine.halted)
            await rig.policy.update(snapshot(step))
            await engine.resume()
        await until(lambda: engine.halted)
        await engine.go_on()
        await rig.ended(16)
        await rig.finish()
        seen = set[int]()
        for number in range(4):
            for member in range(4):
                seen |= check_provenance(rig.trajectory(f"g{number}.{member}"), len(f"train {number}"))
        assert seen == set(range(8))


async def test_nothing_is_asked_for_before_a_version_is_in_force() -> None:
    replay = FakeReplay()
    async with working(replay, step=None) as rig:
        await until(lambda: replay.joined > 0)
        assert not replay.ticket_requests
        await rig.policy.update(snapshot(3))
        await replay.request_arrived.wait()
        assert replay.ticket_requests[0].version.step == 3
        assert replay.ticket_requests[0].max_members == 96 + 16


async def test_a_server_that_joins_a_finished_run_ends_although_no_version_ever_comes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    replay = FakeReplay()
    replay.finished = True
    async with working(replay, step=None) as rig:
        await rig.finish()
    assert "run rehearsal has finished" in caplog.text
    assert not replay.ticket_requests


async def test_a_server_that_waits_for_its_first_version_hears_that_the_run_has_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_joiner, "_JOIN_WAIT_SECONDS", 0.01)
    replay = FakeReplay()
    async with working(replay, step=None) as rig:
        await until(lambda: replay.joined > 2)  # it is asked again and again
        await rig.finish()
    assert not replay.ticket_requests


async def test_a_new_version_is_told_at_once_and_no_waiting_call_is_given_up() -> None:
    replay = FakeReplay()
    async with working(replay, options=WorkerOptions(ticket_wait_seconds=20.0)) as rig:
        await replay.request_arrived.wait()
        replay.request_arrived.clear()
        await rig.policy.update(snapshot(1))
        await replay.request_arrived.wait()
        assert [request.version.step for request in replay.ticket_requests] == [0, 1]
        # An evaluation of the new version reaches the second call; the first one is still there for others.
        pinned = ticket(1, purpose=Purpose.EVAL, pinned_version=snapshot(1).version, evaluation_id="e")
        await replay.add(pinned)
        await rig.ended(4)
        assert check_provenance(rig.trajectory("g1.0"), len("held out 1")) == {1}
        assert not replay.cancelled_calls


async def test_an_evaluation_of_another_version_is_handed_back() -> None:
    replay = FakeReplay()
    replay.ignore_pins = True
    await replay.add(ticket(1, purpose=Purpose.EVAL, pinned_version=snapshot(1).version, evaluation_id="e"))
    async with working(replay, step=2) as rig:
        await rig.ended(4)
        assert all(rig.failure(f"g1.{member}").retryable for member in range(4))
        assert "this server serves" in rig.failure("g1.0").message


async def test_a_swap_during_an_evaluation_is_noticed() -> None:
    replay = FakeReplay()
    long = replace(SAMPLING, max_tokens=3000, stop_token_ids=())
    version = snapshot(0).version
    await replay.add(ticket(1, purpose=Purpose.EVAL, pinned_version=version, evaluation_id="e", sampling=long))
    engine = HaltingEngine(ArithmeticEngineOptions(chunk_tokens=4))
    async with working(replay, engine=engine) as rig:
        await until(lambda: engine.halted and len(replay.arrived) > 8)
        await rig.policy.update(snapshot(1))
        await engine.go_on()
        await rig.ended(4)
        failure = rig.failure("g1.0")
        assert failure.retryable
        assert "another version came into force" in failure.message
        for item in replay.arrived:  # what was written before is all of the pinned version
            assert not isinstance(item.content, bytes) or b"\x10\x01\x18\x01" not in item.content


async def test_an_aborted_group_is_given_up_and_others_go_on() -> None:
    replay = FakeReplay()
    endless = replace(SAMPLING, max_tokens=4000, stop_token_ids=())

    def judge(item: WriteItem) -> WriteResult | None:
        return result(item, WriteStatus.ABORTED) if item.trajectory_id.startswith("g1.") else None

    replay.judge = judge
    await replay.add(ticket(1, sampling=endless))
    async with working(replay, chunk_tokens=1, max_concurrency=4, token_seconds=0.01) as rig:
        await until(lambda: bool(replay.arrived))
        await until(lambda: not rig.engine._active)
        assert max(item.seq for item in replay.arrived) < 3999  # given up, not sampled to the end
        await replay.add(ticket(2))
        await rig.ended(4)
        assert not any(isinstance(item.content, TrajectoryFailure) for item in replay.arrived)
        assert not rig.worker._open


async def test_a_refused_item_ends_its_trajectory_with_a_failure() -> None:
    replay = FakeReplay()

    def judge(item: WriteItem) -> WriteResult | None:
        invalid = item.trajectory_id == "g1.2" and item.seq == 1 and isinstance(item.content, bytes)
        return result(item, WriteStatus.INVALID, message="odd chunk") if invalid else None

    replay.judge = judge
    await replay.add(ticket(1))
    async with working(replay, chunk_tokens=2) as rig:
        await rig.ended(4)
        failure = rig.failure("g1.2")
        assert not failure.retryable
        assert "odd chunk" in failure.message
        rig.trajectory("g1.1")


async def test_writes_survive_a_stream_that_breaks_again_and_again() -> None:
    replay = FakeReplay()
    await replay.add(*(ticket(number) for number in range(5)))
    replay.break_stream = lambda stream, item: ("before", "after")[stream % 2] if item.seq == 1 and stream < 6 else ""
    async with working(replay, chunk_tokens=3) as rig:
        await rig.ended(20)
        await rig.finish()
        for number in range(5):
            for member in range(4):
                check_provenance(rig.trajectory(f"g{number}.{member}"), len(f"train {number}"))
        assert replay.streams >= 6


async def test_a_chunk_beyond_the_message_limit_is_a_failure_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_server.rollout.trajectory_writer.MAX_ITEM_BYTES", 4096)
    replay = FakeReplay()
    # Routing of 2000 tokens comes at the end, in one chunk after small ones.
    await replay.add(ticket(1, sampling=replace(SAMPLING, max_tokens=2000, stop_token_ids=())))
    options = WorkerOptions(ticket_wait_seconds=0.5, routing_rows=0)
    async with working(replay, late_columns=True, options=options) as rig:
        await rig.ended(4)
        failure = rig.failure("g1.0")
        assert not failure.retryable
        assert "training task 1: a chunk of" in failure.message
        assert all(not written.failure or written.items[-1].seq == 124 for written in replay.written.values())


@pytest.mark.processes
async def test_rewards_that_fail_are_never_data_and_cost_their_own_trajectory_only() -> None:
    replay = FakeReplay()
    await replay.add(*(ticket(number, members=1) for number in range(6)))
    async with working(replay, rewards=faulty_reward(RewardOptions(timeout_seconds=1, processes=1))) as rig:
        await rig.ended(6)
        reasons = [
            "raised ValueError: no verifier",
            "returned nan",
            "returned a str",
            "took longer than 1 s",
            "crashed with SIGSEGV",
        ]
        for number, reason in enumerate(reasons):
            failure = rig.failure(f"g{number}.0")
            assert f"tests.contract.rewards:faulty {reason}" in failure.message
            assert failure.message.endswith(f" on training task {number}")
            assert failure.retryable == (number >= 3)
        assert rig.trajectory("g5.0").reward == 1.0
        await rig.finish()


async def test_a_reward_that_can_no_longer_be_called_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async def score(*_: object) -> float:
        raise ConfigError("the module is gone")

    monkeypatch.setattr(InProcessReward, "score", score)
    replay = FakeReplay()
    await replay.add(ticket(1), ticket(2))
    async with working(replay) as rig:
        with pytest.RaisesGroup(ConfigError, flatten_subgroups=True):
            await asyncio.shield(rig.task)
        # What was open is handed back, so that another server takes it at once.
        assert replay.num_endings == 8
        assert all(written.failure is not None and written.failure.retryable for written in replay.written.values())


async def test_prompts_that_cannot_be_used_name_their_task() -> None:
    replay = FakeReplay()
    await replay.add(ticket(1, task_index=6), ticket(2, task_index=7), ticket(3, task_index=99))
    async with working(replay) as rig:
        await rig.ended(12)
        for number, words in (
            (1, "task 6: its prompt has no tokens"),
            (2, "task 7: its prompt has 4096"),
            (3, "task 99"),
        ):
            for member in range(4):
                failure = rig.failure(f"g{number}.{member}")
                assert not failure.retryable
                assert words in failure.message


async def test_a_stop_hands_back_what_is_open() -> None:
    replay = FakeReplay()
    endless = replace(SAMPLING, max_tokens=4000, stop_token_ids=())
    await replay.add(ticket(1, sampling=endless), ticket(2, sampling=endless))
    async with working(replay, chunk_tokens=4, max_concurrency=4, token_seconds=0.01) as rig:
        await until(lambda: len(replay.arrived) > 8)
        rig.stop.set()
        await asyncio.wait_for(asyncio.shield(rig.task), WAIT_SECONDS)
        # Those decoding and those still queued alike: every member of both groups.
        assert replay.num_endings == 8
        for number in (1, 2):
            for member in range(4):
                failure = rig.failure(f"g{number}.{member}")
                assert failure.retryable
                assert "server-0 stopped" in failure.message


async def test_a_server_that_stops_leaves_the_run_after_its_last_write() -> None:
    replay = FakeReplay()
    await replay.add(ticket(1, sampling=replace(SAMPLING, max_tokens=4000, stop_token_ids=())))
    async with working(replay, chunk_tokens=1, token_seconds=0.01) as rig:
        await until(lambda: bool(replay.arrived))
        rig.stop.set()
        await rig.task
        assert replay.left == ["server-0"]
        assert replay.num_endings == 4
    finished = FakeReplay()
    async with working(finished) as rig:
        await rig.finish()
    assert finished.left == [], "a finished run needs no word"


async def test_a_stop_that_nobody_answers_says_what_becomes_of_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    replay = FakeReplay()
    replay.break_stream = lambda _stream, _item: "exhausted"
    await replay.add(ticket(1, sampling=replace(SAMPLING, max_tokens=4000, stop_token_ids=())))
    async with working(replay, drain_seconds=0.1, chunk_tokens=1, token_seconds=0.01) as rig:
        await until(lambda: replay.streams > 2)
        rig.stop.set()
        await rig.task
    (said,) = [record.getMessage() for record in caplog.records if "could not notify" in record.getMessage()]
    assert "no answer within 0.1 s" in said
    assert said.endswith("issued again when their leases end")
    assert replay.left == []


async def test_a_drained_server_says_so_once_and_keeps_requesting(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")
    replay = FakeReplay()
    replay.drained = Drain(DrainReason.DIVERGING, "2 nats from the others", datetime(2026, 1, 1, tzinfo=UTC))
    async with working(replay, options=WorkerOptions(ticket_wait_seconds=0.01)) as rig:
        await until(lambda: len(replay.ticket_requests) > 3)
        replay.drained = None
        await replay.add(ticket(1))
        await rig.ended(4)
        await rig.finish()
    told = [record.message for record in caplog.records if record.name == "inference_server.rollout.ticket_calls"]
    assert told == [
        "server server-0 is drained (diverging) and gets no tickets until `leeway fleet readmit`: 2 nats from "
        "the others",
        f"server server-0 is readmitted to run {RUN}",
    ]


async def test_tickets_that_arrive_after_the_stop_are_handed_back() -> None:
    replay = FakeReplay()
    async with working(replay, options=WorkerOptions(ticket_wait_seconds=10.0)) as rig:
        await replay.request_arrived.wait()
        rig.stop.set()
        await asyncio.sleep(0)
        await replay.add(ticket(1))  # answers the call that was waiting
        await asyncio.wait_for(asyncio.shield(rig.task), WAIT_SECONDS)
        assert all(rig.failure(f"g1.{member}").retryable for member in range(4))
        assert not replay.cancelled_calls


async def test_a_finished_run_ends_the_worker_without_failures() -> None:
    replay = FakeReplay()
    endless = replace(SAMPLING, max_tokens=4000, stop_token_ids=())
    await replay.add(ticket(1, sampling=endless))
    async with working(replay, token_seconds=0.01, chunk_tokens=1) as rig:
        await until(lambda: bool(replay.arrived))
        await rig.finish()
        assert rig.task.exception() is None
        assert not any(isinstance(item.content, TrajectoryFailure) for item in replay.arrived)


async def test_leases_are_renewed_while_a_reward_takes_long_and_aborted_ones_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release = asyncio.Event()

    async def score(*_: object) -> float:
        await release.wait()
        return 1.0

    monkeypatch.setattr(InProcessReward, "score", score)
    replay = FakeReplay()
    await replay.add(ticket(1, lease_seconds=0.15), ticket(2, lease_seconds=0.15))
    async with working(replay) as rig:
        await until(lambda: {("g1", 1), ("g2", 1)} <= set(replay.renewed))
        replay.abort_on_renewal = {("g1", 1)}
        await until(lambda: [held.ticket.group_id for held in rig.worker._open] == ["g2"])
        release.set()
        await rig.ended(4)
        assert replay.written["g1.0", 1].close is None
        assert replay.written["g2.0", 1].close is not None


async def test_an_engine_that_is_gone_ends_the_worker() -> None:
    replay = FakeReplay()
    endless = replace(SAMPLING, max_tokens=4000, stop_token_ids=())
    await replay.add(ticket(1, sampling=endless))
    async with working(replay, token_seconds=0.01, chunk_tokens=1) as rig:
        await until(lambda: len(replay.arrived) > 3)
        await rig.engine.aclose()
        with pytest.RaisesGroup(pytest.RaisesExc(UnavailableError, match="engine is gone"), flatten_subgroups=True):
            await asyncio.shield(rig.task)
        assert all(rig.failure(f"g1.{member}").retryable for member in range(4))


async def test_an_engine_without_room_is_asked_again() -> None:
    replay = FakeReplay()
    await replay.add(ticket(1))
    async with working(replay, max_concurrency=2, max_queued=0) as rig:
        await rig.ended(4)
        assert all(written.close is not None for written in replay.written.values())


class RawEngine(ArithmeticEngine):
    def info(self) -> Any:
        return replace(super().info(), logprob_mode=LogprobMode.RAW)


class PlainEngine(ArithmeticEngine):
    def info(self) -> Any:
        return replace(super().info(), routing=False, max_topk=0)


@pytest.mark.parametrize(
    ("kind", "sampling", "message"),
    [
        (RawEngine, SAMPLING, "raw distribution"),
        (PlainEngine, SAMPLING, "routing"),
        (PlainEngine, replace(SAMPLING, routing=False, topk=2), "top-2"),
    ],
)
async def test_an_engine_that_cannot_record_what_the_run_needs_is_refused(
    kind: type[ArithmeticEngine], sampling: Any, message: str
) -> None:
    replay = FakeReplay(run_spec(sampling=sampling))
    async with working(replay, engine=kind(ArithmeticEngineOptions())) as rig:
        with pytest.raises(PreconditionError, match=message):
            await asyncio.shield(rig.task)
