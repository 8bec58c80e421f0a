"""Requests to an arithmetic engine, and all that comes of one."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import numpy as np

from inference_server.engine import GenerationEnd, GenerationRequest
from inference_server.engines.arithmetic import ArithmeticEngine
from inference_server.engines.remote import RemoteEngine
from leeway import arithmetic
from leeway.arithmetic import ArithmeticWeights
from leeway.types import ColumnKind, SamplingParams, TrajectoryChunk, VersionSpan, WeightSnapshot
from tests.harness.arithmetic_law import behavior_logprob, policy_version

RUN = "rehearsal"


def snapshot(epoch: int, step: int, publisher_epoch: int | None = None) -> WeightSnapshot:
    manifest, buffers = arithmetic.published_weights(epoch, step)
    version = policy_version(RUN, epoch, step, history=epoch)
    return WeightSnapshot(version, epoch if publisher_epoch is None else publisher_epoch, manifest, buffers)


def request(max_tokens: int = 40, prompt: str = "sort 3 1 2", **sampling: Any) -> GenerationRequest:
    ids = np.array(arithmetic.ArithmeticTokenizer().encode(prompt), dtype=np.int32)
    return GenerationRequest("r", ids, SamplingParams(max_tokens=max_tokens, **sampling))


class Completion:
    """Everything that came of one request."""

    def __init__(self, generation: GenerationRequest) -> None:
        self.request = generation
        self.chunks: list[TrajectoryChunk] = []
        self.end: GenerationEnd | None = None

    async def collect(self, engine: RemoteEngine | ArithmeticEngine) -> Completion:
        async for _ in self.events(engine):
            pass
        return self

    async def events(self, engine: RemoteEngine | ArithmeticEngine) -> AsyncIterator[int]:
        """Collects; yields the number of chunks so far."""
        async with aclosing(engine.generate(self.request)) as events:
            async for event in events:
                if isinstance(event, GenerationEnd):
                    self.end = event
                else:
                    self.chunks.append(event)
                    yield len(self.chunks)

    def column(self, kind: ColumnKind) -> np.ndarray:
        columns = [column for chunk in self.chunks for column in chunk.columns if column.kind is kind]
        for before, after in itertools.pairwise(columns):
            assert before.end_token == after.start_token
        return np.concatenate([column.values for column in columns])

    @property
    def spans(self) -> list[VersionSpan]:
        return [span for chunk in self.chunks for span in chunk.version_spans]

    def check_labels(self) -> set[int]:
        """Every token's log-prob is the law's at its label; returns the steps that sampled."""
        prompt = self.request.prompt_token_ids
        tokens = np.concatenate([prompt, self.column(ColumnKind.TOKEN_IDS)])
        logprobs = self.column(ColumnKind.BEHAVIOR_LOGPROBS)
        temperature = self.request.sampling.temperature
        at = len(prompt)
        for span in self.spans:
            assert span.start_token == at
            at = span.end_token
            weights = ArithmeticWeights.of(span.version)
            for position in range(span.start_token, span.end_token):
                law = behavior_logprob(weights, tokens[:position], int(tokens[position]), temperature)
                assert logprobs[position - len(prompt)] == np.float32(law)
        assert at == len(tokens)
        return {span.version.step for span in self.spans}
