"""The thread that owns the end of the log: batches in, one write and one fdatasync each, and the loop is told.

put ──> queue ──> batch ──> segments, each durable before the next one exists ──> settle, on the event loop
                               └── the disk is full: cut back, wait, write the same bytes again
                               └── any other error: fail, on the event loop; the thread ends
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from leeway.errors import UnavailableError
from replay_buffer.storage.segments import (
    AppendFile,
    Location,
    OpenFile,
    SegmentFile,
    segment_path,
)

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_LARGE_BYTES: Final = 1 << 15
_MOST_BLOCKS: Final = 1024
"""In one system call (IOV_MAX)."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LogOptions:
    """Where and how the log is kept."""

    directory: Path
    segment_bytes: int = 64 << 20  # a segment that has reached this size is followed by a new one
    retry_seconds: float = 1.0  # between attempts to write to a full disk
    commit_seconds: float = 0.005  # from one fsync to the next, unless commit_bytes wait; the first one is never late
    commit_bytes: int = 1 << 20
    open_file: OpenFile = field(default=AppendFile, repr=False)


class LogFailedError(UnavailableError):
    """The log can take nothing more in this process."""


class Queued(NamedTuple):
    """A record that is to be written."""

    location: Location
    parts: tuple[bytes, ...]  # the whole frame


class LogWriter:
    """Writes queued records in a thread of its own.

    Args:
        options: where and how.
        segment: which one to go on with.
        size_bytes: its size, all of it durable.
        loop: where the two callbacks run.
        settle: told of the records that became durable, and of the seconds that the fsync took.
        fail: told what killed the log.
    """

    def __init__(
        self,
        options: LogOptions,
        segment: int,
        size_bytes: int,
        loop: asyncio.AbstractEventLoop,
        settle: Callable[[list[Queued], float], None],
        fail: Callable[[LogFailedError], None],
    ) -> None:
        self._options = options
        self._segment = segment
        self._durable_size = size_bytes  # of the current segment
        self._file: SegmentFile | None = None
        self._loop = loop
        self._settle = settle
        self._fail = fail
        self._queue: list[Queued] = []
        self._queued_bytes = 0
        self._synced_at = float("-inf")  # when the latest fsync began
        self._stopping = False
        self._changed = threading.Condition()
        self.stalled = False
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def put(self, records: list[Queued], size_bytes: int) -> None:
        """Write these next."""
        with self._changed:
            was_empty = not self._queue
            self._queue += records
            self._queued_bytes += size_bytes
            if was_empty or self._queued_bytes >= self._options.commit_bytes:
                self._changed.notify()

    def stop(self) -> None:
        """Write what is queued, unless the disk is full, and end."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while batch := self._take():
                self._write(batch)
        except OSError as error:
            path = segment_path(self._options.directory, self._segment)
            self._report(
                f"{path}: {error.strerror or error}; what is on disk is unknown, so nothing more is acknowledged: "
                "check the disk, then restart to verify the log"
            )
        except _Stopped:
            self._report(f"{self._options.directory}: stopped while the disk was full")
        finally:
            if self._file is not None:
                self._file.close()

    def _take(self) -> list[Queued]:
        """Everything that is queued; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopping)
            if (early := self._synced_at + self._options.commit_seconds - time.monotonic()) > 0:
                self._changed.wait_for(self._commits_at_once, early)
            batch, self._queue, self._queued_bytes = self._queue, [], 0
            return batch

    def _commits_at_once(self) -> bool:
        return self._stopping or self._queued_bytes >= self._options.commit_bytes

    def _write(self, batch: list[Queued]) -> None:
        """Write a batch segment by segment; a segment is durable before the next one exists."""
        begin = 0
        while begin < len(batch):
            segment = batch[begin].location.segment
            end = begin
            while end < len(batch) and batch[end].location.segment == segment:
                end += 1
            part = batch[begin:end]
            self._append(segment, _blocks(part))
            self._synced_at = began = time.monotonic()
            assert self._file is not None
            self._file.sync()
            self._loop.call_soon_threadsafe(self._settle, part, time.monotonic() - began)
            begin = end

    def _append(self, segment: int, blocks: list[bytes]) -> None:
        while True:
            try:
                if self._file is None or segment != self._segment:
                    self._open(segment)
                self._write_all(blocks)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                self._wait_for_room(error)
            else:
                self.stalled = False
                self._durable_size += sum(map(len, blocks))
                return

    def _open(self, segment: int) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._file = self._options.open_file(segment_path(self._options.directory, segment))
        if segment != self._segment:
            self._segment, self._durable_size = segment, 0

    def _write_all(self, blocks: list[bytes]) -> None:
        """Write with few system calls: each releases the interpreter lock, and taking it back may have to wait."""
        assert self._file is not None
        rest: deque[bytes | memoryview] = deque(blocks)
        while rest:
            written = self._file.write(list(itertools.islice(rest, _MOST_BLOCKS)))
            while rest and written >= len(rest[0]):
                written -= len(rest.popleft())
            if written:
                rest[0] = memoryview(rest[0])[written:]

    def _wait_for_room(self, error: OSError) -> None:
        if self._file is not None:
            self._file.truncate(self._durable_size)
        if not self.stalled:
            self.stalled = True
            log.error(
                "%s: %s; nothing is acknowledged until there is room: free some space",
                self._options.directory,
                error.strerror,
            )
        with self._changed:
            if self._changed.wait_for(lambda: self._stopping, timeout=self._options.retry_seconds):
                raise _Stopped

    def _report(self, message: str) -> None:
        self._loop.call_soon_threadsafe(self._fail, LogFailedError(message))


def _blocks(batch: list[Queued]) -> list[bytes]:
    """The bytes of a batch for few writes: what is small is joined, what is large is not copied."""
    blocks: list[bytes] = []
    small: list[bytes] = []
    for part in itertools.chain.from_iterable(queued.parts for queued in batch):
        if len(part) < _LARGE_BYTES:
            small.append(part)
            continue
        if small:
            blocks.append(b"".join(small))
            small.clear()
        blocks.append(part)
    if small:
        blocks.append(b"".join(small))
    return blocks


class _Stopped(Exception):
    """The writer was asked to stop while it waited for room."""
