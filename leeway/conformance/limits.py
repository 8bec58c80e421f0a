"""LIMIT: the longest prompt, many requests at once, and slots that are freed."""

from __future__ import annotations

import asyncio
import contextlib
import math

import grpc

from leeway.conformance.client import Refused
from leeway.conformance.completion import Completion
from leeway.conformance.requirement import Requirement
from leeway.conformance.session import Session
from leeway.conformance.streams import WHOLE
from leeway.conformance.versions import require_covered
from leeway.conformance.violation import Violation, require
from leeway.types import FinishReason, SamplingParams

_MOST_AT_ONCE = 256
_MOST_PROBES = 3


async def _longest_prompt(session: Session) -> str:
    room = 1 + min(2, session.context_length - 2)
    for left in {1, room}:
        prompt = session.prompt(10, length=session.context_length - left)
        completion = await session.generate(prompt, SamplingParams(max_tokens=left + 4))
        found, reason = len(completion.token_ids), completion.finish_reason
        require(found == left, f"a prompt of {len(prompt)} tokens leaves room for {left}, but {found} were sampled")
        require(
            reason is FinishReason.CONTEXT,
            f"a full context ended a completion as {reason and reason.name}, not CONTEXT",
        )
    return f"{session.context_length - 1} tokens, then CONTEXT"


async def _many_at_once(session: Session) -> str:
    at_once = min(session.info.max_concurrency, _MOST_AT_ONCE)
    count = min(2 * at_once, _MOST_AT_ONCE)
    length = min(16, session.long_tokens)

    async def one(number: int) -> Completion | None:
        try:
            return await session.generate(session.prompt(number), SamplingParams(max_tokens=length, seed=number))
        except Refused as refusal:
            require(refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED, f"with {count} requests at once {refusal}")
            return None

    # Begun during a pause, so that they are in flight together however short they are.
    async with session.paused():
        tasks = [asyncio.create_task(one(number)) for number in range(count)]
        await asyncio.wait(tasks, timeout=session.options.quiet_seconds)
    outcomes = await asyncio.gather(*tasks)
    served = [completion for completion in outcomes if completion is not None]
    require(
        len(served) >= at_once, f"of {count} requests at once {len(served)} were served; max_concurrency is {at_once}"
    )
    for completion in served:
        require(
            len(completion.token_ids) == length, f"{len(completion.token_ids)} of {length} tokens came of one of them"
        )
        require(len(completion.logprobs) == length, "log-probs are missing in one of them")
        require_covered(completion)
    return f"{count} requests at once, {len(served)} served whole, {count - len(served)} RESOURCE_EXHAUSTED"


async def _cancelling_frees(session: Session) -> str:
    """Fill every slot several times over, cancel it all, and see how soon one more request is served.

    A server that goes on with what was cancelled is late by what that takes: at the highest speed that was seen, three
    times the limit. One that is only late because its machine is busy is not late every time, the limit doubled each.
    """
    whole_seconds, limit = math.inf, 0.0
    for attempt in range(_MOST_PROBES):
        whole_seconds = min([whole_seconds, *[await _whole_seconds(session) for _ in range(3)]])
        limit = max(session.options.probe_seconds * 2**attempt, whole_seconds / 2)
        served = await _served_after_cancelling(session, limit, math.ceil(3 * limit / max(whole_seconds, 1e-3)))
        if served is not None:
            return served
    raise Violation(f"requests were cancelled {_MOST_PROBES} times, and {limit:.1f} s after the last no slot was free")


async def _whole_seconds(session: Session) -> float:
    """How long a sequence that fills the context takes, from a shorter one."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    completion = await session.generate(session.prompt(11), SamplingParams(max_tokens=session.long_tokens))
    longest = session.context_length - len(session.prompt())
    return (loop.time() - begun) * longest / max(len(completion.token_ids), 1)


async def _served_after_cancelling(session: Session, limit: float, rounds: int) -> str | None:
    """What was cancelled, if a request after it is served within the limit."""
    longest = session.context_length - len(session.prompt())
    count = min(rounds * session.info.max_concurrency, 2 * _MOST_AT_ONCE)
    decoding = asyncio.Semaphore(0)

    async def abandoned(number: int) -> None:
        async with session.open(session.prompt(number), SamplingParams(max_tokens=longest, seed=number)) as stream:
            with contextlib.suppress(Refused):  # what became of them is LIMIT-2's subject
                await stream.read()
                decoding.release()
                await stream.rest()

    tasks: list[asyncio.Task[None]] = []
    try:
        # Begun during a pause, so that those that find no slot have arrived, too, before the first ones end.
        async with session.paused():
            tasks = [asyncio.create_task(abandoned(number)) for number in range(count)]
            await asyncio.wait(tasks, timeout=session.options.quiet_seconds)
        for _ in range(min(count, session.info.max_concurrency)):
            await decoding.acquire()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    try:
        async with asyncio.timeout(limit):
            completion = await session.generate(session.prompt(12), SamplingParams(max_tokens=1))
    except TimeoutError:
        return None
    require(len(completion.token_ids) == 1, "the request after the cancelled ones was not served")
    return f"{count} requests of {longest} tokens cancelled; the next was served within {limit:.1f} s"


REQUIREMENTS = (
    Requirement("LIMIT-1", "the longest prompt is served, and a full context ends as CONTEXT", _longest_prompt, WHOLE),
    Requirement(
        "LIMIT-2", "max_concurrency requests at once are served whole", _many_at_once, (*WHOLE, "VERSION-1", "PAUSE-3")
    ),
    Requirement("LIMIT-3", "cancelling a call frees what it held", _cancelling_frees, needs=(*WHOLE, "PAUSE-3")),
)
