"""A backend behind `inference_server.engines.remote` dies: whoever waits for it is told at once."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from inference_server.engine import GenerationEnd
from inference_server.engines.remote import RemoteEngine
from leeway.errors import PreconditionError, UnavailableError
from leeway.rpc import Security
from leeway.service.ports import free_port
from tests.deadlines import WAIT_SECONDS
from tests.harness.completions import Completion, request, snapshot

pytestmark = pytest.mark.processes


@asynccontextmanager
async def process(address: str) -> AsyncGenerator[asyncio.subprocess.Process]:
    """The arithmetic backend as a process, killed at the end."""
    # At this pace a long completion takes most of a minute: it is in flight whenever this side gets to look.
    pace = ("--set", "token_seconds=0.01", "--set", "chunk_tokens=1")
    command = ["-m", "tests.harness.arithmetic_backend", "--address", address, "--run", "rehearsal", *pace]
    backend = await asyncio.create_subprocess_exec(sys.executable, *command)
    try:
        yield backend
    finally:
        with contextlib.suppress(ProcessLookupError):
            backend.kill()
        await backend.wait()


async def test_a_killed_backend_is_noticed_by_all_who_wait_for_it() -> None:
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    async with process(address) as backend:
        remote = await RemoteEngine.connect(address, Security(), timeout_seconds=600)
        try:
            await remote.update_weights(snapshot(1, 0))
            streaming = Completion(request(4000))
            events = streaming.events(remote)
            assert await anext(events) == 1
            await remote.pause()
            # Nothing has come of these yet: gRPC could send them again, to a backend that may never come back.
            waiting = [asyncio.create_task(Completion(request(10, seed=seed)).collect(remote)) for seed in range(3)]
            await asyncio.wait(waiting, timeout=0.2)
            backend.send_signal(signal.SIGKILL)
            await backend.wait()
            async with asyncio.timeout(WAIT_SECONDS):
                for task in waiting:
                    with pytest.raises(UnavailableError, match=address):
                        await task
                with pytest.raises(UnavailableError, match=address):
                    async for _ in events:
                        pass
                for call in (remote.pause(), remote.resume(), remote.update_weights(snapshot(1, 1))):
                    with pytest.raises(UnavailableError, match=address):
                        await call
        finally:
            await remote.aclose()


async def test_a_backend_that_was_started_again_samples_nothing_without_weights() -> None:
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    async with process(address) as backend:
        remote = await RemoteEngine.connect(address, Security(), timeout_seconds=WAIT_SECONDS)
        await remote.update_weights(snapshot(1, 3))
        backend.kill()
        await backend.wait()
    async with process(address):
        # The new process waits for its backend; the old connection, which still believes in version 3, gets nothing.
        again = await RemoteEngine.connect(address, Security(), timeout_seconds=WAIT_SECONDS)
        try:
            assert again.info().version is None
            with pytest.raises((PreconditionError, UnavailableError)):
                await Completion(request(5)).collect(remote)
            await again.update_weights(snapshot(1, 4))
            completion = await Completion(request(5)).collect(again)
            assert isinstance(completion.end, GenerationEnd)
            assert completion.check_labels() == {4}
        finally:
            await remote.aclose()
            await again.aclose()
