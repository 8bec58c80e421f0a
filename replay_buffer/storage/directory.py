"""The directory of a replay buffer: the log, and what makes it quick to reopen and keeps it from growing without end.

append ──> log ──(a new segment begins)──> state before it ──> index settled, snapshot written ──> retention
                          │                  (this turn)               (a task; disk work in threads)
                          └──> segments in which nothing is live any more leave the page cache (a thread)

waits      a snapshot, until the log is durable up to its place; the closing, for the task
order      index synced, then snapshot synced, then old segments removed: a crash in between only leaves more to read
failing    a snapshot or index that cannot be written (full disk) is skipped with a line in the service's log; the
           log goes on, and the next segment tries again; an index that is found damaged ends the service
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from leeway.config import ReplayBufferOptions
from leeway.errors import PreconditionError
from leeway.v1 import storage_pb2
from replay_buffer.rules.state import RunState
from replay_buffer.storage.backup import Backup, write_backup
from replay_buffer.storage.index import Index
from replay_buffer.storage.index_file import FILE
from replay_buffer.storage.log import Log, LogFailedError, Take
from replay_buffer.storage.recovery import choose_start
from replay_buffer.storage.retention import choose_beginning, first_live, first_needed
from replay_buffer.storage.segments import (
    HEADER,
    LastRecord,
    Location,
    Position,
    list_segments,
    remove_segments,
    uncache_segments,
)
from replay_buffer.storage.snapshots import (
    Generation,
    read_generation,
    remove_snapshots,
    snapshot_positions,
    write_generation,
    write_snapshot,
)
from replay_buffer.storage.stored_state import run_to_proto

_AMPLIFICATION: Final = 8
"""Bytes of log that one byte of snapshot has to save."""
_CLOSING_SECONDS: Final = 30.0
"""How long a last snapshot may take; the disk may be full."""

log = logging.getLogger(__name__)


class Storage:
    """The log of a replay buffer with its index, snapshots and retention. Used from one event loop."""

    def __init__(self, options: ReplayBufferOptions, durable_log: Log) -> None:
        self.log = durable_log
        self._options = options
        self._directory = options.directory
        self._snapshot_bytes = 0  # of the newest
        self._snapshot_at = 0  # log bytes appended by then
        self._saving: asyncio.Task[None] | None = None
        self._beginning: asyncio.Task[None] | None = None
        self._uncached_before = 1  # segments
        self._uncaching: set[asyncio.Task[None]] = set()
        self._keeping = asyncio.Lock()  # held while segments are linked or deleted

    def recover(self, restore: Callable[[RunState], None], take: Take) -> None:
        """Bring the state back: runs of a snapshot to `restore`, what came after it, record by record, to `take`.

        Raises:
            CorruptDataError: the log is damaged.
        """
        found = read_generation(self._directory)
        self.restored_from: Generation | None = found if found is not None and not found.id else None
        self.generation = (found or Generation(b"")).opened()
        start = choose_start(self._directory, self.generation, log.warning)
        self.index = start.index
        self.index.on_damage = self._index_damaged
        for run in start.runs().values():
            restore(run)
        self.index.first_segment = start.first_segment
        self.log.recover(take, start.position, start.last_record)
        self.index.forget_before(self.log.first_segment)
        self._uncached_before = self.log.first_segment
        if found is None:
            write_generation(self._directory, self.generation)

    def _index_damaged(self, how: str) -> LogFailedError:
        """End the service: records may have been appended whose effect on ended groups is unknown.

        The file is removed, so that the next start rebuilds it instead of meeting the same damage.
        """
        path = self._directory / FILE
        with suppress(OSError):
            Index.remove(path)
        failure = LogFailedError(
            f"{path}: {how}; it was removed, and the next start rebuilds it from the log; start the replay buffer again"
        )
        self.log.fail(failure)
        return failure

    async def back_up(self, target: Path) -> Backup:
        """Copy the durable log to a new folder.

        Raises:
            PreconditionError: the folder exists or cannot be written.
        """
        async with self._keeping:
            try:
                return await asyncio.to_thread(
                    write_backup, self._directory, target, self.log.durable_end, self.generation
                )
            except OSError as error:
                raise PreconditionError(f"{target}: no backup was written: {error.strerror or error}") from error

    def begin_generation(self) -> None:
        """Make a restored backup a log of its own, once what was appended so far is durable."""
        self._beginning = asyncio.create_task(self._begin_generation())

    async def _begin_generation(self) -> None:
        try:
            await self.log.durable()
            await asyncio.to_thread(write_generation, self._directory, self.generation)
        except (OSError, LogFailedError) as error:
            log.warning("%s: is still a backup, which the next start restores again: %s", self._directory, error)

    def append(self, payload: Sequence[bytes], states: Callable[[], Iterable[RunState]]) -> Location:
        """Append a record, in parts, that has not been applied yet; `states` are the runs without it."""
        location = self.log.append(*payload)
        if location.offset == HEADER.size:
            self._segment_began(location.segment, states)
        return location

    def _remove(self, numbers: list[int]) -> None:
        """Delete segments, then the snapshots of their beginnings. Runs in a thread."""
        remove_segments(self._directory, numbers)
        older = [position for position in snapshot_positions(self._directory) if position.segment <= max(numbers)]
        remove_snapshots(self._directory, older)

    def _segment_began(self, segment: int, states: Callable[[], Iterable[RunState]]) -> None:
        self._uncache(first_live(states(), segment))
        appended = self.log.appended_bytes
        if segment == 1 or self._saving is not None:
            return
        if appended - self._snapshot_at < _AMPLIFICATION * self._snapshot_bytes:
            return  # many live groups in small segments
        self._snapshot_at = appended
        snapshot = self._capture(Position(segment, 0), self.log.segment_ended_with, states())
        if snapshot is not None:
            self._saving = asyncio.create_task(self._save(snapshot, self.log.mark, states))
            self._saving.add_done_callback(self._saved)

    def _uncache(self, live: int) -> None:
        """Let segments before `live` leave the page cache: reusing a page costs a write less than taking a new one."""
        if live <= self._uncached_before:
            return
        ended = range(self._uncached_before, live)
        self._uncached_before = live
        task = asyncio.create_task(asyncio.to_thread(uncache_segments, self._directory, ended))
        self._uncaching.add(task)
        task.add_done_callback(self._uncaching.discard)

    def _capture(
        self, position: Position, last: LastRecord | None, states: Iterable[RunState]
    ) -> storage_pb2.Snapshot | None:
        """The state as it is now; the index is complete up to the same place."""
        try:
            self.index.settle(self.generation.id, position)
        except OSError as error:
            log.warning("no snapshot at segment %d: %s", position.segment, error)
            return None
        snapshot = storage_pb2.Snapshot(
            generation=self.generation.id,
            position=storage_pb2.LogPosition(segment=position.segment, offset=position.offset),
            runs=[run_to_proto(state) for state in states],
        )
        if last is not None:
            snapshot.last_record.segment, snapshot.last_record.offset = last.position
            snapshot.last_checksum = last.checksum
        return snapshot

    async def _save(self, snapshot: storage_pb2.Snapshot, mark: int, states: Callable[[], Iterable[RunState]]) -> None:
        await self.log.durable(mark)
        self._snapshot_bytes = await asyncio.to_thread(self._write, snapshot)
        async with self._keeping:
            await self.retire(states())

    async def retire(self, states: Iterable[RunState]) -> None:
        """Delete the oldest segments, as far as nothing needs them and the options do not want them."""
        retain_bytes, retain_seconds = self._options.retain_bytes, self._options.retain_seconds
        if retain_bytes is None and retain_seconds is None:
            return
        needed = first_needed(states, self.index, self.log.durable_end.segment)
        segments = list_segments(self._directory)
        beginning = choose_beginning(
            segments,
            [position.segment for position in snapshot_positions(self._directory) if position.offset == 0],
            needed,
            time.time(),
            retain_bytes=retain_bytes,
            retain_seconds=retain_seconds,
        )
        if beginning is None:
            return
        gone = [segment for segment in segments if segment.number < beginning]
        size_bytes = sum(segment.size_bytes for segment in gone if segment.number >= self.log.first_segment)
        self.log.retire_before(beginning, size_bytes)
        self.index.forget_before(beginning)
        try:
            await asyncio.to_thread(self._remove, [segment.number for segment in gone])
        except OSError as error:
            log.warning(
                "%s: a retired segment is still there: %s; the next retirement tries again", self._directory, error
            )
            return
        log.info(
            "%s: segments up to %d are retired (%d MiB): nothing needs them",
            self._directory,
            beginning - 1,
            size_bytes >> 20,
        )

    def _write(self, snapshot: storage_pb2.Snapshot) -> int:
        """Sync the index, then write the snapshot. Runs in a thread."""
        self.index.sync()
        size_bytes = write_snapshot(self._directory, snapshot)
        newest = Position(snapshot.position.segment, snapshot.position.offset)
        # A snapshot within a segment is of a clean stop; those of beginnings may become the log's own.
        passed = [at for at in snapshot_positions(self._directory) if at.offset and at != newest]
        remove_snapshots(self._directory, passed)
        return size_bytes

    def _saved(self, task: asyncio.Task[None]) -> None:
        self._saving = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.warning("%s: no snapshot was written: %s", self._directory, error)

    async def aclose(self, states: Iterable[RunState]) -> None:
        """Write a snapshot of the log's end, so that the next start reads nothing else. `Log.aclose` comes next."""
        try:
            async with asyncio.timeout(_CLOSING_SECONDS):
                await self._leave_snapshot(states)
        except (OSError, LogFailedError) as error:  # TimeoutError among them
            log.warning("%s: no snapshot was written: %s", self._directory, error)
        finally:
            self.index.close()

    async def _leave_snapshot(self, states: Iterable[RunState]) -> None:
        if tasks := [task for task in (self._beginning, self._saving, *self._uncaching) if task is not None]:
            await asyncio.wait(tasks)
        await self.log.durable()
        last = self.log.last_record
        snapshot = None if last is None else self._capture(self.log.end, last, states)
        if snapshot is not None:
            await asyncio.to_thread(self._write, snapshot)
