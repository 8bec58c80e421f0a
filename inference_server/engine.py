"""The interface of an engine: all that the rollout worker and the InferenceService need of it."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, runtime_checkable

from prometheus_client.registry import Collector

from leeway.config import ModelEngineOptions
from leeway.errors import ConfigError, InvalidDataError
from leeway.types import (
    EngineInfo,
    FinishReason,
    Int32Array,
    ModelSignature,
    SamplingParams,
    TrajectoryChunk,
    WeightSnapshot,
)


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
        """The model and version served now; `version` is None before the first update."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TrajectoryChunk | GenerationEnd, None]:
        """Sample one completion; the last item is the GenerationEnd. Closing the iterator frees what it held.

        Raises:
            InvalidDataError: ids outside the vocabulary, an empty or over-long prompt, an unsupported recording.
            UnavailableError: the engine stops.
        """
        ...

    async def update_weights(self, snapshot: WeightSnapshot) -> float:
        """Swap verified weights in between two decode steps; return the seconds that decoding paused.

        Raises:
            FencedError: the snapshot's publisher epoch is below the highest seen.
            PreconditionError: the manifest does not fit the model.
        """
        ...

    async def pause(self) -> None:
        """Stop decoding after the current step; running sequences are kept."""
        ...

    async def resume(self) -> None:
        """Continue decoding."""
        ...

    async def aclose(self) -> None:
        """Stop; open iterators raise UnavailableError."""
        ...


@runtime_checkable
class EngineProcess(Protocol):
    """The additional interface of an engine that samples in processes of its own."""

    async def watch(self) -> None:
        """Wait until one of those processes has died.

        Raises:
            UnavailableError: always, with the reason.
        """
        ...

    def collectors(self) -> Sequence[Collector]:
        """The engine's own metrics, to be served beside Leeway's."""
        ...


def check_request(request: GenerationRequest, info: EngineInfo, context_length: int | None = None) -> None:
    """Check a request against the description of an engine.

    Args:
        request: what a client sent.
        info: the engine's description.
        context_length: the engine's own limit, where it is shorter than the model's.

    Raises:
        InvalidDataError: naming the first thing that the engine cannot do.
    """
    prompt, sampling, signature = request.prompt_token_ids, request.sampling, info.signature
    context_length = context_length or signature.context_length
    if prompt.ndim != 1 or prompt.dtype.name != "int32":
        raise InvalidDataError(f"a prompt is int32 [n], but this one is {prompt.dtype.name} {list(prompt.shape)}")
    if not len(prompt):
        raise InvalidDataError("the prompt is empty; give at least one token")
    if len(prompt) + 1 > context_length:
        raise InvalidDataError(
            f"a prompt of {len(prompt)} tokens leaves no room to sample in a context of {context_length}"
        )
    if int(prompt.min()) < 0 or int(prompt.max()) >= signature.vocab_size:
        raise InvalidDataError(f"a prompt token id is outside the vocabulary of {signature.vocab_size}")
    if any(not 0 <= token_id < signature.vocab_size for token_id in sampling.stop_token_ids):
        raise InvalidDataError(f"a stop token id is outside the vocabulary of {signature.vocab_size}")
    if sampling.topk > info.max_topk:
        raise InvalidDataError(f"top-{sampling.topk} was asked for; {info.engine} records at most {info.max_topk}")
    if sampling.routing and not info.routing:
        raise InvalidDataError(f"routing was asked for, but {info.engine} does not record it for this model")
    if not (math.isfinite(sampling.temperature) and sampling.temperature > 0):
        raise InvalidDataError(f"temperature {sampling.temperature} is not a number greater than 0")
    if sampling.max_tokens < 1:
        raise InvalidDataError(f"max_tokens {sampling.max_tokens} is below 1")
    if not 0 <= sampling.seed < 2**64:
        raise InvalidDataError(f"seed {sampling.seed} is not an unsigned 64-bit number")


def check_context_length(options: ModelEngineOptions, signature: ModelSignature) -> None:
    """Refuse a context that the model was not made for.

    Raises:
        ConfigError: it is longer than the model's.
    """
    if options.context_length is not None and options.context_length > signature.context_length:
        raise ConfigError(
            f"context_length {options.context_length} is more than the model's {signature.context_length}; "
            "lower it or leave it unset"
        )
