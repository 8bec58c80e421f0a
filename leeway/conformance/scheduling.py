"""PAUSE, LIMIT, STOP: decoding that stands still, requests at the limits, and a server that stops cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import grpc

from leeway.conformance.client import BackendClient, Completion, Refused
from leeway.conformance.own_server import OwnServer
from leeway.conformance.requirement import NotSupportedError, Requirement, Violation, require
from leeway.conformance.session import Session
from leeway.conformance.streams import WHOLE, require_ended
from leeway.conformance.updates import require_covered
from leeway.rpc import cancel_and_wait
from leeway.types import FinishReason, SamplingParams

_MOST_AT_ONCE = 256
_MOST_PROBES = 3


# PAUSE


async def _stands_still(session: Session) -> str:
    quiet = session.options.quiet_seconds
    # Begun after the reply: whatever comes of it was sampled during the pause.
    async with session.paused(), session.open(7, SamplingParams(max_tokens=1)) as stream:
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
    reference = await session.generate(8, sampling)
    length = len(completion.token_ids)
    wanted = sampling.max_tokens
    require(length == wanted, f"a sequence of {wanted} tokens ended after a pause with {length}")
    require(completion.equals(reference, session.options.tolerance), "a pause changed what was sampled after it")
    return f"{length} tokens, the same as without a pause"


async def _paused_completion(session: Session, sampling: SamplingParams) -> tuple[Completion, bool]:
    """A completion with a pause, and whether it was in flight then: it ends after the resume only."""
    async with session.open(8, sampling) as stream:
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
    completion = await session.generate(7, SamplingParams(max_tokens=1))
    require(len(completion.token_ids) == 1, "after two pauses and a resume nothing is sampled")
    return "paused twice, resumed three times"


# LIMIT


async def _longest_prompt(session: Session) -> str:
    room = 1 + min(2, session.context_length - 2)
    for left in {1, room}:
        prompt = session.prompt(10, length=session.context_length - left)
        completion = await session.generate(prompt, SamplingParams(max_tokens=left + 4))
        found = len(completion.token_ids)
        require(found == left, f"a prompt of {len(prompt)} tokens leaves room for {left}, but {found} were sampled")
        require_ended(completion, FinishReason.CONTEXT, "a full context")
    return f"{session.context_length - 1} tokens, then CONTEXT"


async def _many_at_once(session: Session) -> str:
    at_once = min(session.info.max_concurrency, _MOST_AT_ONCE)
    count = min(2 * at_once, _MOST_AT_ONCE)
    length = session.at_most(16)

    async def one(number: int) -> Completion | None:
        try:
            return await session.generate(number, SamplingParams(max_tokens=length, seed=number))
        except Refused as refusal:
            require(refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED, f"with {count} requests at once {refusal}")
            return None

    # Begun during a pause, so that they are in flight together however short they are.
    async with session.paused():
        tasks = [asyncio.create_task(one(number)) for number in range(count)]
        await asyncio.wait(tasks, timeout=session.options.quiet_seconds)
    outcomes = await asyncio.gather(*tasks)
    served = [completion for completion in outcomes if completion is not None]
    number = len(served)
    require(number >= at_once, f"of {count} requests at once {number} were served; max_concurrency is {at_once}")
    for completion in served:
        sampled = len(completion.token_ids)
        require(sampled == length, f"{sampled} of {length} tokens came of one of them")
        require(len(completion.logprobs) == length, "log-probs are missing in one of them")
        require_covered(completion)
    return f"{count} requests at once, {number} served whole, {count - number} RESOURCE_EXHAUSTED"


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
    """Duration of a sequence that fills the context, extrapolated from a shorter one."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    completion = await session.generate(11, SamplingParams(max_tokens=session.long_tokens))
    return (loop.time() - begun) * session.longest / max(len(completion.token_ids), 1)


