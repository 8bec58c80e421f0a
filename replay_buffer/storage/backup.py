"""A copy of the log that can be opened as a log of its own.

    DIR.partial   sealed segments and snapshots (hard links where the disk allows, copies elsewhere), the durable
                  part of the open segment (a copy), the generation file that names the original
    DIR           the same, once everything is synced

Nothing that is linked is ever written again, so the copy does not change with the original. The index is not copied: a
buffer that opens the copy rebuilds it. It also makes the copy a generation of its own, and raises every fence above
what the original can have handed out since (`decide_restored`).
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from leeway.errors import PreconditionError
from leeway.service.durable import publish_directory, sync_file
from replay_buffer.storage.segments import Position, segment_numbers, segment_path
from replay_buffer.storage.snapshots import Generation, snapshot_path, snapshot_positions, write_generation

_COPY_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Backup:
    """A backup that was taken."""

    generation: bytes  # of the original
    end: Position
    size_bytes: int


def write_backup(source: Path, target: Path, end: Position, generation: Generation) -> Backup:
    """Copy the log of `source` up to `end`, which is durable, to a new directory.

    Raises:
        PreconditionError: the target exists already.
        OSError: it cannot be written; what was written so far is removed.
    """
    partial = target.with_name(f"{target.name}.partial")
    for path in (target, partial):
        if path.exists():
            raise PreconditionError(f"{path} exists; remove it or choose another folder for the backup")
    partial.mkdir(parents=True)
    try:
        size_bytes = _fill(source, partial, end)
        write_generation(partial, generation.backup(datetime.now(UTC)))
        publish_directory(partial, target)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Backup(generation.id, end, size_bytes)


def _fill(source: Path, partial: Path, end: Position) -> int:
    size_bytes = 0
    for number in segment_numbers(source):
        if number < end.segment:
            _link(segment_path(source, number), segment_path(partial, number))
        elif number == end.segment:
            _copy(segment_path(source, number), segment_path(partial, number), end.offset)
        else:
            break
        size_bytes += segment_path(partial, number).stat().st_size
    for position in snapshot_positions(source):
        if position.offset == 0 and position <= end:
            _link(snapshot_path(source, position), snapshot_path(partial, position))
    return size_bytes


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        _copy(source, target, source.stat().st_size)
        shutil.copystat(source, target)


def _copy(source: Path, target: Path, size_bytes: int) -> None:
    with source.open("rb") as reader, target.open("xb") as writer:
        left = size_bytes
        while left and (data := reader.read(min(left, _COPY_BYTES))):
            writer.write(data)
            left -= len(data)
    sync_file(target)
