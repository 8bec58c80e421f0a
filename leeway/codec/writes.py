"""Writes and their answers, closes and failures."""

from __future__ import annotations

import math

from leeway.codec.basics import (
    duration_to_proto,
    enum_from_proto,
    seconds_from_proto,
    timestamp_from_proto,
    timestamp_to_proto,
)
from leeway.errors import InvalidDataError
from leeway.types import FinishReason, TrajectoryClose, TrajectoryFailure, WriteItem, WriteResult, WriteStatus
from leeway.v1 import replay_pb2, trajectory_pb2


def close_to_proto(close: TrajectoryClose) -> trajectory_pb2.TrajectoryClose:
    return trajectory_pb2.TrajectoryClose(
        chunk_count=close.chunk_count,
        token_count=close.token_count,
        digest=close.digest,
        finish_reason=int(close.finish_reason),  # type: ignore[arg-type]
        reward=close.reward,
        generation_started_at=timestamp_to_proto(close.generation_started_at),
        generation_finished_at=timestamp_to_proto(close.generation_finished_at),
    )


def close_from_proto(message: trajectory_pb2.TrajectoryClose, encoded: bytes = b"") -> TrajectoryClose:
    if not math.isfinite(message.reward):
        raise InvalidDataError(f"the reward must be finite, but is {message.reward}")
    return TrajectoryClose(
        chunk_count=message.chunk_count,
        token_count=message.token_count,
        digest=message.digest,
        finish_reason=enum_from_proto(FinishReason, message.finish_reason),
        reward=message.reward,
        generation_started_at=timestamp_from_proto(message.generation_started_at),
        generation_finished_at=timestamp_from_proto(message.generation_finished_at),
        encoded=encoded,
    )


def failure_to_proto(failure: TrajectoryFailure) -> trajectory_pb2.TrajectoryFailure:
    return trajectory_pb2.TrajectoryFailure(message=failure.message, retryable=failure.retryable)


def failure_from_proto(message: trajectory_pb2.TrajectoryFailure) -> TrajectoryFailure:
    return TrajectoryFailure(message.message, message.retryable)


def item_to_proto(item: WriteItem) -> replay_pb2.WriteItem:
    message = replay_pb2.WriteItem(trajectory_id=item.trajectory_id, attempt=item.attempt, seq=item.seq)
    match item.content:
        case bytes() as chunk:
            message.chunk = chunk
        case TrajectoryClose() as close:
            message.close.CopyFrom(close_to_proto(close))
        case TrajectoryFailure() as failure:
            message.failure.CopyFrom(failure_to_proto(failure))
    return message


def item_from_proto(message: replay_pb2.WriteItem) -> WriteItem:
    """Raises InvalidDataError: its content makes no sense, or there is none."""
    match message.WhichOneof("content"):
        case "chunk":
            content: bytes | TrajectoryClose | TrajectoryFailure = message.chunk
        case "close":
            content = close_from_proto(message.close, message.close.SerializeToString())
        case "failure":
            content = failure_from_proto(message.failure)
        case None:
            raise InvalidDataError(f"a write to {message.trajectory_id!r} carries neither chunk, close nor failure")
    return WriteItem(message.trajectory_id, message.attempt, message.seq, content)


def result_to_proto(result: WriteResult) -> replay_pb2.WriteResult:
    return replay_pb2.WriteResult(
        trajectory_id=result.trajectory_id,
        attempt=result.attempt,
        seq=result.seq,
        status=int(result.status),  # type: ignore[arg-type]
        expected_seq=result.expected_seq,
        message=result.message,
        retry_delay=duration_to_proto(result.retry_seconds) if result.retry_seconds else None,
    )


def result_from_proto(message: replay_pb2.WriteResult) -> WriteResult:
    return WriteResult(
        message.trajectory_id,
        message.attempt,
        message.seq,
        enum_from_proto(WriteStatus, message.status),
        message.expected_seq,
        message.message,
        seconds_from_proto(message.retry_delay),
    )
