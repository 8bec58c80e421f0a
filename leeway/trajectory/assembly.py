"""From pieces to whole trajectories: checks a trajectory's chunks and joins their columns on one token axis.

pieces ──> records: chunks and a close ──> digest, `TrajectoryCheck` ──> arrays
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from leeway import codec
from leeway.errors import CorruptDataError, InvalidDataError
from leeway.trajectory.check import TrajectoryCheck
from leeway.types import (
    Array,
    Column,
    ColumnKind,
    DropReason,
    GroupRecord,
    GroupState,
    Purpose,
    Trajectory,
    TrajectoryChunk,
    TrajectoryClose,
    TrajectoryGroup,
    TrajectoryRecord,
)
from leeway.v1 import replay_pb2


def assemble_groups(pieces: Iterable[replay_pb2.GroupPiece]) -> list[TrajectoryGroup]:
    """Whole groups from a drawn batch.

    Raises:
        CorruptDataError: a trajectory's chunks are not what its close sealed.
        InvalidDataError: a trajectory's columns do not fit together.
    """
    groups: list[TrajectoryGroup] = []
    for record in assemble_records(pieces):
        trajectories = [assemble_trajectory(trajectory) for trajectory in record.trajectories]
        trajectories.sort(key=lambda trajectory: trajectory.member)
        groups.append(TrajectoryGroup(record.group_id, record.task_index, tuple(trajectories)))
    return groups


def assemble_records(pieces: Iterable[replay_pb2.GroupPiece]) -> Iterator[GroupRecord]:
    """Group records from a stream of pieces: header, then trajectories, each with its chunks."""
    source = iter(pieces)
    for piece in source:
        if piece.WhichOneof("piece") != "group":
            raise InvalidDataError("the stream of groups does not begin with a group")
        header = piece.group
        trajectories = tuple(_read_trajectory(source, header.group_id) for _ in range(header.trajectory_count))
        yield GroupRecord(
            group_id=header.group_id,
            purpose=codec.enum_from_proto(Purpose, header.purpose),
            task_index=header.task_index,
            state=codec.enum_from_proto(GroupState, header.state),
            drop_reason=codec.enum_from_proto(DropReason, header.drop_reason) if header.drop_reason else None,
            drop_message=header.drop_message,
            step=header.step,
            evaluation_id=header.evaluation_id,
            issued_at=codec.timestamp_from_proto(header.issued_at),
            trajectories=trajectories,
        )


def _read_trajectory(source: Iterator[replay_pb2.GroupPiece], group_id: str) -> TrajectoryRecord:
    piece = next(source, None)
    if piece is None or piece.WhichOneof("piece") != "trajectory":
        raise InvalidDataError(f"group {group_id}: the stream ends before all of its trajectories came")
    header = piece.trajectory
    chunks: list[bytes] = []
    for _ in range(header.chunk_count):
        piece = next(source, None)
        if piece is None or piece.WhichOneof("piece") != "chunk":
            raise InvalidDataError(f"trajectory {header.trajectory_id}: the stream ends before all of its chunks came")
        chunks.append(piece.chunk)
    return TrajectoryRecord(
        trajectory_id=header.trajectory_id,
        member=header.member,
        attempt=header.attempt,
        server_id=header.server_id,
        close=codec.close_from_proto(header.close) if header.HasField("close") else None,
        failure=header.failure,
        chunks=tuple(chunks),
    )


def assemble_trajectory(record: TrajectoryRecord) -> Trajectory:
    """One closed trajectory as arrays on one token axis.

    Raises:
        CorruptDataError: the chunks are not what the close sealed.
        InvalidDataError: the trajectory is open, or its columns do not fit together.
    """
    close = record.close
    where = f"trajectory {record.trajectory_id}"
    if close is None:
        raise InvalidDataError(f"{where} is not closed")
    digest = codec.chain_digest(codec.EMPTY_CHAIN, *record.chunks)
    if digest != close.digest or len(record.chunks) != close.chunk_count:
        raise CorruptDataError(f"{where}: its chunks are not what its close sealed")
    try:
        return join_chunks([codec.decode_chunk(chunk) for chunk in record.chunks], record, close)
    except InvalidDataError as error:
        raise InvalidDataError(f"{where}: {error.message}") from error


def join_chunks(chunks: Sequence[TrajectoryChunk], record: TrajectoryRecord, close: TrajectoryClose) -> Trajectory:
    """Check decoded chunks, as far as that needs no knowledge of the run, and join their columns.

    Raises:
        InvalidDataError: they do not fit together; see `TrajectoryCheck.whole`.
    """
    judge = TrajectoryCheck()
    for chunk in chunks:
        judge.take(chunk)
    n = close.token_count
    segments, _ = judge.whole(n)
    loss_mask = np.zeros(n, dtype=np.bool_)
    for segment in segments:
        loss_mask[segment.start_token : segment.end_token] = segment.in_loss
    columns = [column for chunk in chunks for column in chunk.columns]
    token_ids, behavior_logprobs = (
        _joined(columns, kind, n) for kind in (ColumnKind.TOKEN_IDS, ColumnKind.BEHAVIOR_LOGPROBS)
    )
    assert token_ids is not None
    assert behavior_logprobs is not None
    return Trajectory(
        trajectory_id=record.trajectory_id,
        member=record.member,
        attempt=record.attempt,
        server_id=record.server_id,
        token_ids=token_ids,
        behavior_logprobs=behavior_logprobs,
        loss_mask=loss_mask,
        version_spans=tuple(span for chunk in chunks for span in chunk.version_spans),
        segments=segments,
        reward=close.reward,
        finish_reason=close.finish_reason,
        generation_started_at=close.generation_started_at,
        generation_finished_at=close.generation_finished_at,
        routing=_joined(columns, ColumnKind.ROUTING, max(n - 1, 0)),
        topk_token_ids=_joined(columns, ColumnKind.TOPK_TOKEN_IDS, n),
        topk_logprobs=_joined(columns, ColumnKind.TOPK_LOGPROBS, n),
        digest=close.digest,
    )


def _joined(columns: Iterable[Column], kind: ColumnKind, n: int) -> Array | None:
    """All values of one kind on the token axis, 0 where there are none; None when nothing of it came."""
    joined: Array | None = None
    for column in columns:
        if column.kind is kind:
            if joined is None:
                joined = np.zeros((n, *column.values.shape[1:]), dtype=column.values.dtype)
            joined[column.start_token : column.end_token] = column.values
    return joined
