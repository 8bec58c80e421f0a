"""ERROR: a bad request is refused with a message that names the fault, and harms no other request."""

from __future__ import annotations

import math
from collections.abc import Sequence

import grpc
import numpy as np

from leeway.conformance.client import RawPrompt, Refused
from leeway.conformance.requirement import Requirement, Violation, require
from leeway.conformance.session import Session
from leeway.conformance.streams import WHOLE
from leeway.types import Int32Array, SamplingParams

_INT32, _FLOAT32 = 3, 7  # leeway.v1.DataType
_ONE = SamplingParams(max_tokens=1)

_Bad = tuple[str, Int32Array | RawPrompt | int, SamplingParams]
"""A request that must be refused: what is wrong with it, prompt (a number is the kit's own), sampling."""


async def _refused(session: Session, words: Sequence[str], *requests: _Bad) -> str:
    """Each is INVALID_ARGUMENT before any token, its message has one of the words, and a good request is served."""
    findings: list[str] = []
    for what, prompt, sampling in requests:
        async with session.open(prompt, sampling) as stream:
            try:
                await stream.rest()
            except Refused as refusal:
                invalid = refusal.code is grpc.StatusCode.INVALID_ARGUMENT
                require(invalid, f"{what} should be refused as INVALID_ARGUMENT; {refusal}")
                message = refusal.message
            else:
                raise Violation(f"{what} is served")
        require(
            any(word in message.lower() for word in words),
            f"{what} is refused with {message!r}, which does not name what is wrong ({' or '.join(words)})",
        )
        require("\n" not in message.strip(), f"the message for {what} has more than one line")
        require(not stream.completion.chunks, f"{what} is refused after tokens were sent")
        findings.append(f"{what}: {message}")
    completion = await session.generate(0, _ONE)
    require(len(completion.token_ids) == 1, "after a bad request a good one is not served")
    return findings[0]


async def _empty(session: Session) -> str:
    return await _refused(session, ("empty", "prompt"), ("an empty prompt", np.zeros(0, dtype=np.int32), _ONE))


async def _outside_the_vocabulary(session: Session) -> str:
    vocab_size = session.info.signature.vocab_size
    bad: list[_Bad] = []
    for token_id in (vocab_size, -1, 2**31 - 1):
        prompt = session.prompt()
        prompt[len(prompt) // 2] = token_id
        bad.append((f"token id {token_id}", prompt, _ONE))
    finding = await _refused(session, ("vocabulary", "token id"), *bad)
    stopping = SamplingParams(max_tokens=1, stop_token_ids=(vocab_size,))
    await _refused(session, ("vocabulary", "stop"), (f"stop token id {vocab_size}", 0, stopping))
    return finding


async def _too_long(session: Session) -> str:
    length = session.context_length
    words = ("context", "long", "room", "length")
    return await _refused(session, words, (f"a prompt of {length} tokens", session.prompt(length=length), _ONE))


async def _temperature(session: Session) -> str:
    bad = [SamplingParams(temperature=each, max_tokens=1) for each in (0.0, -1.0, math.inf, math.nan)]
    return await _refused(session, ("temperature",), *((f"temperature {each.temperature}", 0, each) for each in bad))


async def _max_tokens(session: Session) -> str:
    return await _refused(session, ("max_tokens",), ("max_tokens 0", 0, SamplingParams(max_tokens=0)))


async def _recording(session: Session) -> str:
    topk = session.info.max_topk + 1
    finding = await _refused(session, ("top",), (f"topk {topk}", 0, SamplingParams(max_tokens=1, topk=topk)))
    if not session.info.routing:
        await _refused(session, ("routing",), ("routing", 0, SamplingParams(max_tokens=1, routing=True)))
    return finding


async def _malformed(session: Session) -> str:
    good = session.prompt().astype("<i4").tobytes()
    count = len(good) // 4
    findings = [
        await _refused(session, words, (what, prompt, _ONE))
        for what, prompt, words in (
            ("a shape larger than its data", RawPrompt(_INT32, (count + 1,), good), ("shape", "bytes", "size")),
            ("a float prompt", RawPrompt(_FLOAT32, (count,), good), ("int32", "dtype", "type")),
            ("a matrix as prompt", RawPrompt(_INT32, (1, count), good), ("int32", "shape", "dimension")),
            ("an element type of 0", RawPrompt(0, (count,), good), ("type", "dtype")),
        )
    ]
    return findings[0]


REQUIREMENTS = (
    Requirement("ERROR-1", "an empty prompt is INVALID_ARGUMENT", _empty, WHOLE),
    Requirement("ERROR-2", "so is a token id outside the vocabulary", _outside_the_vocabulary, WHOLE),
    Requirement("ERROR-3", "so is a prompt that leaves no room", _too_long, WHOLE),
    Requirement("ERROR-4", "so is a temperature that is not above 0", _temperature, WHOLE),
    Requirement("ERROR-5", "so is max_tokens 0", _max_tokens, WHOLE),
    Requirement("ERROR-6", "so is a recording that is not offered", _recording, WHOLE),
    Requirement("ERROR-7", "so is a malformed tensor", _malformed, WHOLE),
)
