"""Transitions as log records and back: the only place where the buffer's state meets protobuf."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, assert_never

from google.protobuf.message import DecodeError, Message

from leeway import codec
from leeway.errors import CorruptDataError, InvalidDataError
from leeway.types import DrainReason, DropReason
from leeway.v1 import log_pb2, replay_pb2
from replay_buffer.rules.transitions import (
    BatchDrawn,
    ChunkWritten,
    DeadLettersRequeued,
    EvaluationCreated,
    GroupsDropped,
    PolicyAdvanced,
    RunFinished,
    RunOpened,
    RunRestored,
    RunRolledBack,
    ServerDrained,
    ServerReadmitted,
    StepsCommitted,
    TicketIssued,
    TrajectoryClosed,
    TrajectoryFailed,
    Transition,
)

_NANOS = 1_000_000_000
_CHUNK_WRITTEN_TAG = codec.field_tag(log_pb2.LogRecord, "chunk_written")
_CHUNK_TAG = codec.field_tag(log_pb2.ChunkWritten, "chunk")
_TRAJECTORY_CLOSED_TAG = codec.field_tag(log_pb2.LogRecord, "trajectory_closed")
_CLOSE_TAG = codec.field_tag(log_pb2.TrajectoryClosed, "close")


class Record(NamedTuple):
    """One entry of the log."""

    run: str
    recorded_at_ns: int  # Unix time; for display, never for safety
    transition: Transition


def encode(record: Record) -> tuple[bytes, ...]:
    """The payload of a log frame; what a writer sent is a part by itself: not copied, and kept as it came."""
    match record.transition:
        case ChunkWritten(trajectory_id, attempt, seq, chunk):
            item = log_pb2.ChunkWritten(trajectory_id=trajectory_id, attempt=attempt, seq=seq)
            return _written(record, _CHUNK_WRITTEN_TAG, item, _CHUNK_TAG, chunk), chunk
        case TrajectoryClosed(trajectory_id, attempt, close):
            item = log_pb2.TrajectoryClosed(trajectory_id=trajectory_id, attempt=attempt)
            sealed = close.encoded or codec.close_to_proto(close).SerializeToString()
            return _written(record, _TRAJECTORY_CLOSED_TAG, item, _CLOSE_TAG, sealed), sealed
        case _:
            return (_message(record).SerializeToString(),)


def _written(record: Record, tag: bytes, item: Message, content_tag: bytes, content: bytes) -> bytes:
    """A LogRecord up to what a writer sent, which is its last field's last field."""
    before = item.SerializeToString() + content_tag + codec.varint(len(content))
    return _head(record.run, record.recorded_at_ns) + tag + codec.varint(len(before) + len(content)) + before


@lru_cache(maxsize=16)
def _head(run: str, recorded_at_ns: int) -> bytes:
    """Equal for all that one message brought."""
    head = log_pb2.LogRecord(run=run)
    head.recorded_at.seconds, head.recorded_at.nanos = divmod(recorded_at_ns, _NANOS)
    return head.SerializeToString()


def _message(record: Record) -> log_pb2.LogRecord:
    message = log_pb2.LogRecord(run=record.run)
    message.recorded_at.seconds, message.recorded_at.nanos = divmod(record.recorded_at_ns, _NANOS)
    match record.transition:
        case ChunkWritten() | TrajectoryClosed():
            raise AssertionError("what a writer sent is not copied into a message")
        case TrajectoryFailed() as failed:
            message.trajectory_failed.trajectory_id = failed.trajectory_id
            message.trajectory_failed.attempt = failed.attempt
            message.trajectory_failed.failure.CopyFrom(codec.failure_to_proto(failed.failure))
        case TicketIssued() as issued:
            message.ticket_issued.ticket.CopyFrom(codec.ticket_to_proto(issued.ticket))
            message.ticket_issued.server_id = issued.server_id
            message.ticket_issued.version.CopyFrom(codec.version_to_proto(issued.version))
            message.ticket_issued.task_cursor = issued.task_cursor
        case GroupsDropped() as dropped:
            message.group_dropped.group_ids.extend(dropped.group_ids)
            message.group_dropped.reason = int(dropped.reason)  # type: ignore[assignment]
            message.group_dropped.message = dropped.message
        case BatchDrawn() as drawn:
            message.batch_drawn.epoch = drawn.epoch
            message.batch_drawn.step = drawn.step
            message.batch_drawn.group_ids.extend(drawn.group_ids)
        case PolicyAdvanced() as advanced:
            message.policy_advanced.version.CopyFrom(codec.version_to_proto(advanced.version))
            message.policy_advanced.parent.CopyFrom(codec.version_to_proto(advanced.parent))
            message.policy_advanced.stale_group_ids.extend(advanced.stale_group_ids)
        case StepsCommitted() as committed:
            message.steps_committed.step = committed.step
            message.steps_committed.oldest_kept_step = committed.oldest_kept_step
        case RunOpened() as opened:
            message.run_opened.spec.CopyFrom(codec.spec_to_proto(opened.spec))
            message.run_opened.epoch = opened.epoch
            message.run_opened.checkpoint.CopyFrom(codec.version_to_proto(opened.checkpoint))
            message.run_opened.incarnation = opened.incarnation
        case EvaluationCreated() as created:
            message.evaluation_created.evaluation.CopyFrom(codec.evaluation_to_proto(created.evaluation, created.epoch))
        case RunFinished() as finished:
            # An empty message still has to say which transition it is.
            message.run_finished.SetInParent()
            message.run_finished.group_ids.extend(finished.group_ids)
            message.run_finished.given_up = finished.given_up
        case RunRolledBack() as rolled_back:
            message.run_rolled_back.version.CopyFrom(codec.version_to_proto(rolled_back.version))
            message.run_rolled_back.epoch = rolled_back.epoch
            message.run_rolled_back.group_ids.extend(rolled_back.group_ids)
            message.run_rolled_back.task_indices.extend(rolled_back.task_indices)
        case DeadLettersRequeued() as requeued:
            message.dead_letters_requeued.group_ids.extend(requeued.group_ids)
            message.dead_letters_requeued.task_indices.extend(requeued.task_indices)
            message.dead_letters_requeued.all = requeued.is_all
        case RunRestored() as restored:
            message.run_restored.epoch = restored.epoch
            message.run_restored.created = restored.created
            message.run_restored.group_ids.extend(restored.group_ids)
        case ServerDrained() as drained:
            message.server_drained.server_id = drained.server_id
            message.server_drained.reason = int(drained.reason)  # type: ignore[assignment]
            message.server_drained.message = drained.message
            message.server_drained.group_ids.extend(drained.group_ids)
        case ServerReadmitted() as readmitted:
            message.server_readmitted.server_id = readmitted.server_id
        case _:
            assert_never(record.transition)
    return message


