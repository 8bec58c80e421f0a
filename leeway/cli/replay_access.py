"""Access to a run's replay buffer: connects to the one that serves the run, or starts one on its log."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Final

from leeway.cli.serve import serve_command
from leeway.config import load_configuration
from leeway.errors import DeadlineError, LeewayError, NotFoundError, UnavailableError
from leeway.replay_client import ReplayClient
from leeway.rpc import Security, check_health
from leeway.service.children import running
from leeway.service.ports import free_port

_PROBE_SECONDS: Final = 10.0
"""Longest wait for a busy buffer's answer; a port without a listener is known at once."""
_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 10.0
"""Longest stop of a buffer that was started here. It is then killed, which costs its log nothing."""


@asynccontextmanager
async def open_replay(config_path: Path) -> AsyncGenerator[ReplayClient]:
    """A client of the buffer of the run that a file configures.

    Raises:
        NotFoundError: the log holds no such run.
        UnavailableError: no buffer could be started on the log.
    """
    configuration = load_configuration(config_path)
    run, network = configuration.run, configuration.network
    security = network.security()
    if await _serves(network.replay_buffer, run.name, security):
        async with aclosing(ReplayClient(network.replay_buffer, run.name, security)) as client:
            yield client
        return
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    async with _started(config_path, address, security), aclosing(ReplayClient(address, run.name, security)) as client:
        yield client


async def _serves(address: str, run: str, security: Security) -> bool:
    """True if this run is served there; another run's buffer may have taken the port."""
    try:
        await check_health(address, security, _PROBE_SECONDS, patient=False)
        async with aclosing(ReplayClient(address, run, security)) as client:
            await client.run_status()
    except (UnavailableError, DeadlineError, NotFoundError):
        return False
    return True


@asynccontextmanager
async def _started(config_path: Path, address: str, security: Security) -> AsyncGenerator[None]:
    command = serve_command(
        *("replay-buffer", "--config", str(config_path), "--supervised"),
        *("--set", f"network.replay_buffer={address}", "--set", f"metrics.replay_buffer={free_port('127.0.0.1')}"),
    )
    errors: list[str] = []
    async with running(command, _STOP_SECONDS, on_stderr=errors.append) as child:
        await child.unless_ended(check_health(address, security, _START_SECONDS))
        if child.exit_code is not None:
            await child.wait()
            raise LeewayError(
                f"cannot open the run's log: {errors[-1] if errors else 'the replay buffer gave no reason'}"
            )
        yield
