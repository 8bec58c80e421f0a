"""Groups as a stream of pieces, in messages of about a mebibyte; chunks come from the log byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from leeway import codec
from leeway.rpc import BULK_PIECE_BYTES
from leeway.v1 import replay_pb2
from replay_buffer.groups import Location
from replay_buffer.records import decode
from replay_buffer.transitions import ChunkWritten, TrajectoryClosed, TrajectoryFailed
from replay_buffer.views import GroupView, MemberView

Read = Callable[[Location], bytes]
_HEADER_BYTES = 256
"""What a header counts for when messages are filled; only their rough size matters."""


def messages(views: Iterable[GroupView], read: Read) -> Iterator[list[replay_pb2.GroupPiece]]:
    """The pieces of groups, gathered into messages.

    Raises:
        CorruptDataError: a record is damaged on disk.
    """
    gathered: list[replay_pb2.GroupPiece] = []
    size_bytes = 0
    for piece in pieces(views, read):
        piece_bytes = len(piece.chunk) or _HEADER_BYTES
        if gathered and size_bytes + piece_bytes > BULK_PIECE_BYTES:
            yield gathered
            gathered, size_bytes = [], 0
        gathered.append(piece)
        size_bytes += piece_bytes
    if gathered:
        yield gathered


def pieces(views: Iterable[GroupView], read: Read) -> Iterator[replay_pb2.GroupPiece]:
    """Each group announces itself, then each of its trajectories, then that one's chunks."""
    for view in views:
        yield replay_pb2.GroupPiece(group=_group_header(view))
        for member in view.members:
            yield replay_pb2.GroupPiece(trajectory=_trajectory_header(member, read))
            for location in member.chunks:
                written = decode(read(location)).transition
                assert isinstance(written, ChunkWritten)
                yield replay_pb2.GroupPiece(chunk=written.chunk)


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


def _trajectory_header(view: MemberView, read: Read) -> replay_pb2.TrajectoryHeader:
    header = replay_pb2.TrajectoryHeader(
        trajectory_id=view.trajectory_id,
        member=view.member,
        attempt=view.attempt,
        server_id=view.server_id,
        chunk_count=len(view.chunks),
    )
    match decode(read(view.ending)).transition if view.ending is not None else None:
        case TrajectoryClosed(close=close):
            header.close.CopyFrom(codec.close_to_proto(close))
        case TrajectoryFailed(failure=failure):
            header.failure = failure.message
        case _:
            pass
    return header
