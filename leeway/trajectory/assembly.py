"""From pieces to whole trajectories: joins the columns of a trajectory's chunks on one token axis, and checks them.

The learner assembles what it draws; the replay buffer runs the same check when a trajectory closes, so what it calls
READY assembles everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np

from leeway import codec
from leeway.errors import CorruptDataError, InvalidDataError
from leeway.types import (
    Array,
    Column,
    ColumnKind,
    DropReason,
    GroupRecord,
    GroupState,
    Purpose,
    RunSpec,
    SamplingParams,
    Segment,
    SegmentKind,
    Trajectory,
    TrajectoryChunk,
    TrajectoryClose,
    TrajectoryGroup,
    TrajectoryRecord,
    VersionSpan,
)
from leeway.v1 import replay_pb2

LAYOUT: Final = {
    ColumnKind.TOKEN_IDS: (1, ("int32",)),
    ColumnKind.BEHAVIOR_LOGPROBS: (1, ("float32",)),
    ColumnKind.TOPK_TOKEN_IDS: (2, ("int32",)),
    ColumnKind.TOPK_LOGPROBS: (2, ("float32",)),
    ColumnKind.ROUTING: (3, ("uint8", "uint16")),
}
"""Axes and element types of each column."""


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
    digest = codec.EMPTY_CHAIN
    for chunk in record.chunks:
        digest = codec.chain_digest(digest, chunk)
    if digest != close.digest or len(record.chunks) != close.chunk_count:
        raise CorruptDataError(f"{where}: its chunks are not what its close sealed")
    try:
        return join_chunks([codec.decode_chunk(chunk) for chunk in record.chunks], record, close)
    except InvalidDataError as error:
        raise InvalidDataError(f"{where}: {error.message}") from error


def join_chunks(chunks: Sequence[TrajectoryChunk], record: TrajectoryRecord, close: TrajectoryClose) -> Trajectory:
    """Join decoded chunks; every check that needs no knowledge of the run.

    Raises:
        InvalidDataError: gaps, overlaps, missing behavior log-probs or spans, non-finite log-probs.
    """
    n = close.token_count
    segments = _segments(chunks, n)
    sampled = np.zeros(n, dtype=np.bool_)
    loss_mask = np.zeros(n, dtype=np.bool_)
    for segment in segments:
        if segment.kind is SegmentKind.MODEL:
            sampled[segment.start_token : segment.end_token] = True
            loss_mask[segment.start_token : segment.end_token] = segment.in_loss
    spans = tuple(span for chunk in chunks for span in chunk.version_spans)
    _check_spans(spans, sampled)
    token_ids = _column(chunks, ColumnKind.TOKEN_IDS, n)
    if token_ids is None or token_ids[1].sum() != n:
        raise InvalidDataError("token ids are missing")
    logprobs = _column(chunks, ColumnKind.BEHAVIOR_LOGPROBS, n)
    if logprobs is None or not np.array_equal(logprobs[1], sampled):
        raise InvalidDataError("behavior log-probs must cover exactly the sampled tokens; mu is never recomputed")
    if not np.isfinite(logprobs[0]).all() or (logprobs[0] > 1e-4).any():
        raise InvalidDataError("a behavior log-prob is not a finite number of at most 0")
    routing = _column(chunks, ColumnKind.ROUTING, max(n - 1, 0))
    if routing is not None and not routing[1].all():
        raise InvalidDataError("routing must cover every token but the last")
    topk_ids = _column(chunks, ColumnKind.TOPK_TOKEN_IDS, n)
    topk_logprobs = _column(chunks, ColumnKind.TOPK_LOGPROBS, n)
    if (topk_ids is None) != (topk_logprobs is None):
        raise InvalidDataError("top-K token ids and log-probs come together")
    for topk in (topk_ids, topk_logprobs):
        if topk is not None and not np.array_equal(topk[1], sampled):
            raise InvalidDataError("top-K columns must cover exactly the sampled tokens")
    return Trajectory(
        trajectory_id=record.trajectory_id,
        member=record.member,
        attempt=record.attempt,
        server_id=record.server_id,
        token_ids=token_ids[0],
        behavior_logprobs=logprobs[0],
        loss_mask=loss_mask,
        version_spans=spans,
        segments=segments,
        reward=close.reward,
        finish_reason=close.finish_reason,
        generation_started_at=close.generation_started_at,
        generation_finished_at=close.generation_finished_at,
        routing=None if routing is None else routing[0],
        topk_token_ids=None if topk_ids is None else topk_ids[0],
        topk_logprobs=None if topk_logprobs is None else topk_logprobs[0],
        digest=close.digest,
    )


def check_against_spec(trajectory: Trajectory, spec: RunSpec, sampling: SamplingParams) -> None:
    """Check a trajectory against its run: vocabulary, model dimensions, and that what was asked for was recorded.

    Raises:
        InvalidDataError: saying which value is out of place.
    """
    signature = spec.signature
    ids = trajectory.token_ids
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= signature.vocab_size):
        raise InvalidDataError(f"a token id is outside the vocabulary of {signature.vocab_size}")
    for span in trajectory.version_spans:
        if span.version.run != spec.run:
            raise InvalidDataError(f"tokens are labelled with {span.version}, a version of another run")
    if trajectory.routing is not None:
        _, layers, experts_per_token = trajectory.routing.shape
        if (layers, experts_per_token) != (signature.moe_layers, signature.experts_per_token):
            raise InvalidDataError(
                f"routing has {layers} layers x {experts_per_token} experts per token; "
                f"the model has {signature.moe_layers} x {signature.experts_per_token}"
            )
        if trajectory.routing.size and int(trajectory.routing.max()) >= signature.experts:
            raise InvalidDataError(f"routing names an expert beyond the model's {signature.experts}")
    elif sampling.routing:
        raise InvalidDataError("the run records routing, but none came; does the engine provide it?")
    if sampling.topk and (trajectory.topk_token_ids is None or trajectory.topk_token_ids.shape[1] < sampling.topk):
        raise InvalidDataError(f"the run records top-{sampling.topk}, but fewer came; does the engine provide it?")


def _segments(chunks: Sequence[TrajectoryChunk], n: int) -> tuple[Segment, ...]:
    latest: dict[int, Segment] = {}
    for chunk in chunks:
        for segment in chunk.segments:
            latest[segment.start_token] = segment
    segments = tuple(latest[start] for start in sorted(latest))
    at = 0
    for segment in segments:
        if segment.start_token != at:
            raise InvalidDataError(f"segments leave a gap or overlap at token {at}")
        at = segment.end_token
    if at != n:
        raise InvalidDataError(f"segments cover {at} tokens of {n}")
    return segments


def _check_spans(spans: Sequence[VersionSpan], sampled: Array) -> None:
    covered = np.zeros_like(sampled)
    for span in spans:
        if span.end_token > len(covered) or covered[span.start_token : span.end_token].any():
            raise InvalidDataError(
                f"version span [{span.start_token}, {span.end_token}) overlaps or exceeds the tokens"
            )
        covered[span.start_token : span.end_token] = True
    if not np.array_equal(covered, sampled):
        raise InvalidDataError("version spans must cover exactly the sampled tokens")


def _column(chunks: Sequence[TrajectoryChunk], kind: ColumnKind, n: int) -> tuple[Array, Array] | None:
    """All values of one kind on the token axis (0 where there are none), and which tokens have one."""
    columns: list[Column] = [column for chunk in chunks for column in chunk.columns if column.kind is kind]
    if not columns:
        return None
    first = columns[0].values
    ndim, dtypes = LAYOUT[kind]
    if first.ndim != ndim or first.dtype.name not in dtypes:
        raise InvalidDataError(
            f"{kind.name} must be {' or '.join(dtypes)} with {ndim} axes, but is {first.dtype.name} with {first.ndim}"
        )
    values: Array = np.zeros((n, *first.shape[1:]), dtype=first.dtype)
    covered = np.zeros(n, dtype=np.bool_)
    for column in columns:
        if column.values.dtype != first.dtype or column.values.shape[1:] != first.shape[1:]:
            raise InvalidDataError(f"{kind.name} changes its type or shape between chunks")
        if column.end_token > n or covered[column.start_token : column.end_token].any():
            raise InvalidDataError(
                f"{kind.name} [{column.start_token}, {column.end_token}) overlaps or exceeds {n} tokens"
            )
        values[column.start_token : column.end_token] = column.values
        covered[column.start_token : column.end_token] = True
    return values, covered
