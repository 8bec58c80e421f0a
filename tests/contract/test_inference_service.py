"""InferenceService over real gRPC, with the arithmetic engine behind it and RemoteEngine in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import numpy as np
import pytest

from inference_server.engine import GenerationRequest
from inference_server.engines.arithmetic import ArithmeticEngine
from inference_server.engines.remote import RemoteEngine
from inference_server.served_policy import ServedPolicy
from inference_server.service import SERVICE_NAME, add_inference_service
from leeway import arithmetic
from leeway.arithmetic import ArithmeticWeights
from leeway.config import ArithmeticEngineOptions
from leeway.errors import CorruptDataError, FencedError, InvalidDataError, PreconditionError, UnavailableError
from leeway.rpc import Security, start_server
from leeway.types import ColumnKind, FinishReason, SamplingParams, TrajectoryChunk, WeightSnapshot
from tests.deadlines import WAIT_SECONDS
from tests.harness.arithmetic_law import policy_version
from tests.harness.completions import RUN, Completion, request, snapshot

WRONG_TYPE: Any = np.array([1], dtype=np.int64)


@asynccontextmanager
async def backend(**options: Any) -> AsyncGenerator[tuple[RemoteEngine, ArithmeticEngine], None]:
    """A served arithmetic engine with weights (1, 0), and a connection to it."""
    async with AsyncExitStack() as stack:
        engine = ArithmeticEngine(ArithmeticEngineOptions(**options))
        stack.push_async_callback(engine.aclose)
        policy = ServedPolicy(engine, RUN)
        server = await start_server("127.0.0.1:0", add_inference_service(engine, policy), [SERVICE_NAME], Security())
        stack.push_async_callback(server.stop, 0.0)
        remote = await RemoteEngine.connect(f"127.0.0.1:{server.port}", Security(), timeout_seconds=WAIT_SECONDS)
        stack.push_async_callback(remote.aclose)
        await remote.update_weights(snapshot(1, 0))
        yield remote, engine


async def test_tokens_carry_the_version_that_sampled_them_across_swaps() -> None:
    async with backend(chunk_tokens=8) as (remote, _):
        # As long as the context: the swaps below come long before the end, however slow the transport is.
        completions = [Completion(request(4000, seed=seed, routing=True)) for seed in range(3)]
        others = [asyncio.create_task(completion.collect(remote)) for completion in completions[1:]]
        step = 0
        async for count in completions[0].events(remote):
            if count % 10 == 0 and step < 6:
                step += 1
                await remote.update_weights(snapshot(1, step))
        await asyncio.gather(*others)
        assert completions[0].end is not None
        assert completions[0].end.num_tokens == 4000
        for completion in completions:
            steps = completion.check_labels()
            assert len(steps) >= 3
            rows = completion.column(ColumnKind.ROUTING)
            tokens = np.concatenate([completion.request.prompt_token_ids, completion.column(ColumnKind.TOKEN_IDS)])
            assert len(rows) == len(tokens) - 1
            version_of = {t: span.version for span in completion.spans for t in range(span.start_token, span.end_token)}
            for position in range(len(rows)):
                version = version_of[max(position + 1, len(completion.request.prompt_token_ids))]
                weights = ArithmeticWeights.of(version)
                assert rows[position].tolist() == arithmetic.routing_row(weights, position, int(tokens[position]))


async def test_late_columns_cover_the_same_tokens() -> None:
    async with backend(chunk_tokens=8, late_columns=True) as (remote, _):
        completion = Completion(request(40, routing=True, topk=5, temperature=0.7))
        async for count in completion.events(remote):
            if count == 2:
                await remote.update_weights(snapshot(1, 1))
        assert all(not chunk.version_spans for chunk in completion.chunks[:-1])
        completion.check_labels()
        assert len(completion.column(ColumnKind.ROUTING)) == 10 + 40 - 1
        top = completion.column(ColumnKind.TOPK_LOGPROBS)
        assert top.shape == (40, 5)
        assert (top[:, 0] >= completion.column(ColumnKind.BEHAVIOR_LOGPROBS)).all()


async def test_equal_seeds_give_equal_samples_and_the_stop_token_is_kept() -> None:
    async with backend() as (remote, _):
        first = await Completion(request(30, seed=5)).collect(remote)
        second = await Completion(request(30, seed=5)).collect(remote)
        tokens = first.column(ColumnKind.TOKEN_IDS)
        assert tokens.tolist() == second.column(ColumnKind.TOKEN_IDS).tolist()
        stop = int(tokens[6])
        stopped = await Completion(request(30, seed=5, stop_token_ids=(stop,))).collect(remote)
        assert stopped.end is not None
        assert stopped.end.finish_reason is FinishReason.STOP
        expected = tokens[: tokens.tolist().index(stop) + 1]
        assert stopped.column(ColumnKind.TOKEN_IDS).tolist() == expected.tolist()
        assert stopped.end.num_tokens == len(expected)


async def test_a_wrong_digest_leaves_the_old_weights() -> None:
    async with backend() as (remote, engine):
        good = snapshot(1, 1)
        flipped = bytes([good.buffers[0][0] ^ 1]) + bytes(good.buffers[0][1:])
        with pytest.raises(CorruptDataError, match="digest"):
            await remote.update_weights(WeightSnapshot(good.version, 1, good.manifest, [flipped]))
        for broken in (b"", bytes(good.buffers[0]) + b"more"):
            with pytest.raises(InvalidDataError, match=r"weights end|more bytes"):
                await remote.update_weights(WeightSnapshot(good.version, 1, good.manifest, [broken]))
        assert engine.info().version == snapshot(1, 0).version
        completion = await Completion(request()).collect(remote)
        assert completion.check_labels() == {0}


async def test_an_older_learner_is_refused() -> None:
    async with backend() as (remote, engine):
        await remote.update_weights(snapshot(2, 3))
        with pytest.raises(PreconditionError, match="epoch 1"):
            await remote.update_weights(snapshot(1, 9))
        # The new learner may go back to a checkpoint's version, of an older epoch.
        await remote.update_weights(snapshot(1, 2, publisher_epoch=3))
        with pytest.raises(PreconditionError, match="epoch 2"):
            await remote.update_weights(snapshot(2, 4))
        assert engine.info().version == snapshot(1, 2).version
        with pytest.raises(FencedError):
            await engine.update_weights(snapshot(2, 4))


async def test_an_update_is_idempotent_and_belongs_to_the_run_and_the_model() -> None:
    async with backend() as (remote, engine):
        assert await remote.update_weights(snapshot(1, 0)) == 0.0
        other = snapshot(1, 1)
        foreign = policy_version("another", 1, 1, history=1)
        with pytest.raises(PreconditionError, match="another run"):
            await remote.update_weights(WeightSnapshot(foreign, 1, other.manifest, other.buffers))
        assert engine.info().version == snapshot(1, 0).version


async def test_pause_keeps_sequences_and_resume_goes_on() -> None:
    async with backend(chunk_tokens=1) as (remote, _):
        completion = Completion(request(200))
        paused_at = 0
        async for count in completion.events(remote):
            if count == 3:
                await remote.pause()
                await remote.pause()
                # Whole new generations need tokens: this one must not end while decoding stands still.
                waiting = asyncio.create_task(Completion(request(1)).collect(remote))
                for _ in range(5):
                    await remote.update_weights(snapshot(1, 0))  # round trips, in which a step would have happened
                assert not waiting.done()
                paused_at = count
                await remote.resume()
                await waiting
        assert paused_at == 3
        assert len(completion.chunks) == 200
        completion.check_labels()


async def test_a_pause_holds_although_a_resume_came_just_before() -> None:
    engine = ArithmeticEngine(ArithmeticEngineOptions(chunk_tokens=1))
    await engine.update_weights(snapshot(1, 0))
    await engine.pause()
    events = engine.generate(request(3))
    first = asyncio.ensure_future(anext(aiter(events)))
    for _ in range(5):
        await asyncio.sleep(0)
    await engine.resume()
    await engine.pause()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not first.done()
    await engine.resume()
    assert isinstance(await first, TrajectoryChunk)
    await engine.aclose()


async def test_cancelling_frees_the_slot() -> None:
    # At this pace the two would take minutes.
    async with backend(max_concurrency=1, chunk_tokens=1, token_seconds=0.05) as (remote, engine):
        endless = asyncio.create_task(Completion(request(4000)).collect(remote))
        queued = asyncio.create_task(Completion(request(4000)).collect(remote))
        while len(engine._waiting) < 1:  # both have arrived
            await remote.update_weights(snapshot(1, 0))
        for task in (endless, queued):
            task.cancel()
        await asyncio.wait([endless, queued])
        completion = await Completion(request(3)).collect(remote)
        assert completion.end is not None
        while engine._active or engine._waiting:
            await remote.update_weights(snapshot(1, 0))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(prompt=""), "empty"),
        (request(prompt="a" * 4096), "no room"),
        (request(topk=21), "at most 20"),
        (request(stop_token_ids=(64,)), "stop token"),
        (GenerationRequest("r", np.array([64], dtype=np.int32), SamplingParams()), "vocabulary"),
        (GenerationRequest("r", np.array([-1], dtype=np.int32), SamplingParams()), "vocabulary"),
        (GenerationRequest("r", WRONG_TYPE, SamplingParams()), "int32"),
        (GenerationRequest("r", np.array([1], dtype=np.int32), SamplingParams(temperature=0.0)), "temperature"),
    ],
)
async def test_bad_requests_are_refused_by_name(bad: GenerationRequest, message: str) -> None:
    async with backend() as (remote, _):
        with pytest.raises(InvalidDataError, match=message):
            await Completion(bad).collect(remote)


async def test_a_stopping_engine_says_so() -> None:
    engine = ArithmeticEngine(ArithmeticEngineOptions(chunk_tokens=1))
    with pytest.raises(PreconditionError, match="no weights"):
        await Completion(request()).collect(engine)
    await engine.update_weights(snapshot(1, 0))
    completion = Completion(request(20))
    events = completion.events(engine)
    assert await anext(events) == 1
    await engine.aclose()
    with pytest.raises(UnavailableError, match="stopping"):
        await Completion(request(20)).collect(engine)
    with pytest.raises(UnavailableError, match="stopping"):
        await anext(events)
