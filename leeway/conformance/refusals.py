"""ERROR: a bad request is refused by name, and harms nobody else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import grpc
import numpy as np

from leeway.conformance.client import RawPrompt, Refused, Stream
from leeway.conformance.requirement import Requirement
from leeway.conformance.session import Session
from leeway.conformance.streams import WHOLE
from leeway.conformance.violation import Violation, require
from leeway.types import SamplingParams

_INT32, _FLOAT32 = 3, 7  # leeway.v1.DataType


async def _refused(what: str, stream: Stream, words: Sequence[str]) -> str:
    """The call is INVALID_ARGUMENT before any token, and the message has one of the words."""
    async with stream:
        try:
            await stream.rest()
        except Refused as refusal:
            require(
                refusal.code is grpc.StatusCode.INVALID_ARGUMENT,
                f"{what} should be refused as INVALID_ARGUMENT; {refusal}",
            )
            message = refusal.message.lower()
            require(
                any(word in message for word in words),
                f"{what} is refused with {refusal.message!r}, which does not name what is wrong ({' or '.join(words)})",
            )
            require("\n" not in refusal.message.strip(), f"the message for {what} has more than one line")
            require(not stream.completion.chunks, f"{what} is refused after tokens were sent")
            return f"{what}: {refusal.message}"
    raise Violation(f"{what} is served")


async def _still_serves(session: Session, finding: str) -> str:
    completion = await session.generate(session.prompt(), SamplingParams(max_tokens=1))
    require(len(completion.token_ids) == 1, "after a bad request a good one is not served")
    return finding


async def _empty(session: Session) -> str:
    stream = session.open(np.zeros(0, dtype=np.int32), SamplingParams(max_tokens=1))
    return await _still_serves(session, await _refused("an empty prompt", stream, ("empty", "prompt")))


async def _outside_the_vocabulary(session: Session) -> str:
    vocab_size = session.info.signature.vocab_size
    findings: list[str] = []
    for token_id in (vocab_size, -1, 2**31 - 1):
        prompt = session.prompt().copy()
        prompt[len(prompt) // 2] = token_id
        stream = session.open(prompt, SamplingParams(max_tokens=1))
        findings.append(await _refused(f"token id {token_id}", stream, ("vocabulary", "token id")))
    stream = session.open(session.prompt(), SamplingParams(max_tokens=1, stop_token_ids=(vocab_size,)))
    await _refused(f"stop token id {vocab_size}", stream, ("vocabulary", "stop"))
    return await _still_serves(session, findings[0])


async def _too_long(session: Session) -> str:
    prompt = session.prompt(length=session.context_length)
    words = ("context", "long", "room", "length")
    finding = await _refused(
        f"a prompt of {len(prompt)} tokens", session.open(prompt, SamplingParams(max_tokens=1)), words
    )
    return await _still_serves(session, finding)


async def _temperature(session: Session) -> str:
    findings = [
        await _refused(
            f"temperature {temperature}",
            session.open(session.prompt(), SamplingParams(temperature=temperature, max_tokens=1)),
            ("temperature",),
        )
        for temperature in (0.0, -1.0, math.inf, math.nan)
    ]
    return await _still_serves(session, findings[0])


async def _max_tokens(session: Session) -> str:
    stream = session.open(session.prompt(), SamplingParams(max_tokens=0))
    return await _still_serves(session, await _refused("max_tokens 0", stream, ("max_tokens",)))


async def _recording(session: Session) -> str:
    topk = session.info.max_topk + 1
    stream = session.open(session.prompt(), SamplingParams(max_tokens=1, topk=topk))
    finding = await _refused(f"topk {topk}", stream, ("top",))
    if not session.info.routing:
        stream = session.open(session.prompt(), SamplingParams(max_tokens=1, routing=True))
        await _refused("routing", stream, ("routing",))
    return await _still_serves(session, finding)


async def _malformed(session: Session) -> str:
    good = session.prompt().astype("<i4").tobytes()
    count = len(good) // 4
    findings = [
        await _refused(what, session.client.open_raw(prompt, SamplingParams(max_tokens=1)), words)
        for what, prompt, words in (
            ("a shape larger than its data", RawPrompt(_INT32, (count + 1,), good), ("shape", "bytes", "size")),
            ("a float prompt", RawPrompt(_FLOAT32, (count,), good), ("int32", "dtype", "type")),
            ("a matrix as prompt", RawPrompt(_INT32, (1, count), good), ("int32", "shape", "dimension")),
            ("an element type of 0", RawPrompt(0, (count,), good), ("type", "dtype")),
        )
    ]
    return await _still_serves(session, findings[0])


REQUIREMENTS = (
    Requirement("ERROR-1", "an empty prompt is INVALID_ARGUMENT", _empty, needs=WHOLE),
    Requirement("ERROR-2", "so is a token id outside the vocabulary", _outside_the_vocabulary, needs=WHOLE),
    Requirement("ERROR-3", "so is a prompt that leaves no room", _too_long, needs=WHOLE),
    Requirement("ERROR-4", "so is a temperature that is not above 0", _temperature, needs=WHOLE),
    Requirement("ERROR-5", "so is max_tokens 0", _max_tokens, needs=WHOLE),
    Requirement("ERROR-6", "so is a recording that is not offered", _recording, needs=WHOLE),
    Requirement("ERROR-7", "so is a malformed tensor", _malformed, needs=WHOLE),
)
