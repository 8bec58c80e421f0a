"""The durable log: what is appended in one turn of the event loop becomes durable with one fsync.

    event loop   append ──> queue ──(end of the turn)──> writer thread: all that is queued, one write, one fdatasync
                 durable() <──────── one call_soon_threadsafe per fdatasync ────────────────────┘

    waits      durable(), until everything appended before it is on disk; the writer, for work, and under load until
               commit_seconds after the fsync before: many small ones cost more than they bring
    unblocks   an fdatasync
    full disk  the writer cuts the file back to its durable end, waits, and writes the same bytes again; until then
               nothing is acknowledged and `stalled` is true
    any other error   the log is dead: what the disk holds is unknown until it is opened and verified again

Locations are fixed when a record is appended, so it can be referred to, and read, before it is on disk.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Final

from replay_buffer.storage.log_writer import LogFailedError, LogOptions, LogWriter, Queued
from replay_buffer.storage.segment_reader import SegmentReader
from replay_buffer.storage.segments import (
    HEADER,
    LastRecord,
    Location,
    Position,
    crc32c,
    frame_header,
    lock_directory,
    segment_numbers,
    segment_path,
    verify_segment,
)

_MAX_SEGMENT_BYTES: Final = 1 << 32
BEGINNING: Final = Position(1, 0)

log = logging.getLogger(__name__)

Durable = Callable[[int, int, float], None]
"""Called after each fsync with the records and bytes made durable and the seconds that it took."""


Take = Callable[[bytes, Location], None]
"""Gets a record's payload and place."""


