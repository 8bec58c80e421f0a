"""A whole segment, frame by frame: verification at open, torn tails, damage with data behind it."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import BinaryIO, Final

from leeway.errors import CorruptDataError
from replay_buffer.storage.segments import HEADER, AppendFile, crc32c, frame_at

_ZEROS: Final = bytes(1 << 16)
_SEARCHED_BYTE_BY_BYTE: Final = 1 << 14
"""Bytes behind a damaged frame at each of which another one is looked for. Beyond, records are known by how they begin,
or the search through a large torn record would take minutes: almost any four bytes are a length."""
_RECORD_BEGINS: Final = re.compile(rb"\x0a[\x02-\x10]\x08", re.DOTALL)
"""LogRecord.recorded_at, its first field: tag, length, tag of the seconds."""


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
                        "restore the file from a copy, or start the run anew with an empty directory"
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
    """Whether a whole frame begins anywhere behind a damaged one, whose own length cannot be trusted."""
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
