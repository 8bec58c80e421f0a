"""Segments of the log as files: frames, verification at open, torn tails.

    frame = uint32 length, uint32 CRC-32C of the payload, payload       both integers little-endian, length >= 1

A frame that is cut short or fails its checksum ends the log if nothing follows it: it was being written when the power
went. With a whole frame after it, acknowledged data would be behind the damage, and the log is refused.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from typing import Final, Protocol

import google_crc32c

from leeway.durable import make_directory, sync_directory
from leeway.errors import ConfigError, CorruptDataError
from replay_buffer.state import Location

HEADER: Final = struct.Struct("<II")
_MAX_OPEN_FILES: Final = 64

_crc32c: Callable[[bytes], int] = google_crc32c.value  # type: ignore[assignment]


def frame(payload: bytes) -> bytes:
    """A payload as it is written."""
    return HEADER.pack(len(payload), _crc32c(payload)) + payload


def segment_path(directory: Path, segment: int) -> Path:
    """File of a segment; the first is number 1."""
    return directory / f"segment-{segment:08d}.log"


def segment_numbers(directory: Path) -> list[int]:
    """The segments there are, oldest first.

    Raises:
        CorruptDataError: one is missing in between.
    """
    numbers = sorted(int(path.stem.removeprefix("segment-")) for path in directory.glob("segment-*.log"))
    if numbers != list(range(1, len(numbers) + 1)):
        missing = next(number for number in range(1, len(numbers) + 2) if number not in numbers)
        raise CorruptDataError(
            f"{segment_path(directory, missing)} is missing; restore it, or start with an empty directory"
        )
    return numbers


class SegmentFile(Protocol):
    """The end of the log, as the writer sees it. Tests inject failing ones."""

    def write(self, data: bytes | memoryview) -> int:
        """Append some of `data`; returns how many bytes. Raises OSError."""
        ...

    def sync(self) -> None:
        """Make everything written durable. Raises OSError."""
        ...

    def truncate(self, size_bytes: int) -> None:
        """Cut the file back. Raises OSError."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


class AppendFile:
    """A segment on a real disk."""

    def __init__(self, path: Path) -> None:
        # Its name first: what is synced into a file without a durable name is lost with it.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
        sync_directory(path.parent)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def write(self, data: bytes | memoryview) -> int:
        return os.write(self._descriptor, data)

    def sync(self) -> None:
        os.fdatasync(self._descriptor)

    def truncate(self, size_bytes: int) -> None:
        os.ftruncate(self._descriptor, size_bytes)

    def close(self) -> None:
        os.close(self._descriptor)


OpenFile = Callable[[Path], SegmentFile]


def lock_directory(directory: Path) -> int:
    """Make the directory if needed and hold it for this process; returns the descriptor that holds it.

    Raises:
        ConfigError: another process holds it, or it cannot be used.
    """
    try:
        make_directory(directory)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"replay_buffer.directory: cannot use {directory}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(
            f"replay_buffer.directory: {directory} is in use by another replay buffer; stop that one first"
        ) from error
    return descriptor


def verify_segment(path: Path, *, last: bool) -> Iterator[tuple[int, bytes]]:
    """Every (offset of payload, payload) of a segment. A torn tail of the last segment is cut off.

    Raises:
        CorruptDataError: naming file and offset of a frame that is damaged with data behind it.
    """
    data = _read_from_disk(path)
    at = 0
    while at < len(data):
        payload = _frame_at(data, at)
        if payload is None:
            if not last or _a_frame_follows(data, at):
                raise CorruptDataError(
                    f"{path}: the record at byte {at} is damaged and data follows it; "
                    "restore the file from a copy, or start the run anew with an empty directory"
                )
            _cut(path, at)
            return
        yield at + HEADER.size, payload
        at += HEADER.size + len(payload)


def _read_from_disk(path: Path) -> bytes:
    """Read a file past the page cache, which after a failed fsync holds what the disk does not."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return path.read_bytes()
    finally:
        os.close(descriptor)


def _frame_at(data: bytes, at: int) -> bytes | None:
    if at + HEADER.size > len(data):
        return None
    length, checksum = HEADER.unpack_from(data, at)
    end = at + HEADER.size + length
    if length == 0 or end > len(data):
        return None
    payload = data[at + HEADER.size : end]
    return payload if _crc32c(payload) == checksum else None


def _a_frame_follows(data: bytes, damaged_at: int) -> bool:
    """Whether a whole frame begins anywhere behind a damaged one, whose own length cannot be trusted."""
    written = data.rstrip(b"\0")  # a file may have grown before its bytes arrived
    return any(_frame_at(data, at) is not None for at in range(damaged_at + 1, len(written)))


def _cut(path: Path, size_bytes: int) -> None:
    file = AppendFile(path)
    try:
        file.truncate(size_bytes)
        file.sync()
    finally:
        file.close()


class SegmentReader:
    """Reads single records; checks each. Safe from any thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._lock = Lock()

    def read(self, location: Location) -> bytes:
        """The payload at a location.

        Raises:
            CorruptDataError: the bytes fail their checksum, or are gone.
        """
        path = segment_path(self._directory, location.segment)
        with self._lock:
            try:
                data = os.pread(
                    self._descriptor(path, location.segment),
                    HEADER.size + location.size_bytes,
                    location.offset - HEADER.size,
                )
            except OSError as error:
                raise CorruptDataError(f"{path}: cannot read byte {location.offset}: {error.strerror}") from error
        payload = _frame_at(data, 0)
        if payload is None or len(payload) != location.size_bytes:
            raise CorruptDataError(f"{path}: the record at byte {location.offset - HEADER.size} is damaged on disk")
        return payload

    def _descriptor(self, path: Path, segment: int) -> int:
        if segment in self._descriptors:
            self._descriptors.move_to_end(segment)
        else:
            self._descriptors[segment] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._descriptors) > _MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        return self._descriptors[segment]

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])
