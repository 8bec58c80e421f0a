"""Writes and their answers, closes and failures; what is hot is read off the wire, without protobuf."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from leeway.codec.basics import (
    duration_to_proto,
    enum_from_proto,
    field_tag,
    parse,
    seconds_from_proto,
    timestamp_from_proto,
    timestamp_to_proto,
    varint,
)
from leeway.codec.fields import CHUNK, CLOSE, FAILURE, WireItem, WireWrite, read_write
from leeway.errors import InvalidDataError
from leeway.types import FinishReason, TrajectoryClose, TrajectoryFailure, WriteItem, WriteResult, WriteStatus
from leeway.v1 import replay_pb2, trajectory_pb2

_RESULTS: Final = field_tag(replay_pb2.WriteTrajectoriesResponse, "results")
_STATUS: Final = replay_pb2.WriteResult.STATUS_FIELD_NUMBER << 3


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
        case bytes() | memoryview() as chunk:
            message.chunk = bytes(chunk)
        case TrajectoryClose() as close:
            message.close.CopyFrom(close_to_proto(close))
        case TrajectoryFailure() as failure:
            message.failure.CopyFrom(failure_to_proto(failure))
    return message


def write_from_wire(message: bytes) -> WireWrite:
    """A serialized WriteTrajectoriesRequest.

    Raises:
        InvalidDataError: it is none.
    """
    write = read_write(message)
    if write is not None:
        return write
    request = parse(replay_pb2.WriteTrajectoriesRequest, message)
    request.DiscardUnknownFields()  # what nobody here understands is not kept either
    return WireWrite(request.run, request.server_id, [_wire_item(item) for item in request.items])


def _wire_item(item: replay_pb2.WriteItem) -> WireItem:
    tag, content = 0, b""
    match item.WhichOneof("content"):
        case "chunk":
            tag, content = CHUNK, item.chunk
        case "close":
            tag, content = CLOSE, item.close.SerializeToString()
        case "failure":
            tag, content = FAILURE, item.failure.SerializeToString()
        case None:
            pass
    return WireItem(item.trajectory_id, item.attempt, item.seq, tag, content, item.SerializeToString())


def item_from_wire(item: WireItem) -> WriteItem:
    """Raises InvalidDataError: its content makes no sense, or there is none."""
    trajectory_id, attempt, seq, tag, data, encoded = item
    if tag == CHUNK:
        return WriteItem(trajectory_id, attempt, seq, data, encoded)
    if tag == CLOSE:
        sealed = bytes(data)
        close = close_from_proto(parse(trajectory_pb2.TrajectoryClose, sealed), sealed)
        return WriteItem(trajectory_id, attempt, seq, close)
    if tag == FAILURE:
        failure = parse(trajectory_pb2.TrajectoryFailure, bytes(data))
        return WriteItem(trajectory_id, attempt, seq, failure_from_proto(failure))
    raise InvalidDataError(f"a write to {trajectory_id!r} carries neither chunk, close nor failure")


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


def answer_to_wire(results: Iterable[WriteResult]) -> bytes:
    """A serialized WriteTrajectoriesResponse; what it says of most items is short enough to be written by hand."""
    parts: list[bytes] = []
    for result in results:
        trajectory_id, attempt, seq, status, expected_seq, message, retry_seconds = result
        if expected_seq or message or retry_seconds:
            data = result_to_proto(result).SerializeToString()
        else:
            data = item_head(trajectory_id, attempt, seq) + bytes((_STATUS, status))
        parts += (_RESULTS, varint(len(data)), data)
    return b"".join(parts)


def item_head(trajectory_id: str, attempt: int, seq: int) -> bytes:
    """Fields 1 to 3 of WriteItem, WriteResult and ChunkWritten: whose, which attempt, which item."""
    name = trajectory_id.encode()
    head = b"\x0a" + varint(len(name)) + name if name else b""
    if attempt:
        head += b"\x10" + varint(attempt)
    return head + b"\x18" + varint(seq) if seq else head


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
