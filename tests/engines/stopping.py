"""A server's clean stop as the conformance kit sees it, of a server that runs already and is of no more use."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

from leeway.conformance import kit
from leeway.conformance.client import BackendClient
from leeway.conformance.own_server import OwnServer
from leeway.conformance.requirement import Result, Status
from leeway.conformance.session import KitOptions, Session
from leeway.conformance.weights import checkpoint_weights
from leeway.rpc import Security
from tests.engines.engine_server import RUN, EngineServer
from tests.engines.sampled import PATIENCE_SECONDS

STOPPING = {"STOP-1", "STOP-2"}  # idle, and with a sequence in flight
_OPTIONS = KitOptions(run=RUN, call_seconds=PATIENCE_SECONDS, check_seconds=PATIENCE_SECONDS, stop_seconds=120.0)


async def assert_stops(server: EngineServer, model: Path, requirement_id: str) -> None:
    """One of STOPPING, of this server, which has ended then."""

    @contextlib.asynccontextmanager
    async def own_server() -> AsyncGenerator[OwnServer]:
        yield OwnServer(server.address, server.process.terminate, lambda: asyncio.to_thread(server.process.wait, 120))

    requirement = next(each for each in kit.REQUIREMENTS if each.id == requirement_id)
    client = BackendClient(server.address, Security(), PATIENCE_SECONDS)
    session = Session(client, _OPTIONS, checkpoint_weights(model), Security(), own_server)
    results: list[Result] = []
    try:
        results = [result async for result in kit.run(session, [replace(requirement, needs=())])]
    finally:
        await client.aclose()
    assert {result.requirement.id: (result.status, result.detail) for result in results if not _passed(result)} == {}
    assert server.process.poll() == 0


def _passed(result: Result) -> bool:
    return result.status is Status.PASSED
