"""Two kinds of file beside the log, each one frame as in the log, written as a whole or not at all.

    snapshot-SSSSSSSS-OOOOOOOOOO.pb      the live state before byte O of segment S: a restart reads only what came later
    generation                           which log a directory holds: a restored backup is not taken for the original

        original     id A
        backup       parents [A], no id
        opened       id B, parents [A]       what was written up to the backup is common, what came later is not

The log stays the truth: a snapshot that is damaged, of another log, or of a place that the log does not reach is passed
over. Only where the log's first segments
have been retired does the snapshot of its new beginning take their place; it was synced before they went.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from leeway import codec
from leeway.errors import CorruptDataError
from leeway.service.durable import replace_file
from leeway.v1 import storage_pb2
from replay_buffer.storage.segments import HEADER, Position, frame, frame_at, record_checksum, segment_path

GENERATION_FILE: Final = "generation"
_ID_BYTES: Final = 16
_PREFIX: Final = "snapshot-"
_PARTIAL: Final = ".partial"


@dataclass(frozen=True, slots=True)
class Generation:
    """Which log a directory holds."""

    id: bytes  # empty in a backup that no buffer has opened
    parents: tuple[bytes, ...] = ()  # generations that this log goes on from, oldest first
    taken_at: datetime | None = None  # backups only

    @property
    def lineage(self) -> tuple[bytes, ...]:
        """Every generation whose snapshots may fit."""
        return (*self.parents, self.id) if self.id else self.parents

    def backup(self, taken_at: datetime) -> Generation:
        """The generation of a backup taken now."""
        return Generation(b"", self.lineage, taken_at)

    def opened(self) -> Generation:
        """The generation once a buffer has opened the directory: a backup becomes a log of its own."""
        return self if self.id else Generation(secrets.token_bytes(_ID_BYTES), self.parents)


def read_generation(directory: Path) -> Generation | None:
    """Which log a directory holds; None when it does not say.

    Raises:
        CorruptDataError: the file is damaged.
    """
    path = directory / GENERATION_FILE
    try:
        message = storage_pb2.Generation.FromString(_framed(path))
    except FileNotFoundError:
        return None
    except (CorruptDataError, DecodeError) as error:
        raise CorruptDataError(f"{path}: {error}; restore it from a backup") from error
    taken_at = codec.timestamp_from_proto(message.taken_at) if message.HasField("taken_at") else None
    return Generation(message.id, tuple(message.parents), taken_at)


def write_generation(directory: Path, generation: Generation) -> None:
    """Make it durable, whole or not at all. Raises OSError."""
    message = storage_pb2.Generation(id=generation.id, parents=generation.parents)
    if generation.taken_at is not None:
        message.taken_at.CopyFrom(codec.timestamp_to_proto(generation.taken_at))
    replace_file(directory / GENERATION_FILE, frame(message.SerializeToString()))


def _framed(path: Path) -> bytes:
    """The payload of a file that is one frame, as in the log.

    Raises:
        CorruptDataError: it is damaged.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    payload = frame_at(data, 0)
    if payload is None or HEADER.size + len(payload) != len(data):
        raise CorruptDataError("fails its checksum")
    return payload


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
        snapshot = storage_pb2.Snapshot.FromString(_framed(path))
    except (OSError, CorruptDataError, DecodeError) as error:
        raise CorruptDataError(f"{path}: {error}") from error
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
    """The reason why a snapshot does not belong to this log; None when it does."""
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
