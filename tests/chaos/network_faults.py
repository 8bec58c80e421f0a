"""A bad network, seeded: messages are lost with their connection, late, or arrive more than once.

Crash points too: the driver names an event ("Commit.begun", "write.answered", ...) and how many of them to let pass.
The message of the next one is held until the driver says go, so that a process can be killed at exactly that moment.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from tests.harness.recording_proxy import WRITE, Fate, Network

_HOLD_SECONDS: Final = 30.0
_RARE: Final = frozenset({"OpenRun", "Commit", "FinishRun", "JoinRun"})
"""Calls of which a run has so few that they are repeated more often."""
_REPEATED: Final = frozenset(
    {"OpenRun", "JoinRun", "AcquireTickets", WRITE, "RenewLeases", "DrawBatch", "Advance", "Commit", "FinishRun"}
)


@dataclass(slots=True)
class CrashPoint:
    """Hold the message of an event once `count` of its kind have passed; "any" stands for every event."""

    event: str
    count: int


@dataclass(frozen=True, slots=True)
class FaultRates:
    """The probability of each fault, per message."""

    lost: float = 0.01
    late: float = 0.03
    twice: float = 0.02
    repeated: float = 0.06  # arrives once more, on a connection of its own
    longest_delay_seconds: float = 0.3
    longest_repetition_seconds: float = 3.0


USUAL_FAULTS: Final = FaultRates()
NO_FAULTS: Final = FaultRates(0.0, 0.0, 0.0, 0.0)


class FaultyNetwork(Network):
    """Delivers messages as `rates` say, until `end_faults`."""

    def __init__(self, rates: FaultRates, rng: Random, on_hit: Callable[[str], None]) -> None:
        self._rates = rates
        self._rng = rng
        self._on_hit = on_hit
        self._point: CrashPoint | None = None
        self._go = asyncio.Event()
        self.faults: Counter[str] = Counter()

    def arm(self, point: CrashPoint) -> None:
        """Wait for an event; at most one is waited for."""
        self._point = point
        self._go.clear()

    def go(self) -> None:
        """Release the message that is held, and wait for no event."""
        self._point = None
        self._go.set()

    def end_faults(self) -> None:
        """From now on every message arrives once and at once."""
        self._rates = NO_FAULTS
        self.go()

    async def request(self, method: str, first: bool) -> Fate:
        await self._passes("write.sent" if method == WRITE else f"{method}.begun")
        may_repeat = not first if method == "WatchPolicy" else method == WRITE
        return await self._fate(may_repeat=may_repeat)

    async def reply(self, method: str) -> Fate:
        await self._passes("write.answered" if method == WRITE else f"{method}.ended")
        return await self._fate(may_repeat=method == "WatchPolicy")

    def repetitions(self, method: str) -> Sequence[float]:
        factor = 5 if method in _RARE else 1
        if method not in _REPEATED or self._rng.random() >= self._rates.repeated * factor:
            return ()
        self.faults["arrived again"] += 1
        return (self._rng.random() * self._rates.longest_repetition_seconds,)

    async def _passes(self, event: str) -> None:
        point = self._point
        if point is None or point.event not in (event, "any"):
            return
        point.count -= 1
        if point.count > 0:
            return
        self._point = None
        self._on_hit(event)
        try:
            async with asyncio.timeout(_HOLD_SECONDS):
                await self._go.wait()
        except TimeoutError:
            self.faults["held too long"] += 1

    async def _fate(self, *, may_repeat: bool) -> Fate:
        rates, rng = self._rates, self._rng
        if rng.random() < rates.late:
            self.faults["delayed"] += 1
            await asyncio.sleep(rng.random() * rates.longest_delay_seconds)
        if rng.random() < rates.lost:
            self.faults["lost"] += 1
            return Fate.LOST
        if may_repeat and rng.random() < rates.twice:
            self.faults["sent twice"] += 1
            return Fate.TWICE
        return Fate.ARRIVES
