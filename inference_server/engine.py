"""What the rollout worker and the InferenceService need of an engine, and nothing more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, runtime_checkable

from prometheus_client.registry import Collector

from leeway.types import EngineInfo, FinishReason, Int32Array, SamplingParams, TrajectoryChunk, WeightSnapshot


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One completion to sample."""

    request_id: str
    prompt_token_ids: Int32Array  # [prompt]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class GenerationEnd:
    """The end of one completion; times are the engine's own clock, UTC."""

    finish_reason: FinishReason
    num_tokens: int  # sampled tokens
    started_at: datetime
    finished_at: datetime


class Engine(Protocol):
    """A sampler whose weights are replaced while it samples.

    Every sampled token comes with the log-probability it was really sampled with and a version span. Token columns
    start at the prompt's length; routing starts at token 0. Columns may come later than their tokens.
    """

    def info(self) -> EngineInfo:
        """What is served now; `version` is None before the first update."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[TrajectoryChunk | GenerationEnd]:
        """Sample one completion; the last item is the GenerationEnd. Closing the iterator frees what it held.

        Raises:
            InvalidDataError: ids outside the vocabulary, an empty or over-long prompt, an unsupported recording.
            UnavailableError: the engine stops.
        """
        ...

    async def update_weights(self, snapshot: WeightSnapshot) -> float:
        """Swap verified weights in, whole, between two decode steps; return the seconds decoding stood still.

        Raises:
            FencedError: the snapshot's publisher epoch is below the highest seen.
            PreconditionError: the manifest does not fit the model.
        """
        ...

    async def pause(self) -> None:
        """Stop decoding after the current step; running sequences are kept."""
        ...

    async def resume(self) -> None:
        """Go on decoding."""
        ...

    async def aclose(self) -> None:
        """Stop; open iterators raise UnavailableError."""
        ...


@runtime_checkable
class EngineProcess(Protocol):
    """What an engine that samples in processes of its own has beside Engine."""

    async def watch(self) -> None:
        """Wait until those processes have died.

        Raises:
            UnavailableError: they have.
        """
        ...

    def collectors(self) -> Sequence[Collector]:
        """The engine's own metrics, to be served beside Leeway's."""
        ...
