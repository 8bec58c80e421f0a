"""Recovery: the place of the log from which a restart folds, and the index that it uses.

    a snapshot that fits, and an index complete up to it     from its place on: the tail
    neither, and the log begins with segment 1               from the beginning, with a rebuilt index
    neither, and the first segments are retired              from the snapshot of the new beginning, likewise

Whatever does not fit is passed over with a line in the service's log, never repaired by guessing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from leeway.errors import CorruptDataError
from leeway.v1 import storage_pb2
from replay_buffer.rules.state import RunState
from replay_buffer.storage.index import Index
from replay_buffer.storage.index_file import FILE
from replay_buffer.storage.log import BEGINNING
from replay_buffer.storage.run_index import RunIndex
from replay_buffer.storage.segments import LastRecord, Position, segment_numbers, segment_path
from replay_buffer.storage.snapshots import Generation, misfit, read_snapshot, snapshot_path, snapshot_positions
from replay_buffer.storage.stored_state import run_from_proto

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Start:
    """Where folding begins."""

    position: Position
    snapshot: storage_pb2.Snapshot | None
    index: Index
    first_segment: int  # of the log that there still is

    @property
    def last_record(self) -> LastRecord | None:
        """The record before the place."""
        if self.snapshot is None or not self.snapshot.HasField("last_record"):
            return None
        last = self.snapshot.last_record
        return LastRecord(Position(last.segment, last.offset), self.snapshot.last_checksum)

    def runs(self) -> dict[str, RunState]:
        """The runs as they were at the place.

        Raises:
            CorruptDataError: the snapshot contradicts itself.
        """
        stored = () if self.snapshot is None else self.snapshot.runs
        return {run.spec.run: run_from_proto(run, RunIndex(self.index, run.spec.run)) for run in stored}


def choose_start(
    directory: Path, generation: Generation, warn: Callable[..., None], *, read_only: bool = False
) -> Start:
    """The shortest way to the state of a directory; rebuilds the index where it has to.

    Args:
        directory: holds the log.
        generation: which log it is.
        warn: hears, like a logger, of what is passed over.
        read_only: nothing is changed; an index that cannot be used is rebuilt in memory.

    Raises:
        CorruptDataError: the log's beginning is retired, and no snapshot stands in for it.
    """
    numbers = segment_numbers(directory)
    path = directory / FILE
    index, complete_to = _open_index(path, generation, warn, read_only=read_only)
    for position in reversed(snapshot_positions(directory)):
        if complete_to is None or position > complete_to:
            continue
        snapshot = fitting_snapshot(directory, position, generation, numbers, warn)
        if snapshot is None:
            continue
        try:
            if not read_only:
                index.forget_from(position)
        except CorruptDataError as error:
            warn("%s", error.message)
            break
        return Start(position, snapshot, index, numbers[0] if numbers else position.segment)
    index.close()
    if not read_only:
        Index.remove(path)
    position, snapshot = base_of(directory, generation, warn)
    if numbers:
        log.info("%s: the index is rebuilt from segment %d on", directory, position.segment)
    return Start(position, snapshot, Index(None if read_only else path), numbers[0] if numbers else position.segment)


def base_of(
    directory: Path, generation: Generation, warn: Callable[..., None]
) -> tuple[Position, storage_pb2.Snapshot | None]:
    """Where the log that there still is begins, and the state there.

    Raises:
        CorruptDataError: the log's beginning is retired, and no snapshot stands in for it.
    """
    numbers = segment_numbers(directory)
    if not numbers or numbers[0] == 1:
        return BEGINNING, None
    for position in snapshot_positions(directory):
        if position.segment < numbers[0]:
            continue
        snapshot = fitting_snapshot(directory, position, generation, numbers, warn)
        if snapshot is not None:
            if position != Position(numbers[0], 0):
                warn("%s: what ended before segment %d can no longer be listed", directory, position.segment)
            return position, snapshot
    needed = snapshot_path(directory, Position(numbers[0], 0))
    raise CorruptDataError(
        f"{segment_path(directory, numbers[0])}: the log begins here, but {needed} is missing or damaged; "
        "restore the directory from a backup"
    )


def fitting_snapshot(
    directory: Path,
    position: Position,
    generation: Generation,
    numbers: Sequence[int],
    warn: Callable[..., None],
) -> storage_pb2.Snapshot | None:
    """A snapshot, unless it is damaged or of another log."""
    try:
        snapshot = read_snapshot(directory, position)
    except CorruptDataError as error:
        warn("%s; it is passed over", error.message)
        return None
    reason = misfit(directory, snapshot, generation, numbers)
    if reason is not None:
        warn("%s: %s; it is passed over", snapshot_path(directory, position), reason)
        return None
    return snapshot


def _open_index(
    path: Path, generation: Generation, warn: Callable[..., None], *, read_only: bool
) -> tuple[Index, Position | None]:
    """The index, and up to which place of this log it is complete."""
    if read_only and not path.exists():
        return Index(), None
    try:
        index = Index(path, read_only=read_only)
        return index, index.complete_to(generation.id)
    except CorruptDataError as error:
        warn("%s", error.message)
        if read_only:
            return Index(), None
        Index.remove(path)
        return Index(path), None
