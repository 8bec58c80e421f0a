"""Segments of the log as files: frames, names, the end that is written.

    frame = uint32 length, uint32 CRC-32C of the payload, payload       both integers little-endian, length >= 1

A frame that is cut short or fails its checksum ends the log if nothing follows it: it was being written when the power
went. With a whole frame after it, acknowledged data would be behind the damage, and the log is refused.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, Protocol

import google_crc32c

from leeway.errors import ConfigError, CorruptDataError
from leeway.service.durable import hold_file, make_directory, sync_directory
from replay_buffer.rules.groups import HANDLE_BYTES, GroupMember, RecordHandle

_ZEROS: Final = bytes(1 << 16)
_SEARCHED_BYTE_BY_BYTE: Final = 1 << 14
"""Bytes behind a damaged frame at each of which another one is looked for. Beyond, records are known by how they begin,
or the search through a large torn record would take minutes: almost any four bytes are a length."""
_RECORD_BEGINS: Final = re.compile(rb"\x0a[\x02-\x10]\x08", re.DOTALL)
"""LogRecord.recorded_at, its first field: tag, length, tag of the seconds."""

HEADER: Final = struct.Struct("<II")
_HANDLE: Final = struct.Struct("<IIQ")
assert _HANDLE.size == HANDLE_BYTES, "the rules keep handles end to end"
crc32c: Callable[[bytes], int] = google_crc32c.value  # type: ignore[assignment]
_extended: Callable[[int, bytes], int] = google_crc32c.extend  # type: ignore[assignment]


class Location(NamedTuple):
    """Where a record lies. The rules are given its handle, which takes 16 bytes in memory and in snapshots."""

    segment: int
    offset: int  # of the payload
    size_bytes: int  # of the payload

    @classmethod
    def of(cls, record: RecordHandle) -> Location:
        """Where the record with this handle lies."""
        offset, segment, size_bytes = _HANDLE.unpack(record)
        return cls(segment, offset, size_bytes)

    @property
    def handle(self) -> RecordHandle:
        return RecordHandle(_HANDLE.pack(self.offset, self.segment, self.size_bytes))


def locations_of(member: GroupMember) -> list[Location]:
    """Where a trajectory's chunks lie, and after them its close or failure."""
    return [Location.of(record) for record in member.records]


class Position(NamedTuple):
    """A place between two records of the log."""

    segment: int
    offset: int  # byte of the segment's file


class LastRecord(NamedTuple):
    """The record before a place of the log, to recognize the log by."""

    position: Position
    checksum: int


def frame(*parts: bytes) -> bytes:
    """A payload, which may come in parts, as it is written."""
    return b"".join((frame_header(parts), *parts))


def frame_header(parts: Sequence[bytes]) -> bytes:
    """The header of a payload, which may come in parts."""
    checksum = 0
    for part in parts:
        checksum = _extended(checksum, part)
    return HEADER.pack(sum(map(len, parts)), checksum)


def frame_at(data: bytes | mmap, at: int) -> bytes | None:
    """The payload of the frame that begins at a byte; None when there is no whole one."""
    if at + HEADER.size > len(data):
        return None
    length, checksum = HEADER.unpack_from(data, at)
    end = at + HEADER.size + length
    if length == 0 or end > len(data):
        return None
    payload = data[at + HEADER.size : end]
    return payload if crc32c(payload) == checksum else None


def segment_path(directory: Path, segment: int) -> Path:
    """File of a segment; the first is number 1."""
    return directory / f"segment-{segment:08d}.log"


def segment_numbers(directory: Path) -> list[int]:
    """The segments there are, oldest first; the first ones may have been retired.

    Raises:
        CorruptDataError: one is missing in between.
    """
    numbers = sorted(int(path.stem.removeprefix("segment-")) for path in directory.glob("segment-*.log"))
    for number, following in pairwise(numbers):
        if following != number + 1:
            raise CorruptDataError(
                f"{segment_path(directory, number + 1)} is missing; restore it, or start with an empty directory"
            )
    return numbers


class Segment(NamedTuple):
    """A segment's file."""

    number: int
    size_bytes: int
    written_at: float  # Unix time of the newest record; for display and retention by age


def list_segments(directory: Path) -> list[Segment]:
    """The segments there are, oldest first. Raises CorruptDataError: one is missing in between."""
    segments: list[Segment] = []
    for number in segment_numbers(directory):
        status = segment_path(directory, number).stat()
        segments.append(Segment(number, status.st_size, status.st_mtime))
    return segments


