"""Requests for tickets: one for each version that comes into force, at most two at a time.

A request that waits is never cancelled while the worker runs: its reply may already be under way, and the tickets in it
would be lost until their leases end. When a newer version comes into force, a second request goes out beside it.
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
    """Requests tickets for one server; each reply also says whether the server is drained and the run finished.

    Args:
        client: the replay buffer.
        server_id: this server.
        wait_seconds: longest wait of one request.
        metrics: takes how long requests wait.
        on_reply: called when a request has ended.
    """

    def __init__(
        self,
        client: ReplayClient,
        server_id: str,
        wait_seconds: float,
        metrics: InferenceServerMetrics,
        on_reply: Callable[[], None],
    ) -> None:
        self._client = client
        self._server_id = server_id
        self._wait_seconds = wait_seconds
        self._metrics = metrics
        self._on_reply = on_reply
        self._calls: dict[asyncio.Task[list[Ticket]], PolicyVersion] = {}
        self._backoff = Backoff()
        self._drain: Drain | None = None  # set while this server gets no tickets
        self.finished = False  # whether the run is

    def request(self, version: PolicyVersion, max_members: int) -> None:
        """Request tickets for the version in force, unless a request for it is open."""
        if len(self._calls) < _MAX_CALLS and version not in self._calls.values():
            call = asyncio.create_task(self._request(version, max_members), name="request tickets")
            call.add_done_callback(lambda _: self._on_reply())
            self._calls[call] = version

    def arrived(self) -> list[Ticket]:
        """The tickets of requests that have ended."""
        return self._take([call for call in self._calls if call.done()])

    async def last(self) -> list[Ticket]:
        """Before a stop: the tickets of requests that are still open. Each ends by itself within its wait."""
        if not self._calls:
            return []
        done, _ = await asyncio.wait(self._calls, timeout=self._wait_seconds + 1.0)
        return self._take(done)

    async def cancel(self) -> None:
        """Cancel what is still open."""
        for call in list(self._calls):
            await cancel_and_wait(call)

    def _take(self, calls: Collection[asyncio.Task[list[Ticket]]]) -> list[Ticket]:
        for call in calls:
            del self._calls[call]
        return [ticket for call in calls for ticket in call.result()]

    async def _request(self, version: PolicyVersion, max_members: int) -> list[Ticket]:
        started_at = time.perf_counter()
        try:
            reply = await self._client.acquire_tickets(self._server_id, version, max_members, self._wait_seconds)
        except (ExhaustedError, UnavailableError, DeadlineError) as error:
            log.warning("no tickets: %s; requesting again", error.message)
            await self._backoff.pause(error.retry_seconds if isinstance(error, ExhaustedError) else None)
            return []
        self._backoff.reset()
        if reply.finished and not self.finished:
            log.info("run %s has finished", self._client.run)
            self.finished = True
        if reply.tickets:
            self._metrics.ticket_wait_seconds.observe(time.perf_counter() - started_at)
        self._note_drain(reply.drained)
        return reply.tickets

    def _note_drain(self, drain: Drain | None) -> None:
        """Log when this server is drained and when it is readmitted."""
        if drain == self._drain:
            return
        self._drain = drain
        if drain is None:
            log.warning("server %s is readmitted to run %s", self._server_id, self._client.run)
        else:
            log.warning(
                "server %s is drained (%s) and gets no tickets until `leeway fleet readmit`: %s",
                *(self._server_id, drain.reason.name.lower(), drain.message),
            )
