"""The replay buffer of a run, whether it is going or not: connects to the one that serves, or starts one on its log."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from leeway.config import load_configuration
from leeway.errors import DeadlineError, LeewayError, NotFoundError, UnavailableError
from leeway.replay_client import ReplayClient
from leeway.rpc import Security, check_health
from leeway.service.ports import free_port

_PROBE_SECONDS: Final = 10.0
"""For the answer of a buffer that listens, however busy it is; where nobody listens, that is known at once."""
_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 10.0
"""For a buffer that was started here; beyond it is killed, which costs its log nothing."""


@asynccontextmanager
async def open_replay(config_path: Path) -> AsyncGenerator[ReplayClient]:
    """A client of the buffer of the run that a file configures.

    Raises:
        NotFoundError: the log holds no such run.
        UnavailableError: no buffer could be started on the log.
    """
    configuration = load_configuration(config_path)
    run, network = configuration.run, configuration.network
    security = Security.of(network)
    if await _serves(network.replay_buffer, run.name, security):
        async with _client(network.replay_buffer, run.name, security) as client:
            yield client
        return
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    async with _started(config_path, address, security), _client(address, run.name, security) as client:
        yield client


async def _serves(address: str, run: str, security: Security) -> bool:
    """Whether this very run is served there; another run's buffer may have taken the port."""
    try:
        await check_health(address, security, _PROBE_SECONDS, patient=False)
        async with _client(address, run, security) as client:
            await client.run_status()
    except (UnavailableError, DeadlineError, NotFoundError):
        return False
    return True


@asynccontextmanager
async def _client(address: str, run: str, security: Security) -> AsyncGenerator[ReplayClient]:
    client = ReplayClient(address, run, security)
    try:
        yield client
    finally:
        await client.aclose()


@asynccontextmanager
async def _started(config_path: Path, address: str, security: Security) -> AsyncGenerator[None]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "replay_buffer",
        "--config",
        str(config_path),
        "--supervised",
        "--set",
        f"network.replay_buffer={address}",
        "--set",
        f"metrics.replay_buffer={free_port('127.0.0.1')}",
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None and process.stderr is not None
    errors = asyncio.create_task(process.stderr.read())
    try:
        await _wait_until_serving(process, address, security, errors)
        yield
    finally:
        process.stdin.close()  # its end stops a supervised service
        await _ended(process)
        await errors


async def _ended(process: asyncio.subprocess.Process) -> None:
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def _wait_until_serving(
    process: asyncio.subprocess.Process, address: str, security: Security, errors: asyncio.Task[bytes]
) -> None:
    exited = asyncio.create_task(process.wait())
    healthy = asyncio.create_task(check_health(address, security, _START_SECONDS))
    await asyncio.wait([exited, healthy], return_when=asyncio.FIRST_COMPLETED)
    if not exited.done():
        exited.cancel()
        await healthy
        return
    healthy.cancel()
    lines = (await errors).decode("utf-8", "replace").strip().splitlines()
    raise LeewayError(f"cannot open the run's log: {lines[-1] if lines else 'the replay buffer gave no reason'}")
