"""PAUSE: decoding stands still, and goes on as if nothing had been."""

from __future__ import annotations

import asyncio

from leeway.conformance.completion import Completion
from leeway.conformance.requirement import Requirement
from leeway.conformance.session import Session
from leeway.conformance.streams import WHOLE
from leeway.conformance.violation import Violation, require
from leeway.types import FinishReason, SamplingParams


async def _stands_still(session: Session) -> str:
    quiet = session.options.quiet_seconds
    # Begun after the reply: whatever comes of it was sampled during the pause.
    async with session.paused(), session.open(session.prompt(7), SamplingParams(max_tokens=1)) as stream:
        reading = asyncio.create_task(stream.read())
        done, _ = await asyncio.wait([reading], timeout=quiet)
        require(not done, "a completion that was begun after the reply to PauseGeneration went on")
        await session.client.resume()
        await reading
        await stream.rest()
        require(len(stream.completion.token_ids) == 1, "a request that waited for the pause's end was not served")
    return f"nothing came for {quiet:g} s; after the resume it did"


async def _keeps_sequences(session: Session) -> str:
    for length in session.longer_and_longer():
        sampling = SamplingParams(max_tokens=length, seed=29)
        completion, met = await _paused_completion(session, sampling)
        if met:
            break
    else:
        raise Violation("no pause met a sequence in flight: the reply should come after the current step")
    reference = await session.generate(session.prompt(8), sampling)
    length = len(completion.token_ids)
    require(
        length == sampling.max_tokens, f"a sequence of {sampling.max_tokens} tokens ended after a pause with {length}"
    )
    require(completion.equals(reference, session.options.tolerance), "a pause changed what was sampled after it")
    return f"{length} tokens, the same as without a pause"


async def _paused_completion(session: Session, sampling: SamplingParams) -> tuple[Completion, bool]:
    """A completion with a pause, and whether it was in flight then: it ends after the resume only."""
    async with session.open(session.prompt(8), sampling) as stream:
        await stream.read()
        async with session.paused():
            reading = asyncio.create_task(stream.rest())
            await asyncio.wait([reading], timeout=session.options.quiet_seconds / 2)
            early = reading.done() and stream.completion.finish_reason in (FinishReason.LENGTH, FinishReason.CONTEXT)
        return await reading, not early


async def _idempotent(session: Session) -> str:
    for call in (session.client.pause, session.client.resume):
        await call()
        await call()
    await session.client.resume()
    completion = await session.generate(session.prompt(7), SamplingParams(max_tokens=1))
    require(len(completion.token_ids) == 1, "after two pauses and a resume nothing is sampled")
    return "paused twice, resumed three times"


REQUIREMENTS = (
    Requirement(
        "PAUSE-1", "after the reply to a pause nothing is sampled until the resume", _stands_still, needs=WHOLE
    ),
    Requirement(
        "PAUSE-2",
        "sequences in flight are kept and go on",
        _keeps_sequences,
        needs=(*WHOLE, "SEED-1", "PAUSE-1", "PAUSE-3"),
    ),
    Requirement("PAUSE-3", "pause and resume may be repeated", _idempotent, needs=WHOLE),
)
