"""STOP: a server of the same kind, started by the kit, stops cleanly. Only if the kit can start one."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from leeway.conformance.client import BackendClient, Refused
from leeway.conformance.own_server import OwnServer
from leeway.conformance.requirement import Requirement
from leeway.conformance.session import Session
from leeway.conformance.violation import NotSupportedError, Violation, require
from leeway.rpc import cancel_and_wait
from leeway.types import SamplingParams


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
            await own.generate(own.prompt(), SamplingParams(max_tokens=4))
        code = await _stopped(session, server)
    require(code == 0, f"SIGTERM ended the server with {_how(code)}, not code 0")
    return "SIGTERM, then code 0"


async def _in_flight(session: Session) -> str:
    async with _own_server(session) as (server, own):
        sampling = SamplingParams(max_tokens=own.context_length - len(own.prompt()))
        # Standing still, the sequence cannot end by itself before the signal comes.
        await own.client.pause()
        async with own.open(own.prompt(), sampling) as stream:
            reading = asyncio.create_task(stream.rest())
            await own.client.info()  # one answer of the server: by then the request before it is there, too
            try:
                code = await _stopped(session, server)
                await asyncio.wait([reading], timeout=session.options.stop_seconds)
                require(reading.done(), "the server is gone, but a stream from it has not ended")
                try:
                    completion = reading.result()
                except Refused as refusal:
                    ended = refusal.code.name
                else:
                    require(
                        completion.finish_reason is not None, "the stream of a stopping server ended without status"
                    )
                    ended = f"finished as {completion.finish_reason and completion.finish_reason.name}"
            finally:
                await cancel_and_wait(reading)
    require(code == 0, f"SIGTERM with a sequence in flight ended the server with {_how(code)}, not code 0")
    return f"the stream in flight: {ended}"


def _how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"


REQUIREMENTS = (
    Requirement("STOP-1", "SIGTERM ends an idle server with code 0, soon", _idle),
    Requirement(
        "STOP-2", "and one with a sequence in flight, whose stream ends with a status", _in_flight, ("STOP-1",)
    ),
)
