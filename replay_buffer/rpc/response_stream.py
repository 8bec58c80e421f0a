"""Groups as a stream of pieces, in serialized messages of about a mebibyte; stored chunks go out without a parser.

locations, in the order of the stream ──> records, many at a time ──> pieces: their framing, then the stored bytes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from leeway import codec
from leeway.rpc import BULK_PIECE_BYTES
from leeway.v1 import log_pb2, replay_pb2
from replay_buffer.rules.groups import Group, GroupMember
from replay_buffer.storage.records import stored_chunk
from replay_buffer.storage.segments import Location

ReadMany = Callable[[Sequence[Location]], list[bytes]]
"""Records' payloads, in the order asked for."""

_MOST_RECORDS: Final = 1024
"""Read at once; fewer when they are large."""
_PIECES: Final = codec.field_tag(replay_pb2.DrawBatchResponse, "pieces")
_CHUNK: Final = codec.field_tag(replay_pb2.GroupPiece, "chunk")
assert codec.field_tag(replay_pb2.ExportGroupsResponse, "pieces") == _PIECES, "one framing serves both"


def messages(groups: Sequence[Group], read_many: ReadMany) -> Iterator[bytes]:
    """Serialized DrawBatchResponses, which are ExportGroupsResponses too.

    Raises:
        CorruptDataError: a record is damaged on disk.
    """
    gathered: list[bytes] = []
    size_bytes = 0
    for piece_bytes, parts in _pieces(groups, read_many):
        if gathered and size_bytes + piece_bytes > BULK_PIECE_BYTES:
            yield b"".join(gathered)
            gathered, size_bytes = [], 0
        gathered += parts
        size_bytes += piece_bytes
    if gathered:
        yield b"".join(gathered)


def _pieces(groups: Sequence[Group], read_many: ReadMany) -> Iterator[tuple[int, Sequence[bytes]]]:
    """Each group announces itself, then each of its trajectories, then that one's chunks; sizes, and bytes in parts."""
    records = _read(_locations(groups), read_many)
    for group in groups:
        yield _serialized(replay_pb2.GroupPiece(group=_group_header(group)))
        for index, member in enumerate(group.members):
            ending = None if member.end_record is None else next(records)
            yield _serialized(_trajectory(member, index, ending))
            for _ in range(member.chunk_count):
                chunk = stored_chunk(next(records))
                inner = _CHUNK + codec.varint(len(chunk))
                size_bytes = len(inner) + len(chunk)
                yield size_bytes, (_PIECES, codec.varint(size_bytes), inner, chunk)


def _serialized(piece: replay_pb2.GroupPiece) -> tuple[int, Sequence[bytes]]:
    data = piece.SerializeToString()
    return len(data), (_PIECES, codec.varint(len(data)), data)


def _locations(groups: Sequence[Group]) -> Iterator[Location]:
    for group in groups:
        for member in group.members:
            if member.end_record is not None:
                yield Location.of(member.end_record)
            for seq in range(member.chunk_count):
                yield Location.of(member.records[seq])


def _read(locations: Iterable[Location], read_many: ReadMany) -> Iterator[bytes]:
    """The records at these places, read ahead by about one message."""
    ahead: list[Location] = []
    size_bytes = 0
    for location in locations:
        if ahead and (size_bytes + location.size_bytes > BULK_PIECE_BYTES or len(ahead) == _MOST_RECORDS):
            yield from read_many(ahead)
            ahead, size_bytes = [], 0
        ahead.append(location)
        size_bytes += location.size_bytes
    if ahead:
        yield from read_many(ahead)


def _group_header(group: Group) -> replay_pb2.GroupHeader:
    header = replay_pb2.GroupHeader(
        group_id=group.group_id,
        purpose=int(group.purpose),  # type: ignore[arg-type]
        task_index=group.task_index,
        state=int(group.state),  # type: ignore[arg-type]
        drop_reason=int(group.drop_reason or 0),  # type: ignore[arg-type]
        drop_message=group.drop_message,
        step=group.step,
        evaluation_id=group.evaluation_id,
        trajectory_count=len(group.members),
    )
    header.issued_at.FromNanoseconds(group.issued_at_ns)
    return header


def _trajectory(member: GroupMember, index: int, ending: bytes | None) -> replay_pb2.GroupPiece:
    """A trajectory's header; a close goes out as it is stored."""
    header = replay_pb2.TrajectoryHeader(
        trajectory_id=member.trajectory_id,
        member=index,
        attempt=member.attempt,
        server_id=member.server_id,
        chunk_count=member.chunk_count,
    )
    if ending is not None:
        record = log_pb2.LogRecord.FromString(ending)
        if record.HasField("trajectory_closed"):
            header.close.CopyFrom(record.trajectory_closed.close)
        else:
            header.failure = record.trajectory_failed.failure.message
    return replay_pb2.GroupPiece(trajectory=header)
