"""Transitions as log records and back: the only place where the buffer's state meets protobuf."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from typing import Any, Final, NamedTuple

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


_Converted = dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]]
"""Fields that are more than a number, a text or several of them: to protobuf, and back."""


def _enum(kind: type[IntEnum]) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    return int, lambda number: codec.enum_from_proto(kind, number)


_VERSION = codec.version_to_proto, codec.version_from_proto
_KINDS: Final[dict[str, tuple[type[Any], _Converted]]] = {
    "run_opened": (RunOpened, {"spec": (codec.spec_to_proto, codec.spec_from_proto), "checkpoint": _VERSION}),
    "ticket_issued": (
        TicketIssued,
        {"ticket": (codec.ticket_to_proto, codec.ticket_from_proto), "version": _VERSION},
    ),
    "chunk_written": (ChunkWritten, {}),
    "trajectory_closed": (TrajectoryClosed, {"close": (codec.close_to_proto, codec.close_from_proto)}),
    "trajectory_failed": (TrajectoryFailed, {"failure": (codec.failure_to_proto, codec.failure_from_proto)}),
    "group_dropped": (GroupsDropped, {"reason": _enum(DropReason)}),
    "batch_drawn": (BatchDrawn, {}),
    "policy_advanced": (PolicyAdvanced, {"version": _VERSION, "parent": _VERSION}),
    "steps_committed": (StepsCommitted, {}),
    "evaluation_created": (EvaluationCreated, {}),
    "run_finished": (RunFinished, {}),
    "run_rolled_back": (RunRolledBack, {"version": _VERSION}),
    "dead_letters_requeued": (DeadLettersRequeued, {}),
    "run_restored": (RunRestored, {}),
    "server_drained": (ServerDrained, {"reason": _enum(DrainReason)}),
    "server_readmitted": (ServerReadmitted, {}),
}
"""Transitions by their fields in LogRecord; but for two, each has the fields of its message."""
_NAMES: Final = {kind: name for name, (kind, _) in _KINDS.items()}
_RENAMED: Final = {"is_all": "all"}


def _fields(kind: type[Any]) -> tuple[str, ...]:
    return kind.__match_args__


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
    name = message.WhichOneof("transition")
    if name is None:
        raise InvalidDataError("the record holds no known transition")
    content: Any = getattr(message, name)
    match name:
        case "chunk_written":
            versions = codec.chunk_versions(content.chunk)
            return ChunkWritten(content.trajectory_id, content.attempt, content.seq, content.chunk, versions)
        case "evaluation_created":
            request: replay_pb2.CreateEvaluationRequest = content.evaluation
            return EvaluationCreated(codec.evaluation_from_proto(request), request.epoch)
        case _:
            kind, converted = _KINDS[name]
            return kind(**{field: _value(content, field, converted) for field in _fields(kind)})


def _value(content: object, field: str, converted: _Converted) -> object:
    value = getattr(content, _RENAMED.get(field, field))
    if field in converted:
        return converted[field][1](value)
    return value if isinstance(value, (int, str, bytes)) else tuple(value)


def _message(record: Record) -> log_pb2.LogRecord:
    transition = record.transition
    name = _NAMES[type(transition)]
    if isinstance(transition, EvaluationCreated):
        values: dict[str, object] = {"evaluation": codec.evaluation_to_proto(transition.evaluation, transition.epoch)}
    else:
        converted, values = _KINDS[name][1], {}
        for field in _fields(type(transition)):
            value = getattr(transition, field)
            values[_RENAMED.get(field, field)] = converted[field][0](value) if field in converted else value
    message = log_pb2.LogRecord(run=record.run)
    message.recorded_at.seconds, message.recorded_at.nanos = divmod(record.recorded_at_ns, _NANOS)
    content: Any = getattr(message, name)
    content.SetInParent()  # an empty message still has to say which transition it is
    content.MergeFrom(type(content)(**values))
    return message


def stored_chunk(payload: bytes) -> bytes:
    """The chunk in the payload of a ChunkWritten; nothing in it is looked at.

    Raises:
        CorruptDataError: the payload is another record.
    """
    record = log_pb2.LogRecord.FromString(payload)
    if not record.HasField("chunk_written"):
        raise CorruptDataError(f"the log holds {record.WhichOneof('transition')} where a chunk should be")
    return record.chunk_written.chunk
