"""A server that the kit starts and ends itself."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from leeway.conformance.client import BackendClient, Refused
from leeway.errors import ConfigError, UnavailableError
from leeway.rpc import Security
from leeway.service.children import Child, start
from leeway.service.ports import free_port


@dataclass(frozen=True, slots=True)
class OwnServer:
    """A process that answers at an address.

    Args:
        address: host:port.
        terminate: sends it SIGTERM.
        wait: its exit code, once it has ended; negative for a signal.
    """

    address: str
    terminate: Callable[[], None]
    wait: Callable[[], Awaitable[int]]


Starter = Callable[[], AbstractAsyncContextManager[OwnServer]]
"""Starts a server for the length of a block."""


@asynccontextmanager
async def started(command: Sequence[str], security: Security, start_seconds: float) -> AsyncGenerator[OwnServer]:
    """Run a command, `{address}` in it replaced, until the block ends; entered when the server answers.

    Args:
        command: argv.
        security: certificates to speak to it with.
        start_seconds: longest wait for its first answer.

    Raises:
        ConfigError: the command cannot be run.
        UnavailableError: it ended, or did not answer.
    """
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    argv = [part.replace("{address}", address) for part in command]
    try:
        # Its log goes to stderr, beside the kit's own messages.
        child = await start(argv, on_stdout=asyncio.subprocess.DEVNULL)
    except OSError as error:
        raise ConfigError(f"{argv[0]}: cannot be run: {error.strerror}") from error
    try:
        await _wait_until_it_answers(child, address, security, start_seconds)
        yield OwnServer(address, lambda: child.signal(signal.SIGTERM), child.wait)
    finally:
        await child.stop(0.0)


async def _wait_until_it_answers(child: Child, address: str, security: Security, start_seconds: float) -> None:
    client = BackendClient(address, security, start_seconds)
    try:
        await child.unless_ended(client.info())
    except Refused as refusal:
        raise UnavailableError(f"the server that was started for {address} does not answer: {refusal}") from refusal
    finally:
        await client.aclose()
    if child.exit_code is not None:
        raise UnavailableError(f"the server that was started for {address} ended with code {child.exit_code}")