def remove_segments(directory: Path, numbers: list[int]) -> None:
    """Delete segments, oldest first, so that what is left has no gap whenever this ends. Raises OSError."""
    for number in sorted(numbers):
        segment_path(directory, number).unlink(missing_ok=True)
        sync_directory(directory)


def uncache_segments(directory: Path, numbers: Iterable[int]) -> None:
    """Let segments that are on disk leave the kernel's page cache; one that has been deleted is passed over."""
    for number in numbers:
        with suppress(OSError), segment_path(directory, number).open("rb") as segment:
            os.posix_fadvise(segment.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class SegmentFile(Protocol):
    """The end of the log, as the writer sees it. Tests inject failing ones."""

    def write(self, blocks: Sequence[bytes | memoryview]) -> int:
        """Append some of the blocks, in order; returns how many bytes. Raises OSError."""
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

    def write(self, blocks: Sequence[bytes | memoryview]) -> int:
        return os.writev(self._descriptor, blocks)

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
        return hold_file(directory / "lock")
    except BlockingIOError as error:
        raise ConfigError(
            f"replay_buffer.directory: {directory} is in use by another replay buffer; stop that one first"
        ) from error
    except OSError as error:
        raise ConfigError(f"replay_buffer.directory: cannot use {directory}: {error.strerror}") from error


# A whole segment, frame by frame: verification, torn tails, damage with data behind it


def verify_segment(path: Path, *, last: bool, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Every (offset of payload, payload) of a segment from byte `start` on. A torn tail of the last one is cut off.

    Raises:
        CorruptDataError: naming file and offset of a frame that is damaged with data behind it.
    """
    _forget_cached(path)
    torn_at = yield from read_segment(path, last=last, start=start)
    if torn_at is not None:
        _cut(path, torn_at)


def read_segment(path: Path, *, last: bool, start: int = 0) -> Generator[tuple[int, bytes], None, int | None]:
    """Every (offset of payload, payload) of a segment; one record is in memory at a time. Changes nothing.

    Returns:
        Where the torn tail of the last segment begins; None when it has none.

    Raises:
        CorruptDataError: naming file and offset of a frame that is damaged with data behind it.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(start)
        at = start
        while at < size:
            payload = _next_frame(file, size - at)
            if payload is None:
                if not last or _a_frame_follows(path, at):
                    raise CorruptDataError(
                        f"{path}: the record at byte {at} is damaged and data follows it; "
                        "restore the file from a copy, or start a new run with an empty directory"
                    )
                return at
            yield at + HEADER.size, payload
            at += HEADER.size + len(payload)
    return None


def _forget_cached(path: Path) -> None:
    """Let a file be read past the page cache, which after a failed fsync holds what the disk does not."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _next_frame(file: BinaryIO, left: int) -> bytes | None:
    """The payload of the frame that begins here and ends within `left` bytes; None when there is no whole one."""
    header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    length, checksum = HEADER.unpack(header)
    if length == 0 or HEADER.size + length > left:
        return None
    payload = file.read(length)
    return payload if len(payload) == length and crc32c(payload) == checksum else None


def _a_frame_follows(path: Path, damaged_at: int) -> bool:
    """True when a whole frame begins anywhere behind a damaged one, whose own length cannot be trusted."""
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        end = len(data)
        while end - len(_ZEROS) > damaged_at and data[end - len(_ZEROS) : end] == _ZEROS:
            end -= len(_ZEROS)  # a file may have grown before its bytes arrived
        end = damaged_at + len(data[damaged_at:end].rstrip(b"\0")) if end - damaged_at <= len(_ZEROS) else end
        every = range(damaged_at + 1, min(end, damaged_at + _SEARCHED_BYTE_BY_BYTE))
        if any(frame_at(data, at) is not None for at in every):
            return True
        begin = damaged_at + HEADER.size
        while (match := _RECORD_BEGINS.search(data, begin, end)) is not None:
            begin = match.start() + 1
            del match  # it holds the map open
            if frame_at(data, begin - 1 - HEADER.size) is not None:
                return True
        return False


def record_checksum(path: Path, offset: int) -> int | None:
    """CRC-32C of the record that begins at a byte of a segment; None when there is no whole one."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            payload = _next_frame(file, os.fstat(file.fileno()).st_size - offset)
    except OSError:
        return None
    return None if payload is None else crc32c(payload)


def _cut(path: Path, size_bytes: int) -> None:
    file = AppendFile(path)
    try:
        file.truncate(size_bytes)
        file.sync()
    finally:
        file.close()
