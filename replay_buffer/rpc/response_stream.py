"""Groups as a stream of pieces, in serialized messages of about a mebibyte; stored chunks go out without a parser.

locations, in the order of the stream ──> records, many at a time ──> pieces: their framing, then the stored bytes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from leeway import codec
from leeway.rpc import BULK_PIECE_BYTES
from leeway.v1 import log_pb2, replay_pb2
from replay_buffer.live.views import GroupView, MemberView
from replay_buffer.rules.groups import Location
from replay_buffer.storage.records import stored_chunk

ReadMany = Callable[[Sequence[Location]], list[bytes]]
"""Records' payloads, in the order asked for."""

_MOST_RECORDS: Final = 1024
"""Read at once; fewer when they are large."""
_PIECES: Final = codec.field_tag(replay_pb2.DrawBatchResponse, "pieces")
_CHUNK: Final = codec.field_tag(replay_pb2.GroupPiece, "chunk")
assert codec.field_tag(replay_pb2.ExportGroupsResponse, "pieces") == _PIECES, "one framing serves both"


def messages(views: Sequence[GroupView], read_many: ReadMany) -> Iterator[bytes]:
    """Serialized DrawBatchResponses, which are ExportGroupsResponses too.

    Raises:
        CorruptDataError: a record is damaged on disk.
    """
    gathered: list[bytes] = []
    size_bytes = 0
    for piece_bytes, parts in _pieces(views, read_many):
        if gathered and size_bytes + piece_bytes > BULK_PIECE_BYTES:
            yield b"".join(gathered)
            gathered, size_bytes = [], 0
        gathered += parts
        size_bytes += piece_bytes
    if gathered:
        yield b"".join(gathered)


def _pieces(views: Sequence[GroupView], read_many: ReadMany) -> Iterator[tuple[int, Sequence[bytes]]]:
    """Each group announces itself, then each of its trajectories, then that one's chunks; sizes, and bytes in parts."""
    records = _read(_locations(views), read_many)
    for view in views:
        yield _serialized(replay_pb2.GroupPiece(group=_group_header(view)))
        for member in view.members:
            ending = None if member.ending is None else next(records)
            yield _serialized(_trajectory(member, ending))
            for _ in member.chunks:
                chunk = stored_chunk(next(records))
                inner = _CHUNK + codec.varint(len(chunk))
                size_bytes = len(inner) + len(chunk)
                yield size_bytes, (_PIECES, codec.varint(size_bytes), inner, chunk)


def _serialized(piece: replay_pb2.GroupPiece) -> tuple[int, Sequence[bytes]]:
    data = piece.SerializeToString()
    return len(data), (_PIECES, codec.varint(len(data)), data)


def _locations(views: Sequence[GroupView]) -> Iterator[Location]:
    for view in views:
        for member in view.members:
            if member.ending is not None:
                yield member.ending
            yield from member.chunks


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


def _group_header(view: GroupView) -> replay_pb2.GroupHeader:
    header = replay_pb2.GroupHeader(
        group_id=view.group_id,
        purpose=int(view.purpose),  # type: ignore[arg-type]
        task_index=view.task_index,
        state=int(view.state),  # type: ignore[arg-type]
        drop_reason=int(view.drop_reason or 0),  # type: ignore[arg-type]
        drop_message=view.drop_message,
        step=view.step,
        evaluation_id=view.evaluation_id,
        trajectory_count=len(view.members),
    )
    header.issued_at.FromNanoseconds(view.issued_at_ns)
    return header


def _trajectory(view: MemberView, ending: bytes | None) -> replay_pb2.GroupPiece:
    """A trajectory's header; a close goes out as it is stored."""
    header = replay_pb2.TrajectoryHeader(
        trajectory_id=view.trajectory_id,
        member=view.member,
        attempt=view.attempt,
        server_id=view.server_id,
        chunk_count=len(view.chunks),
    )
    if ending is not None:
        record = log_pb2.LogRecord.FromString(ending)
        if record.HasField("trajectory_closed"):
            header.close.CopyFrom(record.trajectory_closed.close)
        else:
            header.failure = record.trajectory_failed.failure.message
    return replay_pb2.GroupPiece(trajectory=header)