class Log:
    """An append-only log in one directory, held by one process, used from one event loop."""

    def __init__(self, options: LogOptions, on_durable: Durable = lambda _records, _bytes, _seconds: None) -> None:
        """Lock the directory; `recover` comes next, then `start`.

        Raises:
            ConfigError: the directory cannot be used, or another process holds it.
        """
        self._options = options
        self._lock_descriptor = lock_directory(options.directory)
        self._reader = SegmentReader(options.directory)
        self._on_durable = on_durable
        self.first_segment = 1
        self._segment = 1
        self._segment_limit = min(options.segment_bytes, _MAX_SEGMENT_BYTES)
        self._segment_size = 0  # of the segment that the next record goes to, counting what is queued
        self.durable_end = BEGINNING
        self._recovered_last: LastRecord | None = None
        self._last_header: tuple[int, int, bytes] | None = None  # of what was appended here
        self.segment_ended_with: LastRecord | None = None
        """The record before the newest segment."""
        self.size_bytes = 0
        self.appended_bytes = 0  # by this process
        self.pending_bytes = 0
        self._appended = self._synced = 0  # records
        self._turn: list[Queued] = []
        self._unsynced: dict[tuple[int, int], tuple[bytes, ...]] = {}
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap: mark, tie-break, who waits
        self._tie = itertools.count()
        self._writer: LogWriter | None = None
        self.failure: LogFailedError | None = None
        self._failed: asyncio.Future[None] | None = None

    def recover(
        self,
        take: Take,
        start: Position = BEGINNING,
        last_record: LastRecord | None = None,
    ) -> None:
        """Verify the log from `start` on and hand over every record, oldest first; cuts a torn tail off.

        Args:
            take: gets payload and place.
            start: what lies before it is neither read nor verified.
            last_record: the one before `start`.

        Raises:
            CorruptDataError: naming file and offset.
        """
        self._recovered_last = last_record
        numbers = segment_numbers(self._options.directory)
        self.first_segment = numbers[0] if numbers else start.segment
        for segment in numbers:
            path = segment_path(self._options.directory, segment)
            if segment >= start.segment:
                self._recover(take, segment, start.offset if segment == start.segment else 0, segment == numbers[-1])
            self._segment, self._segment_size = segment, path.stat().st_size
            self.size_bytes += self._segment_size
        if self._segment < start.segment:
            # What comes next has to lie behind `start`, or the next restart would pass it over.
            self._segment, self._segment_size = start.segment, 0
        self.durable_end = self.end

    def _recover(self, take: Take, segment: int, begin: int, last: bool) -> None:
        path = segment_path(self._options.directory, segment)
        for offset, payload in verify_segment(path, last=last, start=begin):
            self._recovered_last = LastRecord(Position(segment, offset - HEADER.size), crc32c(payload))
            take(payload, Location(segment, offset, len(payload)))

    def start(self) -> None:
        """Begin to take records. Called on the event loop."""
        loop = asyncio.get_running_loop()
        self._failed = loop.create_future()
        self._writer = LogWriter(self._options, self._segment, self._segment_size, loop, self._settle, self.fail)
        self._writer.start()

    @property
    def stalled(self) -> bool:
        """True while the disk is full and records wait for room."""
        return self._writer is not None and self._writer.stalled

    def append(self, *parts: bytes) -> Location:
        """Queue a record, which may come in parts; it has its place in the order from now on.

        Raises:
            LogFailedError: the log is dead.
        """
        if self.failure is not None:
            raise self.failure
        header = frame_header(parts)
        payload_bytes = sum(map(len, parts))
        size_bytes = HEADER.size + payload_bytes
        if self._segment_size and self._segment_size + size_bytes > self._segment_limit:
            self._segment += 1
            self._segment_size = 0
            self.segment_ended_with = self.last_record
        self._last_header = self._segment, self._segment_size, header
        location = Location(self._segment, self._segment_size + HEADER.size, payload_bytes)
        self._segment_size += size_bytes
        self.size_bytes += size_bytes
        self.appended_bytes += size_bytes
        self.pending_bytes += size_bytes
        self._appended += 1
        self._unsynced[location.segment, location.offset] = parts
        if not self._turn:
            asyncio.get_running_loop().call_soon(self._end_turn)
        self._turn.append(Queued(location, (header, *parts)))
        return location

    @property
    def end(self) -> Position:
        """Where the next record begins, unless it needs a new segment."""
        return Position(self._segment, self._segment_size)

    @property
    def last_record(self) -> LastRecord | None:
        """The newest record."""
        if self._last_header is None:
            return self._recovered_last
        segment, offset, header = self._last_header
        return LastRecord(Position(segment, offset), HEADER.unpack(header)[1])

    def retire_before(self, segment: int, size_bytes: int) -> None:
        """Older segments, of so many bytes, are about to be deleted."""
        self.first_segment = segment
        self.size_bytes -= size_bytes
        self._reader.close_before(segment)

    def read(self, location: Location) -> bytes:
        """A record, from memory until it is durable.

        Raises:
            NotFoundError: it has been retired.
            CorruptDataError: it is damaged on disk.
        """
        parts = self._unsynced.get((location.segment, location.offset))
        return self._reader.read(location) if parts is None else b"".join(parts)

    def read_many(self, locations: Sequence[Location]) -> list[bytes]:
        """Records that are durable, with few reads where they lie together.

        Raises:
            CorruptDataError: one is damaged on disk.
        """
        return self._reader.read_many(locations)

    @property
    def mark(self) -> int:
        """The end of the log now, for `durable`."""
        return self._appended

    @property
    def durable_mark(self) -> int:
        """The mark up to which everything is on disk."""
        return self._synced

    async def durable(self, mark: int | None = None) -> None:
        """Wait until everything appended before `mark` (default: so far) is on disk.

        Raises:
            LogFailedError: the log is dead.
        """
        if self.failure is not None:
            raise self.failure
        mark = self._appended if mark is None else mark
        if self._synced >= mark:
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (mark, next(self._tie), done))
        await done

    async def wait_failed(self) -> None:
        """Return never, or raise what killed the log."""
        assert self._failed is not None
        await asyncio.shield(self._failed)

    async def aclose(self) -> None:
        """Make everything durable that can be, and let the directory go."""
        if self._writer is not None:
            if self._turn:
                self._end_turn()
            await asyncio.to_thread(self._writer.stop)
            assert self._failed is not None
            if self._failed.done():
                self._failed.exception()
            else:
                self._failed.cancel()
        self._reader.close()
        os.close(self._lock_descriptor)

    def _end_turn(self) -> None:
        turn, self._turn = self._turn, []
        if self._writer is not None and turn:
            self._writer.put(turn, sum(queued.location.size_bytes for queued in turn))

    def _settle(self, batch: list[Queued], seconds: float) -> None:
        size_bytes = 0
        for queued in batch:
            del self._unsynced[queued.location.segment, queued.location.offset]
            size_bytes += HEADER.size + queued.location.size_bytes
        self._synced += len(batch)
        last = batch[-1].location
        self.durable_end = Position(last.segment, last.offset + last.size_bytes)
        self.pending_bytes -= size_bytes
        while self._waiting and self._waiting[0][0] <= self._synced:
            done = heapq.heappop(self._waiting)[2]
            if not done.done():
                done.set_result(None)
        self._on_durable(len(batch), size_bytes, seconds)

    def fail(self, failure: LogFailedError) -> None:
        """Stop: take no more records and acknowledge nothing more."""
        self.failure = failure
        for _, _, done in self._waiting:
            if not done.done():
                done.set_exception(self.failure)
        self._waiting.clear()
        if self._failed is not None and not self._failed.done():
            self._failed.set_exception(self.failure)
