"""Tasks that are cancelled while they wait for a peer."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def cancellation_kept() -> Generator[None]:
    """End with CancelledError if the task is cancelled inside, whatever else ends the block.

    A stream's first read waits for a task of grpc.aio's own, which takes the cancellation upon itself; if the call ends
    in the same moment, the reader sees its status only, and a task that calls again would never stop.
    """
    task = asyncio.current_task()
    assert task is not None, "calls are made in tasks"
    num_cancels = task.cancelling()
    try:
        yield
    finally:
        if task.cancelling() > num_cancels:
            raise asyncio.CancelledError


async def cancel_and_wait(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait until it has ended; its own outcome is not reported."""
    task.cancel()
    await asyncio.wait([task])
