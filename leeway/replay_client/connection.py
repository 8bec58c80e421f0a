"""A connection to one replay buffer for one run, and what its calls share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from leeway.errors import ExhaustedError
from leeway.rpc import Backoff, Security, mapped_errors, open_channel
from leeway.v1 import replay_pb2_grpc

MARGIN_SECONDS: Final = 10.0
"""Added to a call's own wait, so that the server's answer wins over the client's deadline."""
_FULL_PATIENCE_SECONDS: Final = 6 * 3600.0
"""How long the learner's calls wait for room."""
_PAUSE_SECONDS: Final = 2.0
"""Pause before a call is repeated that the buffer had no room for, unless it says how long."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class Connection:
    """See the package.

    Args:
        address: host:port of the replay buffer.
        run: whose calls these are.
        security: certificates, if any.
        patience_seconds: how long a call waits while the buffer is away.
    """

    def __init__(self, address: str, run: str, security: Security, *, patience_seconds: float = 60.0) -> None:
        self.address = address
        self.run = run
        self.patience_seconds = patience_seconds
        self._channel = open_channel(address, security)
        self.stub: replay_pb2_grpc.ReplayServiceAsyncStub = replay_pb2_grpc.ReplayServiceStub(self._channel)

    async def aclose(self) -> None:
        await self._channel.close()

    async def answered(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        """The answer to a call that may be repeated, once the buffer has room for what it decides."""
        give_up_at = time.monotonic() + _FULL_PATIENCE_SECONDS
        while True:
            try:
                with mapped_errors(f"{name} at {self.address}"):
                    return await call()
            except ExhaustedError as error:
                if time.monotonic() > give_up_at:
                    raise
                await self.leave_alone(error)

    async def leave_alone(self, error: ExhaustedError) -> None:
        """Wait as long as a buffer without room has asked for."""
        pause_seconds = Backoff(_PAUSE_SECONDS).next_seconds(error.retry_seconds)
        log.warning("the replay buffer has no room (%s); calling again in %g s", error.message, pause_seconds)
        await asyncio.sleep(pause_seconds)
