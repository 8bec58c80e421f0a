"""Calls for tickets: one for each version that comes into force, two at once at most.

A waiting call is never cancelled while the worker goes on: its reply may be on the way, and the tickets in it would be
lost until their lease ends. When a newer version comes into force meanwhile, a second call goes out beside it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from typing import Final

from leeway.errors import DeadlineError, ExhaustedError, UnavailableError
from leeway.replay_client import ReplayClient
from leeway.rpc import Backoff, cancel_and_wait
from leeway.service.metrics import InferenceServerMetrics
from leeway.types import Drain, PolicyVersion, Ticket

_MAX_CALLS: Final = 2

log = logging.getLogger(__name__)


class TicketCalls:
    """Asks for one server, and hears whether it is drained and whether the run has finished.

    Args:
        client: the replay buffer.
        server_id: who asks.
        wait_seconds: longest wait of one call.
        metrics: shows how long calls wait.
        on_answer: is called when a call has ended.
    """

    def __init__(
        self,
        client: ReplayClient,
        server_id: str,
        wait_seconds: float,
        metrics: InferenceServerMetrics,
        on_answer: Callable[[], None],
    ) -> None:
        self._client = client
        self._server_id = server_id
        self._wait_seconds = wait_seconds
        self._metrics = metrics
        self._on_answer = on_answer
        self._calls: dict[asyncio.Task[list[Ticket]], PolicyVersion] = {}
        self._backoff = Backoff()
        self._drain: Drain | None = None  # set while this server gets no work
        self.finished = False  # whether the run is

    def ask(self, version: PolicyVersion, max_members: int) -> None:
        """Ask for work at a version, unless it is asked for already."""
        if len(self._calls) < _MAX_CALLS and version not in self._calls.values():
            call = asyncio.create_task(self._acquire(version, max_members), name="acquire tickets")
            call.add_done_callback(lambda _: self._on_answer())
            self._calls[call] = version

    def arrived(self) -> list[Ticket]:
        """The tickets of calls that have ended."""
        return self._take([call for call in self._calls if call.done()])

    async def last(self) -> list[Ticket]:
        """Before a stop: the tickets of calls that wait. Each ends by itself in a moment."""
        if not self._calls:
            return []
        done, _ = await asyncio.wait(self._calls, timeout=self._wait_seconds + 1.0)
        return self._take(done)

    async def cancel(self) -> None:
        """Nobody waits for what is still on its way."""
        for call in list(self._calls):
            await cancel_and_wait(call)

    def _take(self, calls: Collection[asyncio.Task[list[Ticket]]]) -> list[Ticket]:
        for call in calls:
            del self._calls[call]
        return [ticket for call in calls for ticket in call.result()]

    async def _acquire(self, version: PolicyVersion, max_members: int) -> list[Ticket]:
        started_at = time.perf_counter()
        try:
            acquired = await self._client.acquire_tickets(self._server_id, version, max_members, self._wait_seconds)
        except (ExhaustedError, UnavailableError, DeadlineError) as error:
            log.warning("no tickets: %s; asking again", error.message)
            told_seconds = error.retry_seconds if isinstance(error, ExhaustedError) else None
            await self._backoff.pause(told_seconds)
            return []
        self._backoff.reset()
        if acquired.finished and not self.finished:
            log.info("run %s has finished", self._client.run)
            self.finished = True
        if acquired.tickets:
            self._metrics.ticket_wait_seconds.observe(time.perf_counter() - started_at)
        self._hear_of_drain(acquired.drained)
        return acquired.tickets

    def _hear_of_drain(self, drain: Drain | None) -> None:
        """Say once that this server is out of the run, and once that it is in it again."""
        if drain == self._drain:
            return
        self._drain = drain
        if drain is None:
            log.warning("server %s is readmitted to run %s", self._server_id, self._client.run)
        else:
            log.warning(
                "server %s is drained (%s) and gets no work until `leeway fleet readmit`: %s",
                *(self._server_id, drain.reason.name.lower(), drain.message),
            )
