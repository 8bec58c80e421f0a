"""The file `generation`: which log a directory holds, so that a restored backup is not taken for the original.

original     id A
backup       parents [A], no id
opened       id B, parents [A]       what was written up to the backup is common, what came later is not
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from leeway import codec
from leeway.errors import CorruptDataError
from leeway.service.durable import replace_file
from leeway.v1 import storage_pb2
from replay_buffer.storage.segments import HEADER, crc32c, frame

FILE: Final = "generation"
_ID_BYTES: Final = 16


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
        """What a backup taken now says."""
        return Generation(b"", self.lineage, taken_at)

    def opened(self) -> Generation:
        """What a directory says once a buffer has opened it: a backup becomes a log of its own."""
        return self if self.id else Generation(secrets.token_bytes(_ID_BYTES), self.parents)


def read_generation(directory: Path) -> Generation | None:
    """Which log a directory holds; None when it does not say.

    Raises:
        CorruptDataError: the file is damaged.
    """
    path = directory / FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    payload = data[HEADER.size :]
    if len(data) < HEADER.size or HEADER.unpack_from(data) != (len(payload), crc32c(payload)):
        raise CorruptDataError(f"{path}: fails its checksum; restore it from a backup")
    try:
        message = storage_pb2.Generation.FromString(payload)
    except DecodeError as error:
        raise CorruptDataError(f"{path}: {error}") from error
    taken_at = codec.timestamp_from_proto(message.taken_at) if message.HasField("taken_at") else None
    return Generation(message.id, tuple(message.parents), taken_at)


def write_generation(directory: Path, generation: Generation) -> None:
    """Make it durable, whole or not at all. Raises OSError."""
    message = storage_pb2.Generation(id=generation.id, parents=generation.parents)
    if generation.taken_at is not None:
        message.taken_at.CopyFrom(codec.timestamp_to_proto(generation.taken_at))
    replace_file(directory / FILE, frame(message.SerializeToString()))
