"""Some columns of a chunk, without reading the others from disk: a tool's way to the log.

    LogRecord { chunk_written { chunk: TrajectoryChunk { columns { kind, ..., values }, segments, version_spans } } }

The segment is mapped into memory and the record walked field by field, so that of columns that nobody asked for only
the pages with their tags are read. What is read this way is checked for structure, not by the record's checksum, which
covers all of it; a draw reads and checks whole records.
"""

from __future__ import annotations

from collections.abc import Collection
from mmap import ACCESS_READ, MADV_RANDOM, mmap
from pathlib import Path
from typing import Final

from leeway import codec
from leeway.codec.fields import fields, find_field
from leeway.errors import CorruptDataError, InvalidDataError, NotFoundError
from leeway.types import ColumnKind, TrajectoryChunk
from leeway.v1 import common_pb2, log_pb2, trajectory_pb2
from replay_buffer.rules.groups import Location
from replay_buffer.storage.segments import segment_path

_CHUNK: Final = (log_pb2.LogRecord.CHUNK_WRITTEN_FIELD_NUMBER, log_pb2.ChunkWritten.CHUNK_FIELD_NUMBER)
_COLUMNS: Final = trajectory_pb2.TrajectoryChunk.COLUMNS_FIELD_NUMBER
_KIND: Final = common_pb2.Column.KIND_FIELD_NUMBER


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
