"""Snapshots as files: the live state at one place of the log, so that a restart reads only what came later.

    snapshot-SSSSSSSS-OOOOOOOOOO.pb      S: segment, O: byte of its file; one frame, as in the log, of a Snapshot

A snapshot is whole or not there: written beside its name, synced, renamed. The log stays the truth: a snapshot that is
damaged, of another log, or of a place that the log does not reach is passed over. Only where the log's first segments
have been retired does the snapshot of its new beginning take their place; it was synced before they went.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from leeway.errors import CorruptDataError
from leeway.service.durable import replace_file
from leeway.v1 import storage_pb2
from replay_buffer.storage.generation import Generation
from replay_buffer.storage.segment_scan import record_checksum
from replay_buffer.storage.segments import HEADER, Position, crc32c, frame, segment_path

_PREFIX: Final = "snapshot-"
_PARTIAL: Final = ".partial"


def snapshot_path(directory: Path, position: Position) -> Path:
    """File of a snapshot."""
    return directory / f"{_PREFIX}{position.segment:08d}-{position.offset:010d}.pb"


def snapshot_positions(directory: Path) -> list[Position]:
    """The snapshots there are, oldest first."""
    found: list[Position] = []
    for path in directory.glob(f"{_PREFIX}*.pb"):
        segment, _, offset = path.stem.removeprefix(_PREFIX).partition("-")
        if segment.isdecimal() and offset.isdecimal():
            found.append(Position(int(segment), int(offset)))
    return sorted(found)


def read_snapshot(directory: Path, position: Position) -> storage_pb2.Snapshot:
    """A snapshot as it was written.

    Raises:
        CorruptDataError: it is damaged.
    """
    path = snapshot_path(directory, position)
    try:
        data = path.read_bytes()
        length, checksum = HEADER.unpack_from(data) if len(data) >= HEADER.size else (0, 0)
        payload = data[HEADER.size :]
        if len(payload) != length or crc32c(payload) != checksum:
            raise CorruptDataError(f"{path}: fails its checksum")
        snapshot = storage_pb2.Snapshot.FromString(payload)
    except (OSError, DecodeError) as error:
        raise CorruptDataError(f"{path}: cannot be read: {error}") from error
    if Position(snapshot.position.segment, snapshot.position.offset) != position:
        raise CorruptDataError(f"{path}: holds the state of another place of the log")
    return snapshot


def write_snapshot(directory: Path, snapshot: storage_pb2.Snapshot) -> int:
    """Make a snapshot durable; returns its size in bytes. Raises OSError."""
    data = frame(snapshot.SerializeToString())
    replace_file(snapshot_path(directory, Position(snapshot.position.segment, snapshot.position.offset)), data)
    return len(data)


def remove_snapshots(directory: Path, positions: list[Position]) -> None:
    """Remove snapshots, and what an interrupted `write_snapshot` left."""
    for position in positions:
        snapshot_path(directory, position).unlink(missing_ok=True)
    for partial in directory.glob(f"{_PREFIX}*{_PARTIAL}"):
        partial.unlink(missing_ok=True)


def misfit(
    directory: Path, snapshot: storage_pb2.Snapshot, generation: Generation, numbers: Sequence[int]
) -> str | None:
    """Why a snapshot is not one of this log; None when it is."""
    position = Position(snapshot.position.segment, snapshot.position.offset)
    if snapshot.generation not in generation.lineage:
        return "it was written for another log"
    if position.segment not in numbers:
        # A segment begins with its first record; the one before may be the last that there is.
        if position.offset or (numbers and position.segment != numbers[-1] + 1):
            return "the log does not reach its place"
    elif segment_path(directory, position.segment).stat().st_size < position.offset:
        return "the log does not reach its place"
    if snapshot.HasField("last_record") and snapshot.last_record.segment in numbers:
        last = snapshot.last_record
        if record_checksum(segment_path(directory, last.segment), last.offset) != snapshot.last_checksum:
            return "the record before its place is another one"
    return None
