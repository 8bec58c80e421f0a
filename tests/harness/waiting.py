"""Waiting for a condition without asking again and again: whoever changes something says so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable


class Changes:
    """Wakes those who wait whenever something has changed."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Event] = set()

    def happened(self) -> None:
        """Something has changed; called in the loop."""
        for event in self._waiting:
            event.set()

    async def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until a condition holds; false when it does not within so many seconds."""
        changed = asyncio.Event()
        self._waiting.add(changed)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while not condition():
                        changed.clear()
                        await changed.wait()
            return condition()
        finally:
            self._waiting.discard(changed)
