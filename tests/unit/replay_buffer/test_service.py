"""What a call reads from disk is read to its end, though nobody waits for it any more: its files close afterwards."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

from replay_buffer.rpc import service
from replay_buffer.rpc.service import ReplayService
from tests.deadlines import WAIT_SECONDS


async def test_a_cancelled_draw_ends_after_its_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, may_end = threading.Event(), threading.Event()

    def slow_disk(_views: object, _read: object) -> Iterator[bytes]:
        reading.set()
        assert may_end.wait(WAIT_SECONDS)
        yield b"a message"

    class Buffer:
        read_many = None

    monkeypatch.setattr(service, "messages", slow_disk)
    stream = ReplayService(cast("Any", Buffer()))._streamed([])
    drawing = asyncio.ensure_future(anext(stream))
    assert await asyncio.to_thread(reading.wait, WAIT_SECONDS)
    drawing.cancel()
    for _ in range(100):
        await asyncio.sleep(0)
    assert not drawing.done()
    may_end.set()
    await asyncio.wait([drawing])
    assert drawing.cancelled()
