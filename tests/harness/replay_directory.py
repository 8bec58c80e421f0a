"""Runs on a real directory, with segments so small that a few steps fill many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from leeway.config import ReplayBufferOptions
from leeway.types import PolicyVersion, RunSpec, WriteStatus
from replay_buffer.buffer import ReplayBuffer
from replay_buffer.rules.state import RunState
from replay_buffer.storage.log import Log, LogOptions
from replay_buffer.storage.segments import Position
from tests.harness.replay_builders import RUN, filled, spec, version

SEGMENT_BYTES = 2048


class OpenBuffer:
    """A buffer on a directory, and what a learner and a worker would remember."""

    def __init__(self, buffer: ReplayBuffer, log: Log, folded: list[Position], run: str = RUN) -> None:
        self.buffer = buffer
        self.log = log
        self.folded = folded  # the records that its start has read
        self.run = run

    def of(self, run: str) -> OpenBuffer:
        """The same buffer, for another of its runs."""
        return OpenBuffer(self.buffer, self.log, self.folded, run)

    @property
    def state(self) -> RunState:
        return self.buffer._store.runs[self.run].state

    async def open_run(self, checkpoint: PolicyVersion | None = None, run_spec: RunSpec | None = None) -> None:
        run_spec = run_spec or spec(self.run, total_steps=10_000)
        await self.buffer.open_run(run_spec, checkpoint or run_spec.root, [])

    async def step(self, *, commit: bool = True, oldest_kept_step: int = 0) -> tuple[str, ...]:
        """One whole step on fresh groups."""
        state = self.state
        tickets, *_ = await self.buffer.acquire_tickets(self.run, "s0", state.head, 1000, 0)
        for ticket in tickets:
            results = self.buffer.write(self.run, filled(ticket, [state.head]))
            assert {result.status for result in results} == {WriteStatus.ACKNOWLEDGED}
        head = state.head
        views = await self.buffer.draw(self.run, state.epoch, head.step + 1, self.buffer._store.now())
        await self.buffer.advance(self.run, state.epoch, version(head.step + 1, state.epoch, self.run), head)
        if commit:
            await self.buffer.commit(self.run, state.epoch, head.step + 1, oldest_kept_step)
        await self.settled()
        return tuple(view.group_id for view in views)

    async def settled(self) -> None:
        """Wait for the snapshot on its way, and for what leaves the page cache."""
        storage = self.buffer._store.storage
        if (saving := storage._saving) is not None:
            await saving
        await asyncio.gather(*storage._uncaching)


@asynccontextmanager
async def opened(
    directory: Path, *, cleanly: bool = True, segment_bytes: int = SEGMENT_BYTES, **options: Any
) -> AsyncGenerator[OpenBuffer]:
    """A buffer on a directory; uncleanly, it leaves what a killed process leaves."""
    log = Log(LogOptions(directory, segment_bytes))
    buffer = ReplayBuffer(ReplayBufferOptions(directory=directory, **options), log)
    folded: list[Position] = []
    fold = buffer._store._replay

    def count(payload: bytes, location: Any) -> None:
        folded.append(Position(location.segment, location.offset))
        fold(payload, location)

    buffer._store._replay = count  # type: ignore[method-assign]
    try:
        buffer.start()
        try:
            yield OpenBuffer(buffer, log, folded)
        finally:
            buffer.stop()
            if cleanly:
                await buffer.aclose()
            else:
                if (saving := buffer._store.storage._saving) is not None:
                    await asyncio.wait([saving])  # a thread cannot be killed
                buffer._store.storage.index._file.close()
    finally:
        await log.aclose()