def decode(payload: bytes) -> Record:
    """A log frame's payload as a record.

    Raises:
        CorruptDataError: the payload passed its checksum but is not a record of this version of Leeway.
    """
    try:
        message = log_pb2.LogRecord.FromString(payload)
        transition = _transition(message)
    except (DecodeError, InvalidDataError) as error:
        raise CorruptDataError(f"a log record cannot be read: {error}; was it written by a newer Leeway?") from error
    at_ns = message.recorded_at.seconds * _NANOS + message.recorded_at.nanos
    return Record(message.run, at_ns, transition)


def _transition(message: log_pb2.LogRecord) -> Transition:
    match message.WhichOneof("transition"):
        case "chunk_written":
            written = message.chunk_written
            chunk = written.chunk
            return ChunkWritten(written.trajectory_id, written.attempt, written.seq, chunk, codec.chunk_versions(chunk))
        case "trajectory_closed":
            closed = message.trajectory_closed
            return TrajectoryClosed(closed.trajectory_id, closed.attempt, codec.close_from_proto(closed.close))
        case "trajectory_failed":
            failed = message.trajectory_failed
            return TrajectoryFailed(failed.trajectory_id, failed.attempt, codec.failure_from_proto(failed.failure))
        case "ticket_issued":
            issued = message.ticket_issued
            return TicketIssued(
                codec.ticket_from_proto(issued.ticket),
                issued.server_id,
                codec.version_from_proto(issued.version),
                issued.task_cursor,
            )
        case "group_dropped":
            dropped = message.group_dropped
            reason = codec.enum_from_proto(DropReason, dropped.reason)
            return GroupsDropped(tuple(dropped.group_ids), reason, dropped.message)
        case "batch_drawn":
            drawn = message.batch_drawn
            return BatchDrawn(drawn.epoch, drawn.step, tuple(drawn.group_ids))
        case "policy_advanced":
            advanced = message.policy_advanced
            return PolicyAdvanced(
                codec.version_from_proto(advanced.version),
                codec.version_from_proto(advanced.parent),
                tuple(advanced.stale_group_ids),
            )
        case "steps_committed":
            return StepsCommitted(message.steps_committed.step, message.steps_committed.oldest_kept_step)
        case "run_opened":
            opened = message.run_opened
            return RunOpened(
                codec.spec_from_proto(opened.spec),
                opened.epoch,
                codec.version_from_proto(opened.checkpoint),
                opened.incarnation,
            )
        case "evaluation_created":
            request: replay_pb2.CreateEvaluationRequest = message.evaluation_created.evaluation
            return EvaluationCreated(codec.evaluation_from_proto(request), request.epoch)
        case "run_finished":
            return RunFinished(tuple(message.run_finished.group_ids), message.run_finished.given_up)
        case "run_rolled_back":
            rolled_back = message.run_rolled_back
            return RunRolledBack(
                codec.version_from_proto(rolled_back.version),
                rolled_back.epoch,
                tuple(rolled_back.group_ids),
                tuple(rolled_back.task_indices),
            )
        case "dead_letters_requeued":
            requeued = message.dead_letters_requeued
            return DeadLettersRequeued(tuple(requeued.group_ids), tuple(requeued.task_indices), requeued.all)
        case "run_restored":
            restored = message.run_restored
            return RunRestored(restored.epoch, restored.created, tuple(restored.group_ids))
        case "server_drained":
            drained = message.server_drained
            return ServerDrained(
                drained.server_id,
                codec.enum_from_proto(DrainReason, drained.reason),
                drained.message,
                tuple(drained.group_ids),
            )
        case "server_readmitted":
            return ServerReadmitted(message.server_readmitted.server_id)
        case _:
            raise InvalidDataError("the record holds no known transition")


def stored_chunk(payload: bytes) -> bytes:
    """The chunk in the payload of a ChunkWritten; nothing in it is looked at.

    Raises:
        CorruptDataError: the payload is another record.
    """
    record = log_pb2.LogRecord.FromString(payload)
    if not record.HasField("chunk_written"):
        raise CorruptDataError(f"the log holds {record.WhichOneof('transition')} where a chunk should be")
    return record.chunk_written.chunk
