"""Sequences that run while something else happens to an engine.

Nobody can say when something reaches an engine in a process of its own: on a busy machine a client may stand still for
longer than a sequence lasts, and all of them may be between two completions just then. So such a test is a number of
attempts. An attempt that met no sequence in flight says nothing and is followed by another; when MOST_ATTEMPTS in a row
met none, that is not the machine any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from inference_server.engine import Engine
from leeway.types import Int32Array, SamplingParams
from tests.engines.conftest import VOCAB_SIZE
from tests.engines.engine_server import EngineServer
from tests.engines.sampled import PATIENCE_SECONDS, Completion, sample

MOST_ATTEMPTS = 25
# Sequences of equal length that begin together are between two completions together: no two of these are equal.
SHARES = (1.0, 0.83, 0.61, 0.47, 0.71, 0.37)
_T = TypeVar("_T")


async def attempted(attempt: Callable[[], Awaitable[_T]], what: str) -> _T:
    """The first outcome of `attempt` that is not empty."""
    for _ in range(MOST_ATTEMPTS):
        if outcome := await attempt():
            return outcome
    raise AssertionError(f"{what}: not met in {MOST_ATTEMPTS} attempts")


def prompts(count: int, length: int, seed: int) -> list[Int32Array]:
    generator = np.random.default_rng(seed)
    return [generator.integers(2, VOCAB_SIZE, length, dtype=np.int32) for _ in range(count)]


def long_sampling(server: EngineServer, *, routing: bool = False) -> SamplingParams:
    """For a sequence that takes about as long with every engine, which differ in speed."""
    num_tokens = {"transformers": 400, "vllm": 1200, "sglang": 150}[server.engine]
    return SamplingParams(1.0, num_tokens, (), 3, 0, routing=routing)


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
    engine: Engine, length: int, sampling: SamplingParams
) -> AsyncGenerator[list[Completion], None]:
    """Sequences run throughout the block, each followed by the next, from the first chunk of one on; gathers them all.

    There are more of them than slots, so that the server itself has the next at hand when one ends, and no two are
    equally long.

    Args:
        engine: samples them.
        length: of their prompts.
        sampling: of the longest.
    """
    completions: list[Completion] = []
    ending, started = asyncio.Event(), asyncio.Event()

    async def run(prompt: Int32Array, sampling: SamplingParams) -> None:
        while not ending.is_set():
            completions.append(await sample(engine, prompt, sampling, lambda _: started.set()))

    async with asyncio.TaskGroup() as group:
        for prompt, share in zip(prompts(len(SHARES), length, 2), SHARES, strict=True):
            group.create_task(run(prompt, replace(sampling, max_tokens=int(sampling.max_tokens * share))))
        async with asyncio.timeout(PATIENCE_SECONDS):
            await started.wait()
        try:
            yield completions
        finally:
            ending.set()


async def all_started(
    engine: Engine, prompts: Sequence[Int32Array], sampling: SamplingParams
) -> list[asyncio.Task[Completion]]:
    """Begin a sequence with each prompt; each has sampled something."""
    started = [asyncio.Event() for _ in prompts]
    running = [
        asyncio.create_task(sample(engine, prompt, sampling, lambda _, event=event: event.set()))
        for prompt, event in zip(prompts, started, strict=True)
    ]
    async with asyncio.timeout(PATIENCE_SECONDS):
        for event in started:
            await event.wait()
    return running


def swapped(completions: Sequence[Completion], old: int, new: int, *, num_new: int = 1) -> list[Completion]:
    """Those that begin with tokens of one step and end with those of another, `num_new` at least."""
    return [each for each in completions if set(steps := each.steps()) == {old, new} and steps.count(new) >= num_new]
