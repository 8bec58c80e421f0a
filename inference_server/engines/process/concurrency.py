"""The number of sequences that an engine decodes at once, adapted to its queue and its KV cache.

    request ── slot() ──> running ── its end ──> slot is free
                 ▲
    engine's statistics ── observe ──> limit: cut when the engine preempts, raised again while it has room

An engine that runs out of memory for keys and values preempts a running sequence and computes it again later, with the
weights that are in force then. The limit is cut by a tenth of what ran when that happens, and raised by one after
`patience` observations without a queue and below `high_water`, while all slots are taken. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from leeway.errors import ExhaustedError


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Statistics of an engine after a step."""

    num_running: int
    num_waiting: int
    kv_usage: float  # share of the KV cache in use, 0 to 1
    num_preempted: int = 0  # since the last time


class ConcurrencyLimit:
    """Slots, first come first served.

    Args:
        maximum: what the limit starts at and never exceeds.
        max_queued: requests that may wait for a slot.
        high_water: share of the KV cache above which the limit is not raised.
        patience: quiet observations before it is raised by one.
    """

    def __init__(self, maximum: int, max_queued: int, *, high_water: float = 0.85, patience: int = 16) -> None:
        self.limit = maximum
        self.num_taken = 0
        self.load = EngineLoad(0, 0, 0.0)
        self._maximum = maximum
        self._max_queued = max_queued
        self._high_water = high_water
        self._patience = patience
        self._quiet = 0
        self._forgiven = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def forgive(self) -> None:
        """Take a preemption of each sequence as wanted: the engine is told to compute them again.

        Of what has a slot, since what the engine said last of how many run may be old.
        """
        self._forgiven = self.num_taken

    def observe(self, load: EngineLoad) -> None:
        """Take the engine's newest statistics."""
        self.load = load
        num_unwanted = max(0, load.num_preempted - self._forgiven)
        self._forgiven = max(0, self._forgiven - load.num_preempted)
        if num_unwanted:
            self.limit = max(1, min(self.limit, load.num_running * 9 // 10))
            self._quiet = 0
        elif load.num_waiting or load.kv_usage > self._high_water or self.num_taken < self.limit:
            self._quiet = 0
        else:
            self._quiet += 1
        if self._quiet >= self._patience and self.limit < self._maximum:
            self.limit += 1
            self._quiet = 0
            self._hand_out()

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncGenerator[None, None]:
        """Hold a slot for the block.

        Raises:
            ExhaustedError: too many wait already.
        """
        await self._take()
        try:
            yield
        finally:
            self._release()

    async def _take(self) -> None:
        if self.num_taken < self.limit and not self._waiting:
            self.num_taken += 1
            return
        if len(self._waiting) >= self._max_queued:
            raise ExhaustedError(
                f"{len(self._waiting)} requests wait for one of {self.limit} slots; ask again later or another server"
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            # No deadline: how long a request may wait is its caller's to bound.
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._release()  # it got its turn in the moment it was cancelled
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def _release(self) -> None:
        self.num_taken -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and self.num_taken < self.limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self.num_taken += 1
                turn.set_result(None)
