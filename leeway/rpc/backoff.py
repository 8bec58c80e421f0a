"""How long to wait before an attempt is repeated."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass(slots=True)
class Backoff:
    """Pauses that double with each failure, from `first_seconds` to `most_seconds`; `reset` it after a success."""

    first_seconds: float = 0.1
    most_seconds: float = 2.0
    num_failures: int = 0

    def reset(self) -> None:
        """Start again with the shortest pause."""
        self.num_failures = 0

    def next_seconds(self, told_seconds: float | None = None) -> float:
        """Count a failure; returns the pause after it, which is `told_seconds` where the peer asked for one."""
        seconds = min(self.first_seconds * 2.0 ** min(self.num_failures, 64), self.most_seconds)
        self.num_failures += 1
        return told_seconds or seconds

    async def pause(self, told_seconds: float | None = None) -> None:
        """Count a failure and wait."""
        await asyncio.sleep(self.next_seconds(told_seconds))
