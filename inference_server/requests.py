"""What every caller and every engine does with a request: check it before sampling, close it afterwards."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from types import TracebackType

from inference_server.engine import GenerationEnd, GenerationRequest
from leeway.errors import InvalidDataError
from leeway.types import EngineInfo, TrajectoryChunk


def check_request(request: GenerationRequest, info: EngineInfo) -> None:
    """Check a request against what an engine serves.

    Raises:
        InvalidDataError: naming the first thing that the engine cannot do.
    """
    prompt, sampling, signature = request.prompt_token_ids, request.sampling, info.signature
    if prompt.ndim != 1 or prompt.dtype.name != "int32":
        raise InvalidDataError(f"a prompt is int32 [n], but this one is {prompt.dtype.name} {list(prompt.shape)}")
    if not len(prompt):
        raise InvalidDataError("the prompt is empty; give at least one token")
    if len(prompt) + 1 > signature.context_length:
        raise InvalidDataError(
            f"a prompt of {len(prompt)} tokens leaves no room to sample in a context of {signature.context_length}"
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


class Closing:
    """Closes an engine's iterator at the end of a block, which frees the slot it holds."""

    def __init__(self, events: AsyncIterator[TrajectoryChunk | GenerationEnd]) -> None:
        self._events = events

    async def __aenter__(self) -> AsyncIterator[TrajectoryChunk | GenerationEnd]:
        return self._events

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The Protocol promises an iterator; one that holds something is a generator, or has its own aclose.
        aclose = getattr(self._events, "aclose", None)
        if aclose is not None:
            await aclose()
