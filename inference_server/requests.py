"""The checks that every engine makes of a request before it samples."""

from __future__ import annotations

from inference_server.engine import GenerationRequest
from leeway.errors import InvalidDataError
from leeway.types import EngineInfo


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
    if any(token_id >= signature.vocab_size for token_id in sampling.stop_token_ids):
        raise InvalidDataError(f"a stop token id is outside the vocabulary of {signature.vocab_size}")
    if sampling.topk > info.max_topk:
        raise InvalidDataError(f"top-{sampling.topk} was asked for; {info.engine} records at most {info.max_topk}")
    if sampling.routing and not info.routing:
        raise InvalidDataError(f"routing was asked for, but {info.engine} does not record it for this model")
