"""Some columns of a chunk, without reading the others from disk.

    LogRecord { chunk_written { chunk: TrajectoryChunk { columns { kind, ..., values }, segments, version_spans } } }

The record is walked field by field: tags and lengths are read, the values of columns that nobody asked for are skipped.
What is read this way is checked for structure, not by the record's checksum, which covers all of it; whoever wants that
reads the whole record, as a draw does.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from leeway import codec
from leeway.errors import CorruptDataError, InvalidDataError, NotFoundError
from leeway.types import ColumnKind, TrajectoryChunk
from leeway.v1 import common_pb2, log_pb2, trajectory_pb2
from replay_buffer.rules.groups import Location
from replay_buffer.storage.segments import segment_path

_WINDOW_BYTES: Final = 512
"""Read at once while walking: a few tags and lengths."""
_LONGEST_VARINT: Final = 10

_CHUNK_WRITTEN: Final = log_pb2.LogRecord.CHUNK_WRITTEN_FIELD_NUMBER
_CHUNK: Final = log_pb2.ChunkWritten.CHUNK_FIELD_NUMBER
_COLUMNS: Final = trajectory_pb2.TrajectoryChunk.COLUMNS_FIELD_NUMBER
_KIND: Final = common_pb2.Column.KIND_FIELD_NUMBER


class _Field(NamedTuple):
    number: int
    value: int  # of a varint; otherwise where the content begins
    end: int  # of the content


class ColumnReader:
    """Reads chosen columns of records; counts what it has read."""

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
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFoundError(f"{path} has been retired; what it held is gone") from error
        try:
            return self._chunk(_Walk(descriptor, location.offset, location.offset + location.size_bytes), kinds)
        except (InvalidDataError, StopIteration, ValueError) as error:
            raise CorruptDataError(f"{path}: the record at byte {location.offset} is no chunk: {error}") from error
        finally:
            os.close(descriptor)

    def _chunk(self, walk: _Walk, kinds: Collection[ColumnKind]) -> TrajectoryChunk:
        written = next(field for field in walk.fields(walk.begin, walk.end) if field.number == _CHUNK_WRITTEN)
        chunk = next(field for field in walk.fields(written.value, written.end) if field.number == _CHUNK)
        wanted: list[bytes] = []
        for field in walk.fields(chunk.value, chunk.end):
            if field.number != _COLUMNS or _kind(walk, field) in kinds:
                wanted.append(walk.raw(field))
        self.read_bytes += walk.read_bytes
        return codec.decode_chunk(b"".join(wanted))


def _kind(walk: _Walk, column: _Field) -> int:
    return next(field.value for field in walk.fields(column.value, column.end) if field.number == _KIND)


class _Walk:
    """The fields of serialized messages within one range of a file."""

    def __init__(self, descriptor: int, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        self.read_bytes = 0
        self._descriptor = descriptor
        self._window = b""
        self._window_at = 0
        self._tag_at: dict[_Field, int] = {}

    def fields(self, begin: int, end: int) -> Iterator[_Field]:
        """The fields of the message that lies at [begin, end). Raises ValueError: it is none."""
        at = begin
        while at < end:
            tag_at = at
            tag, at = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            if wire == 0:
                value, at = self._varint(at, end)
                field = _Field(number, value, at)
            else:
                if wire == 2:
                    size_bytes, at = self._varint(at, end)
                else:
                    size_bytes = {1: 8, 5: 4}.get(wire, end)
                if at + size_bytes > end:
                    raise ValueError(f"field {number} exceeds its message")
                field = _Field(number, at, at + size_bytes)
                at += size_bytes
            self._tag_at[field] = tag_at
            yield field

    def raw(self, field: _Field) -> bytes:
        """A field as it lies there, tag included."""
        return self._read(self._tag_at[field], field.end)

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        if not self._window_at <= at <= self._window_at + len(self._window) - _LONGEST_VARINT:
            self._window = self._read(at, min(at + _WINDOW_BYTES, self.end))
            self._window_at = at
        value = 0
        for place in range(_LONGEST_VARINT):
            if at + place >= end:
                break
            byte = self._window[at - self._window_at + place]
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                return value, at + place + 1
        raise ValueError("a number does not end")

    def _read(self, begin: int, end: int) -> bytes:
        data = os.pread(self._descriptor, end - begin, begin)
        self.read_bytes += len(data)
        if len(data) < end - begin:
            raise ValueError("the file ends before it")
        return data
