"""Back-pressure: the bound on bytes that were received and are not durable yet.

    message ──> admit ──> decide, append (pending) ──> fsync (durable)
                  │
                  ├── pending <= slow_pending_bytes             at once
                  ├── above: the stream waits, unread           flow control reaches the writer
                  └── pending + waiting > max_pending_bytes,
                      or nothing moved for hold_seconds         RESOURCE_EXHAUSTED, with the time to come back

So max_pending_bytes and one message bound what is held, however many writers there are; gRPC itself holds at most one
message more for each stream that is being read.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Final

from leeway.config import ReplayBufferOptions
from leeway.errors import ExhaustedError
from replay_buffer.storage.log import Log

_FAR_FROM_FULL_BYTES: Final = 1 << 30
_ROOM_SECONDS: Final = 0.05


class Cause(StrEnum):
    """Why a caller was refused."""

    PENDING_BYTES = "pending_bytes"  # too much waits for the disk
    DISK = "disk"  # it takes nothing
    FREE_BYTES = "free_bytes"  # it is nearly full


class Backpressure:
    """Slows writers, then refuses them."""

    def __init__(
        self,
        options: ReplayBufferOptions,
        durable_log: Log,
        on_refused: Callable[[str], None] = lambda _: None,
        free_bytes: Callable[[Path], int] | None = None,
    ) -> None:
        self._options = options
        self._log = durable_log
        self._on_refused = on_refused
        self._free_bytes = free_bytes or free_bytes_of
        self._room_until = 0.0  # on the loop's clock: until then the disk has room for chunks
        self.waiting_bytes = 0

    @property
    def received_bytes(self) -> int:
        """What is in memory and not durable, whether it is in the log's order already or waits for it."""
        return self._log.pending_bytes + self.waiting_bytes

    def crowded(self) -> bool:
        """Whether a message has to wait."""
        return self._log.pending_bytes > self._options.slow_pending_bytes

    async def admit(self, size_bytes: int) -> None:
        """Wait until a message of this size may be taken.

        Raises:
            ExhaustedError: there is no room for it, and the writer has to come back.
            LogFailedError: the log is dead.
        """
        if not self.crowded():
            return
        limit = self._options.max_pending_bytes
        if self.received_bytes + size_bytes > limit:
            message = f"{limit >> 20} MiB of writes wait for the disk (replay_buffer.max_pending_bytes)"
            raise self.refusal(Cause.PENDING_BYTES, message)
        self.waiting_bytes += size_bytes
        try:
            while self.crowded():
                await self.settled()
        finally:
            self.waiting_bytes -= size_bytes

    async def settled(self, mark: int | None = None) -> None:
        """Wait until everything before `mark` (default: so far) is durable, but not on a disk that takes nothing.

        Raises:
            ExhaustedError: it took longer than hold_seconds; what was decided may still become durable.
            LogFailedError: the log is dead.
        """
        try:
            async with asyncio.timeout(self._options.hold_seconds):
                await self._log.durable(mark)
        except TimeoutError:
            cause = "is full" if self._log.stalled else "is too slow"
            message = f"the disk {cause}: nothing became durable within {self._options.hold_seconds:g} s"
            raise self.refusal(Cause.DISK, message) from None

    def has_room_for_chunks(self) -> bool:
        """Whether chunks may be taken. Far from the mark the disk is not looked at for each message."""
        if self._log.stalled:
            return False
        now = asyncio.get_running_loop().time()
        if now >= self._room_until:
            spare = self._free_bytes(self._options.directory) - self._options.hard_free_bytes
            if spare < _FAR_FROM_FULL_BYTES:
                return spare >= 0
            self._room_until = now + _ROOM_SECONDS
        return True

    def check_free_space(self) -> None:
        """Refuse tickets on a disk that is nearly full.

        Raises:
            ExhaustedError: it is; the caller has to come back.
        """
        if self._log.stalled:
            raise self.refusal(Cause.DISK, "the disk is full; no tickets are issued until there is room")
        free, wanted = self._free_bytes(self._options.directory), self._options.soft_free_bytes
        if free < wanted:
            self._room_until = 0.0
            raise self.refusal(
                Cause.FREE_BYTES,
                f"{free >> 20} MiB free, below replay_buffer.soft_free_bytes ({wanted >> 20} MiB): "
                "no tickets are issued until there is room",
            )

    def refusal(self, cause: Cause, message: str) -> ExhaustedError:
        """The error that says when to come back."""
        self._on_refused(cause)
        return ExhaustedError(f"{self._options.directory}: {message}", self._options.retry_seconds)


def free_bytes_of(directory: Path) -> int:
    """Space that this process may still use on the directory's disk."""
    statistics = os.statvfs(directory)
    return statistics.f_bavail * statistics.f_frsize
