"""Records by their locations: whole ones, with few reads and few open files, or some columns of a chunk.

    LogRecord { chunk_written { chunk: TrajectoryChunk { columns { kind, ..., values }, segments, version_spans } } }

For columns the segment is mapped into memory and the record walked field by field, so that of those that nobody asked
for only the pages with their tags are read. They are checked for structure, not by the record's checksum, which covers
all of it; a draw reads and checks whole records.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from mmap import ACCESS_READ, MADV_RANDOM, mmap
from pathlib import Path
from threading import Lock
from typing import Final

from leeway import codec
from leeway.codec.fields import fields, find_field
from leeway.errors import CorruptDataError, InvalidDataError, NotFoundError
from leeway.types import ColumnKind, TrajectoryChunk
from leeway.v1 import common_pb2, log_pb2, trajectory_pb2
from replay_buffer.storage.segments import HEADER, Location, frame_at, frame_header, segment_path

_CHUNK: Final = (log_pb2.LogRecord.CHUNK_WRITTEN_FIELD_NUMBER, log_pb2.ChunkWritten.CHUNK_FIELD_NUMBER)
_COLUMNS: Final = trajectory_pb2.TrajectoryChunk.COLUMNS_FIELD_NUMBER
_KIND: Final = common_pb2.Column.KIND_FIELD_NUMBER


_MAX_OPEN_FILES: Final = 64
_LARGE_BYTES: Final = 1 << 17
"""The most that is read at once, unless a single record is larger."""
_GAP_BYTES: Final = 1 << 12
"""Between two records: reading over it costs less than reading twice."""


def _runs(locations: Sequence[Location]) -> Iterator[list[Location]]:
    """Locations in the order of the log, those together that one read should bring."""
    together: list[Location] = []
    end = size_bytes = 0
    for location in sorted(set(locations)):
        gap = location.offset - HEADER.size - end
        size_bytes += gap + HEADER.size + location.size_bytes
        if together and (location.segment != together[0].segment or gap > _GAP_BYTES or size_bytes > _LARGE_BYTES):
            yield together
            together = []
        if not together:
            size_bytes = HEADER.size + location.size_bytes
        together.append(location)
        end = location.offset + location.size_bytes
    if together:
        yield together


class SegmentReader:
    """Reads single records; checks each. Safe from any thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._lock = Lock()

    def read(self, location: Location) -> bytes:
        """The payload at a location.

        Raises:
            NotFoundError: the segment has been retired.
            CorruptDataError: the bytes fail their checksum.
        """
        begin = location.offset - HEADER.size
        return self._payload(self._bytes(location.segment, begin, HEADER.size + location.size_bytes), begin, location)

    def read_many(self, locations: Sequence[Location]) -> list[bytes]:
        """The payloads at several locations; what lies close together is read at once.

        Raises:
            NotFoundError: a segment has been retired.
            CorruptDataError: the bytes of one fail their checksum.
        """
        payloads: dict[Location, bytes] = {}
        for together in _runs(locations):
            first, last = together[0], together[-1]
            if len(together) == 1 and first.size_bytes >= _LARGE_BYTES:
                payloads[first] = self._large(first)
                continue
            begin = first.offset - HEADER.size
            data = self._bytes(first.segment, begin, last.offset + last.size_bytes - begin)
            for location in together:
                payloads[location] = self._payload(data, begin, location)
        return [payloads[location] for location in locations]

    def _large(self, location: Location) -> bytes:
        """A record whose payload is not worth copying out of its frame."""
        header = self._bytes(location.segment, location.offset - HEADER.size, HEADER.size)
        payload = self._bytes(location.segment, location.offset, location.size_bytes)
        if header != frame_header((payload,)):
            raise self._damaged(location)
        return payload

    def _payload(self, data: bytes, begin: int, location: Location) -> bytes:
        """One record of bytes that were read from an offset on."""
        payload = frame_at(data, location.offset - HEADER.size - begin)
        if payload is None or len(payload) != location.size_bytes:
            raise self._damaged(location)
        return payload

    def _damaged(self, location: Location) -> CorruptDataError:
        path = segment_path(self._directory, location.segment)
        return CorruptDataError(f"{path}: the record at byte {location.offset - HEADER.size} is damaged on disk")

    def _bytes(self, segment: int, begin: int, size_bytes: int) -> bytes:
        with self._lock:
            try:
                return os.pread(self._descriptor(segment), size_bytes, begin)
            except FileNotFoundError as error:
                path = segment_path(self._directory, segment)
                raise NotFoundError(f"{path} has been retired; what it held is gone") from error
            except OSError as error:
                path = segment_path(self._directory, segment)
                raise CorruptDataError(f"{path}: cannot read byte {begin}: {error.strerror}") from error

    def _descriptor(self, segment: int) -> int:
        if segment in self._descriptors:
            self._descriptors.move_to_end(segment)
        else:
            path = segment_path(self._directory, segment)
            self._descriptors[segment] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._descriptors) > _MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        return self._descriptors[segment]

    def close_before(self, segment: int) -> None:
        """Let go of older segments, so that deleting them frees their space."""
        with self._lock:
            for number in [number for number in self._descriptors if number < segment]:
                os.close(self._descriptors.pop(number))

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])


class ColumnReader:
    """Reads chosen columns of records; counts the bytes that it has taken."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.read_bytes = 0

    def read(self, location: Location, kinds: Collection[ColumnKind]) -> TrajectoryChunk:
        """A chunk with all of its segments and version spans, and only those columns.

        Raises:
            NotFoundError: the record has been retired.
            CorruptDataError: it is not a chunk.
        """
        path = segment_path(self._directory, location.segment)
        try:
            with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
                data.madvise(MADV_RANDOM)
                chosen = _chosen(data, location, kinds)
            self.read_bytes += len(chosen)
            return codec.decode_chunk(chosen)
        except FileNotFoundError as error:
            raise NotFoundError(f"{path} has been retired; what it held is gone") from error
        except InvalidDataError as error:
            raise CorruptDataError(f"{path}: the record at byte {location.offset} is no chunk: {error}") from error


def _chosen(data: mmap, location: Location, kinds: Collection[ColumnKind]) -> bytes:
    """The chunk's fields but the columns of other kinds."""
    end = location.offset + location.size_bytes
    if end > len(data):
        raise InvalidDataError("the file ends before it")
    chunk = find_field(data, location.offset, end, *_CHUNK)
    return b"".join(
        data[field.tag_at : field.end]
        for field in fields(data, chunk.begin, chunk.end)
        if field.number != _COLUMNS or find_field(data, field.begin, field.end, _KIND).value in kinds
    )
