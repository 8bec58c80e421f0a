"""What every engine must do, asked of the real ones over gRPC: exact log-probs, exact routing, true labels.

The servers outlive the tests, so each test puts the weights in force that it needs; a version is never reused.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

import numpy as np
import psutil
import pytest
from transformers import PreTrainedModel

from inference_server.engine import Engine
from leeway.errors import InvalidDataError, PreconditionError
from leeway.types import ColumnKind, FinishReason, Int32Array, SamplingParams, WeightSnapshot
from tests.engines.conftest import CONTEXT_LENGTH, VOCAB_SIZE
from tests.engines.engine_server import EngineServer
from tests.engines.sampled import Completion, difference, reference, sample
from tests.unit import tiny_models

EXACT = 1e-4


def prompts(count: int, length: int, seed: int) -> list[Int32Array]:
    generator = np.random.default_rng(seed)
    return [generator.integers(2, VOCAB_SIZE, length, dtype=np.int32) for _ in range(count)]


def snapshot(engine: Engine, models: list[PreTrainedModel], step: int) -> WeightSnapshot:
    """Weights of a learner that takes over from whoever pushed before."""
    return tiny_models.snapshot(models[step], step, epoch=_next_epoch(engine))


def _next_epoch(engine: Engine) -> int:
    version = engine.info().version
    return 1 if version is None else version.epoch + 100


def long_sampling(server: EngineServer, *, routing: bool = False) -> SamplingParams:
    """For a sequence that is likely to run while something else happens: engines differ in speed."""
    num_tokens = {"transformers": 400, "vllm": 1700, "sglang": 150}[server.engine]
    return SamplingParams(1.0, num_tokens, (), 3, 0, routing=routing)


async def test_logprobs_candidates_and_routing_are_those_of_transformers(
    server: EngineServer, models: list[PreTrainedModel]
) -> None:
    async with server.connect() as engine:
        await engine.update_weights(snapshot(engine, models, 0))
        sampling = [SamplingParams(temperature, 40, (), 7, 20, routing=True) for temperature in (1.0, 0.7)]
        completions = await asyncio.gather(
            *(sample(engine, prompt, params) for params in sampling for prompt in prompts(3, 24, 1))
        )
    for completion in completions:
        expected = reference(models[0], completion)
        assert difference(completion, models[0]).max() < EXACT
        assert np.abs(completion.column(ColumnKind.TOPK_LOGPROBS) - expected.candidates).max() < EXACT
        np.testing.assert_array_equal(
            np.sort(completion.column(ColumnKind.TOPK_TOKEN_IDS)), np.sort(expected.topk_token_ids)
        )
        np.testing.assert_array_equal(np.sort(completion.column(ColumnKind.ROUTING)), expected.routing)
        assert set(completion.steps()) == {0}
        assert completion.end is not None
        assert completion.end.finish_reason is FinishReason.LENGTH


async def test_weights_swapped_in_flight_are_labelled_where_they_sampled(
    server: EngineServer, models: list[PreTrainedModel]
) -> None:
    """Tokens before the swap are the old weights', those after it are not; what starts afterwards is the new ones'."""
    async with server.connect() as engine:
        await engine.update_weights(snapshot(engine, models, 0))
        long = long_sampling(server, routing=True)
        async with always_running(engine, prompts(3, 300, 2), long) as completions:
            seconds = await engine.update_weights(snapshot(engine, models, 1))
            assert engine.info().version is not None
        fresh = [
            await sample(engine, prompt, SamplingParams(1.0, 40, (), 5, 0, routing=True))
            # Prompts long enough for their keys to have been cached, and a new one.
            for prompt in [*prompts(3, 300, 2), *prompts(1, 30, 3)]
        ]
    assert seconds > 0
    swapped = [completion for completion in completions if set(completion.steps()) == {0, 1}]
    assert swapped
    for completion in swapped:
        steps = np.array(completion.steps())
        assert (np.diff(steps) >= 0).all()
        old = difference(completion, models[0])
        assert old[steps == 0].max() < EXACT
        assert old[steps == 1].max() > 1e-2
        # Keys and values are kept: a token's routing is that of its only forward.
        first = int((steps == 1).argmax()) + len(completion.prompt) - 1
        routing, expected = completion.column(ColumnKind.ROUTING), reference(models[0], completion).routing
        assert expected is not None
        np.testing.assert_array_equal(np.sort(routing[:first]), expected[:first])
        assert (np.sort(routing[first:]) != expected[first:]).any()
    for completion in fresh:
        assert set(completion.steps()) == {1}
        assert difference(completion, models[1]).max() < EXACT
        np.testing.assert_array_equal(
            np.sort(completion.column(ColumnKind.ROUTING)), reference(models[1], completion).routing
        )


async def test_a_paused_engine_samples_nothing_and_loses_nothing(
    server: EngineServer, models: list[PreTrainedModel]
) -> None:
    """Weights that come and go during a pause sample nothing: swapping them in does not set the engine going."""
    async with server.connect() as engine:
        await engine.update_weights(snapshot(engine, models, 2))
        async with (
            always_running(engine, prompts(3, 24, 4), long_sampling(server)) as completions,
            paused(engine),
        ):
            await engine.update_weights(snapshot(engine, models, 3))
            await asyncio.sleep(0.5)  # time for what must not happen
            await engine.update_weights(snapshot(engine, models, 0))
    steps = [np.array(completion.steps()) for completion in completions]
    assert {step for each in steps for step in each} <= {2, 0}
    assert any(set(each) == {2, 0} for each in steps)
    for completion, each in zip(completions, steps, strict=True):
        old = difference(completion, models[2])[each == 2]
        assert not len(old) or old.max() < EXACT


async def test_a_closed_iterator_frees_its_slot(server: EngineServer, models: list[PreTrainedModel]) -> None:
    """A waiting request goes on while the other slots are still taken."""
    async with server.connect() as engine:
        await engine.update_weights(snapshot(engine, models, 0))
        # The others may end before it does, on a busy machine: then this attempt says nothing.
        assert any([await _gets_the_slot_of_a_closed_one(engine, long_sampling(server)) for _ in range(5)])
        # Nothing is left that would take a slot for good.
        few = SamplingParams(1.0, 4, (), 3, 0)
        await asyncio.gather(*(sample(engine, prompt, few) for prompt in prompts(12, 8, 7)))


async def _gets_the_slot_of_a_closed_one(engine: Engine, long: SamplingParams) -> bool:
    slots = engine.info().max_concurrency
    started = asyncio.Barrier(slots + 1)
    running = [asyncio.create_task(_sample_and_meet(engine, prompt, long, started)) for prompt in prompts(slots, 24, 5)]
    try:
        async with asyncio.timeout(120):
            await started.wait()
        async with paused(engine):
            waiting = asyncio.create_task(sample(engine, prompts(1, 8, 6)[0], SamplingParams(1.0, 2, (), 1, 0)))
            running[0].cancel()
            await asyncio.wait([running[0]])
        await waiting
        return not any(task.done() for task in running[1:])
    finally:
        for task in running:
            task.cancel()
        await asyncio.wait(running)


async def test_what_would_kill_an_engine_is_refused_and_the_engine_lives(
    server: EngineServer, models: list[PreTrainedModel]
) -> None:
    async with server.connect() as engine:
        await engine.update_weights(snapshot(engine, models, 0))
        few = SamplingParams(1.0, 4, (), 1, 0)
        for prompt in ([VOCAB_SIZE], [-1], [5] * CONTEXT_LENGTH, []):
            with pytest.raises(InvalidDataError):
                await sample(engine, np.array(prompt, np.int32), few)
        for sampling in (
            replace(few, stop_token_ids=(VOCAB_SIZE,)),
            replace(few, topk=21),
            replace(few, temperature=0.0),
        ):
            with pytest.raises(InvalidDataError):
                await sample(engine, prompts(1, 8, 8)[0], sampling)
        misfit = tiny_models.snapshot(tiny_models.make_model(0), 9, epoch=_next_epoch(engine))
        with pytest.raises(PreconditionError):
            await engine.update_weights(misfit)
        completion = await sample(engine, prompts(1, 8, 8)[0], replace(few, max_tokens=20))
    assert difference(completion, models[0]).max() < EXACT


async def test_stop_tokens_and_the_context_end_a_completion(
    server: EngineServer, models: list[PreTrainedModel]
) -> None:
    async with server.connect() as engine:
        await engine.update_weights(snapshot(engine, models, 0))
        stopping = SamplingParams(1.0, 200, tuple(range(2, 40)), 3, 0)
        stopped = await asyncio.gather(*(sample(engine, prompt, stopping) for prompt in prompts(4, 8, 9)))
        filled = await sample(engine, prompts(1, CONTEXT_LENGTH - 8, 10)[0], SamplingParams(1.0, 64, (), 3, 0))
    for completion in stopped:
        assert completion.end is not None
        assert completion.end.finish_reason is FinishReason.STOP
        assert completion.token_ids[-1] in range(2, 40)
        assert not set(completion.token_ids[:-1].tolist()) & set(range(2, 40))
    assert filled.end is not None
    assert (filled.end.finish_reason, filled.end.num_tokens) == (FinishReason.CONTEXT, 8)


def test_an_engines_own_metrics_are_passed_on(server: EngineServer) -> None:
    metrics = server.metrics()
    assert "leeway_inference_tokens_total" in metrics
    if server.engine == "vllm":
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "generation_tokens_total"):
            assert f"vllm:{name}" in metrics
        assert metrics["vllm:generation_tokens_total"] > 0
    if server.engine == "sglang":
        for name in ("num_running_reqs", "num_queue_reqs", "token_usage", "generation_tokens_total"):
            assert f"sglang:{name}" in metrics


async def test_running_sequences_are_computed_again_under_new_weights(
    recomputing_server: EngineServer, models: list[PreTrainedModel]
) -> None:
    """What is sampled after the swap is what a learner finds that computes the sequence with the new weights.

    The server is of no use afterwards: its engine's process is killed at the end.
    """
    async with recomputing_server.connect() as engine:
        await engine.update_weights(snapshot(engine, models, 0))
        slots = engine.info().max_concurrency
        long = replace(long_sampling(recomputing_server, routing=True), topk=5)
        async with always_running(engine, prompts(3, 300, 2), long) as completions:
            await engine.update_weights(snapshot(engine, models, 1))
        async with always_running(engine, prompts(3, 24, 4), long) as later, paused(engine):
            await engine.update_weights(snapshot(engine, models, 2))
        assert (await recomputing_server.info()).max_concurrency == slots  # what was wanted is no lack of memory
    await asyncio.to_thread(_assert_ends_with_its_engine, recomputing_server)
    for old, new, sampled in ((0, 1, completions), (1, 2, later)):
        swapped = [completion for completion in sampled if set(completion.steps()) == {old, new}]
        assert swapped
        for completion in swapped:
            before = np.array(completion.steps()) == old
            assert difference(completion, models[old])[before].max() < EXACT
            expected = reference(models[new], completion)
            assert difference(completion, models[new])[~before].max() < EXACT
            listed = completion.column(ColumnKind.TOPK_LOGPROBS)[~before]
            assert np.abs(listed - expected.candidates[~before]).max() < EXACT
            # The first token after the swap comes from the position before it, which was computed again.
            first = int(before.sum()) + len(completion.prompt) - 1
            routing, earlier = completion.column(ColumnKind.ROUTING), reference(models[old], completion).routing
            assert expected.routing is not None
            assert earlier is not None
            np.testing.assert_array_equal(np.sort(routing[first + 1 :]), expected.routing[first + 1 :])
            # SGLang forgets the routing of the first computation.
            kept = expected.routing if recomputing_server.engine == "sglang" else earlier
            np.testing.assert_array_equal(np.sort(routing[:first]), kept[:first])


def _assert_ends_with_its_engine(server: EngineServer) -> None:
    """The server notices that its engine is gone, says so and ends, to be started again."""
    children = psutil.Process(server.process.pid).children()
    cores = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
    assert cores
    for core in cores:
        core.kill()
    assert server.process.wait(120) == 1
    assert "has died" in server.log.read_text(encoding="utf-8", errors="replace")


@contextlib.asynccontextmanager
async def paused(engine: Engine) -> AsyncGenerator[None, None]:
    """Goes on whatever happens: other tests use the server, too."""
    await engine.pause()
    try:
        yield
    finally:
        await engine.resume()


@contextlib.asynccontextmanager
async def always_running(
    engine: Engine, prompts: Sequence[Int32Array], sampling: SamplingParams
) -> AsyncGenerator[list[Completion], None]:
    """Sequences run throughout the block, each followed by the next, however fast the engine; gathers them all."""
    completions: list[Completion] = []
    ending = asyncio.Event()
    started = asyncio.Barrier(len(prompts) + 1)

    async def run(prompt: Int32Array) -> None:
        completions.append(await _sample_and_meet(engine, prompt, sampling, started))
        while not ending.is_set():
            completions.append(await sample(engine, prompt, sampling))

    async with asyncio.TaskGroup() as group:
        for prompt in prompts:
            group.create_task(run(prompt))
        async with asyncio.timeout(120):
            await started.wait()
        try:
            yield completions
        finally:
            ending.set()


async def _sample_and_meet(
    engine: Engine, prompt: Int32Array, sampling: SamplingParams, started: asyncio.Barrier
) -> Completion:
    """Sample, and meet the others after the first chunk."""
    waiting: list[asyncio.Task[int]] = []

    def on_chunk(completion: Completion) -> None:
        if not waiting:
            waiting.append(asyncio.create_task(started.wait()))

    return await sample(engine, prompt, sampling, on_chunk)
