"""What every engine must do, asked of the real ones over gRPC: exact log-probs, exact routing, true labels.

The servers outlive the tests, so each test puts the weights in force that it needs; a version is never reused.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import numpy as np
import psutil
import pytest
from transformers import PreTrainedModel

from inference_server.engine import Engine
from leeway.errors import InvalidDataError, PreconditionError
from leeway.types import Array, ColumnKind, FinishReason, SamplingParams, WeightSnapshot
from tests.engines.conftest import CONTEXT_LENGTH, VOCAB_SIZE
from tests.engines.engine_server import EngineServer
from tests.engines.in_flight import all_started, always_running, attempted, long_sampling, paused, prompts, swapped
from tests.engines.sampled import PATIENCE_SECONDS, Completion, difference, reference, sample
from tests.harness import tiny_models

EXACT = 1e-4
ENOUGH = 8  # tokens, for other weights to show in one of them


def snapshot(engine: Engine, models: list[PreTrainedModel], step: int, *, ahead: int = 1) -> WeightSnapshot:
    """Weights of a learner that takes over from whoever pushed before, or of the one after it."""
    return tiny_models.snapshot(models[step], step, epoch=_next_epoch(engine, ahead))


def _next_epoch(engine: Engine, ahead: int = 1) -> int:
    version = engine.info().version
    return 1 if version is None else version.epoch + 100 * ahead


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

        async def swap_in_flight() -> list[Completion]:
            await engine.update_weights(snapshot(engine, models, 0))
            update = snapshot(engine, models, 1)
            async with always_running(engine, 300, long_sampling(server, routing=True)) as completions:
                assert await engine.update_weights(update) > 0
            return swapped(completions, 0, 1, num_new=ENOUGH)

        met = await attempted(swap_in_flight, "a swap with a sequence in flight")
        assert engine.info().version is not None
        fresh = [
            await sample(engine, prompt, SamplingParams(1.0, 40, (), 5, 0, routing=True))
            # Prompts long enough for their keys to have been cached, and a new one.
            for prompt in [*prompts(3, 300, 2), *prompts(1, 30, 3)]
        ]
    for completion in met:
        steps = np.array(completion.steps())
        assert (np.diff(steps) >= 0).all()
        logprobs, old = completion.column(ColumnKind.BEHAVIOR_LOGPROBS), reference(models[0], completion)
        assert_near(logprobs, old.logprobs, (steps == 0) & old.decided())
        assert np.abs(logprobs - old.logprobs)[steps == 1].max() > 1e-2
        # Keys and values are kept: a token's routing is that of its only forward.
        first = int((steps == 1).argmax()) + len(completion.prompt) - 1
        routing = np.sort(completion.column(ColumnKind.ROUTING))
        assert old.routing is not None
        before = slice(min(first, old.num_decided))
        np.testing.assert_array_equal(routing[before], old.routing[before])
        assert (routing[first:] != old.routing[first:]).any()
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

        async def swap_twice_in_a_pause() -> list[Completion]:
            await engine.update_weights(snapshot(engine, models, 2))
            updates = [snapshot(engine, models, 3), snapshot(engine, models, 0, ahead=2)]
            async with always_running(engine, 24, long_sampling(server)) as completions, paused(engine):
                await engine.update_weights(updates[0])
                await asyncio.sleep(0.5)  # time for what must not happen
                await engine.update_weights(updates[1])
            for completion in completions:
                steps = np.array(completion.steps())
                assert set(steps) <= {2, 0}
                old = reference(models[2], completion)
                logprobs = completion.column(ColumnKind.BEHAVIOR_LOGPROBS)
                assert_near(logprobs, old.logprobs, (steps == 2) & old.decided())
            return swapped(completions, 2, 0)

        await attempted(swap_twice_in_a_pause, "a pause with a sequence in flight")


async def test_a_closed_iterator_frees_its_slot(server: EngineServer, models: list[PreTrainedModel]) -> None:
    """A waiting request goes on while the other slots are still taken."""
    async with server.connect() as engine:
        await engine.update_weights(snapshot(engine, models, 0))
        long = long_sampling(server)

        async def the_slot_of_a_closed_one() -> bool:
            """Whether a request got it while the others ran."""
            running = await all_started(engine, prompts(engine.info().max_concurrency, 24, 5), long)
            try:
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

        await attempted(the_slot_of_a_closed_one, "a request that is served while the other slots are taken")
        # Nothing is left that would take a slot for good.
        few = SamplingParams(1.0, 4, (), 3, 0)
        await asyncio.gather(*(sample(engine, prompt, few) for prompt in prompts(12, 8, 7)))


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


async def test_an_engines_own_metrics_are_passed_on(server: EngineServer, models: list[PreTrainedModel]) -> None:
    async with server.connect() as engine:
        await engine.update_weights(snapshot(engine, models, 0))
        # An engine counts a step after it has handed out its tokens, but before the next one.
        for prompt in prompts(3, 8, 11):
            await sample(engine, prompt, SamplingParams(1.0, 64, (), 1, 0))
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
        slots = engine.info().max_concurrency
        long = replace(long_sampling(recomputing_server, routing=True), topk=5)

        async def swap_in_flight(old: int, new: int, length: int, *, in_pause: bool) -> list[Completion]:
            await engine.update_weights(snapshot(engine, models, old))
            update = snapshot(engine, models, new)
            async with always_running(engine, length, long) as completions, contextlib.AsyncExitStack() as stack:
                if in_pause:
                    await stack.enter_async_context(paused(engine))
                await engine.update_weights(update)
            return swapped(completions, old, new)

        at_once = await attempted(lambda: swap_in_flight(0, 1, 300, in_pause=False), "a swap with a sequence in flight")
        in_pause = await attempted(
            lambda: swap_in_flight(1, 2, 24, in_pause=True), "a swap in a pause with a sequence in flight"
        )
        assert (await recomputing_server.info()).max_concurrency == slots  # what was wanted is no lack of memory
    await asyncio.to_thread(_assert_ends_with_its_engine, recomputing_server)
    for old, new, met in ((0, 1, at_once), (1, 2, in_pause)):
        num_compared = 0
        for completion in met:
            before = np.array(completion.steps()) == old
            earlier, later = reference(models[old], completion), reference(models[new], completion)
            logprobs = completion.column(ColumnKind.BEHAVIOR_LOGPROBS)
            assert_near(logprobs, earlier.logprobs, before & earlier.decided())
            after = ~before & later.decided()
            num_compared += int(after.sum())
            assert_near(logprobs, later.logprobs, after)
            assert_near(completion.column(ColumnKind.TOPK_LOGPROBS), later.candidates, after)
            # The first token after the swap comes from the position before it, which was computed again.
            first = int(before.sum()) + len(completion.prompt) - 1
            routing = np.sort(completion.column(ColumnKind.ROUTING))
            assert later.routing is not None
            assert earlier.routing is not None
            again = slice(first + 1, later.num_decided)
            np.testing.assert_array_equal(routing[again], later.routing[again])
            # SGLang forgets the routing of the first computation.
            kept = later if recomputing_server.engine == "sglang" else earlier
            assert kept.routing is not None
            once = slice(min(first, kept.num_decided))
            np.testing.assert_array_equal(routing[once], kept.routing[once])
        assert num_compared


def assert_near(found: Array, expected: Array, where: Array) -> None:
    """Equal but for rounding, of the tokens in question; [n] or [n, K], and [n] bool."""
    assert not where.any() or np.abs(found - expected)[where].max() < EXACT


def _assert_ends_with_its_engine(server: EngineServer) -> None:
    """The server notices that its engine is gone, says so and ends, to be started again."""
    children = psutil.Process(server.process.pid).children()
    cores = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
    assert cores
    for core in cores:
        core.kill()
    assert server.process.wait(PATIENCE_SECONDS) == 1
    assert "has died" in server.log.read_text(encoding="utf-8", errors="replace")
