"""The requests that both sides answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np

from inference_server.engine import GenerationRequest
from leeway.types import SamplingParams

VOCABULARY = 8192
PROMPT_TOKENS = 32
TOPK = 20


@dataclass(frozen=True, slots=True)
class Round:
    """What one side is asked at a time."""

    number: int
    concurrency: int
    requests: int
    tokens: int

    def request(self, index: int) -> GenerationRequest:
        """A request that no other round has, so that no prefix is cached."""
        prompt = np.random.default_rng([self.number, index]).integers(0, VOCABULARY, PROMPT_TOKENS, dtype=np.int32)
        return GenerationRequest(
            f"{self.number}-{index}", prompt, SamplingParams(1.0, self.tokens, (), index, TOPK, routing=False)
        )


async def tokens_per_second(what: Round, sample: Callable[[GenerationRequest], Awaitable[int]]) -> float:
    """Answer a round's requests, so many at a time.

    Args:
        what: the round.
        sample: answers one request and says how many tokens came.
    """
    indices = iter(range(what.requests))
    began = time.perf_counter()

    async def answer() -> int:
        return sum([await sample(what.request(index)) for index in indices])

    counts = await asyncio.gather(*(answer() for _ in range(what.concurrency)))
    seconds = time.perf_counter() - began
    assert sum(counts) == what.requests * what.tokens, counts
    return sum(counts) / seconds
