"""Answers of the replay buffer, which a stopping learner does not wait for as long as one that works."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final

from leeway.errors import DeadlineError
from leeway.rpc import cancel_and_wait

LAST_ANSWER_SECONDS: Final = 3.0
"""How long a stopping learner waits for an answer of the buffer, which may have stopped before it."""


class Answers:
    """Waits for what the buffer at `address` answers, until `stop` is set and a moment longer."""

    def __init__(self, address: str, stop: asyncio.Event) -> None:
        self._address = address
        self._stop = stop

    async def wait_for(self, call: Coroutine[Any, Any, None]) -> None:
        """Wait for the answer to one call.

        Raises:
            DeadlineError: the buffer is gone as well. Nothing beyond the newest checkpoint counts.
        """
        answer, stopping = asyncio.create_task(call), asyncio.create_task(self._stop.wait())
        await asyncio.wait([answer, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        _, waiting = await asyncio.wait([answer], timeout=LAST_ANSWER_SECONDS)
        if waiting:
            await cancel_and_wait(answer)
            raise DeadlineError(
                f"stopped without an answer of the replay buffer at {self._address}; "
                "the run goes on from its newest checkpoint"
            )
        answer.result()