async def _served_after_cancelling(session: Session, limit: float, rounds: int) -> str | None:
    """Cancel requests; a description of them if one after them is served within the limit, else None."""
    longest = session.longest
    count = min(rounds * session.info.max_concurrency, 2 * _MOST_AT_ONCE)
    decoding = asyncio.Semaphore(0)

    async def abandoned(number: int) -> None:
        async with session.open(number, SamplingParams(max_tokens=longest, seed=number)) as stream:
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
            completion = await session.generate(12, SamplingParams(max_tokens=1))
    except TimeoutError:
        return None
    require(len(completion.token_ids) == 1, "the request after the cancelled ones was not served")
    return f"{count} requests of {longest} tokens cancelled; the next was served within {limit:.1f} s"


# STOP: of a server of the same kind, started by the kit


@asynccontextmanager
async def _own_server(session: Session) -> AsyncGenerator[tuple[OwnServer, Session]]:
    """A server of the kit's own, serving its weights if there are any."""
    if session.own_server is None:
        raise NotSupportedError("the kit was not told how to start such a server; give --command")
    async with session.own_server() as server:
        client = BackendClient(server.address, session.security, session.options.call_seconds)
        own = Session(client, session.options, session.base, session.security)
        try:
            await own.introduce()
            if own.base is not None:
                await own.push(own.base)
            yield server, own
        finally:
            await client.aclose()


async def _stopped(session: Session, server: OwnServer) -> int:
    server.terminate()
    try:
        async with asyncio.timeout(session.options.stop_seconds):
            return await server.wait()
    except TimeoutError:
        raise Violation(f"{session.options.stop_seconds:g} s after SIGTERM the server still runs") from None


async def _idle(session: Session) -> str:
    async with _own_server(session) as (server, own):
        if own.served is not None:
            await own.generate(0, SamplingParams(max_tokens=4))
        code = await _stopped(session, server)
    require(code == 0, f"SIGTERM ended the server with {_how(code)}, not code 0")
    return "SIGTERM, then code 0"


async def _in_flight(session: Session) -> str:
    async with _own_server(session) as (server, own):
        sampling = SamplingParams(max_tokens=own.longest)
        # Standing still, the sequence cannot end by itself before the signal comes.
        await own.client.pause()
        async with own.open(0, sampling) as stream:
            reading = asyncio.create_task(stream.rest())
            await own.client.info()  # one answer of the server: by then the request before it is there, too
            try:
                code = await _stopped(session, server)
                await asyncio.wait([reading], timeout=session.options.stop_seconds)
                require(reading.done(), "the server is gone, but a stream from it has not ended")
                try:
                    reason = reading.result().finish_reason
                except Refused as refusal:
                    ended = refusal.code.name
                else:
                    require(reason is not None, "the stream of a stopping server ended without status")
                    ended = f"finished as {reason and reason.name}"
            finally:
                await cancel_and_wait(reading)
    require(code == 0, f"SIGTERM with a sequence in flight ended the server with {_how(code)}, not code 0")
    return f"the stream in flight: {ended}"


def _how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"


REQUIREMENTS = (
    Requirement("PAUSE-1", "after the reply to a pause nothing is sampled until the resume", _stands_still, WHOLE),
    Requirement(
        "PAUSE-2", "sequences in flight are kept and go on", _keeps_sequences, (*WHOLE, "SEED-1", "PAUSE-1", "PAUSE-3")
    ),
    Requirement("PAUSE-3", "pause and resume may be repeated", _idempotent, WHOLE),
    Requirement("LIMIT-1", "the longest prompt is served, and a full context ends as CONTEXT", _longest_prompt, WHOLE),
    Requirement(
        "LIMIT-2", "max_concurrency requests at once are served whole", _many_at_once, (*WHOLE, "VERSION-1", "PAUSE-3")
    ),
    Requirement("LIMIT-3", "cancelling a call frees what it held", _cancelling_frees, (*WHOLE, "PAUSE-3")),
    Requirement("STOP-1", "SIGTERM ends an idle server with code 0, soon", _idle),
    Requirement(
        "STOP-2", "and one with a sequence in flight, whose stream ends with a status", _in_flight, ("STOP-1",)
    ),
)
