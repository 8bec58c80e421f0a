"""Between the wire and `leeway.types`: the only place where protobuf meets arrays.

`x_to_proto` and `x_from_proto` come in pairs. Everything that comes from a peer is checked before anything is
allocated: a Tensor's size against its shape, enums against their range. What is malformed raises InvalidDataError.
"""

from __future__ import annotations

import enum
import hashlib
import math
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final, TypeVar

import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from leeway.dtypes import dtype_name, element_size_bytes, wire_number
from leeway.errors import InvalidDataError
from leeway.routing import pack_routing, unpack_planes, unpack_routing
from leeway.types import (
    Array,
    Column,
    ColumnKind,
    DeadLetter,
    Drain,
    DrainReason,
    DropReason,
    EngineInfo,
    Evaluation,
    FinishReason,
    GroupState,
    LogprobMode,
    ModelSignature,
    PolicyVersion,
    Purpose,
    Rollback,
    RunSpec,
    RunStatus,
    SamplingParams,
    Segment,
    SegmentKind,
    ServerStatus,
    TensorEntry,
    Ticket,
    TicketMember,
    TrajectoryChunk,
    TrajectoryClose,
    TrajectoryFailure,
    VersionSpan,
    WeightDelta,
    WeightManifest,
    WeightRequest,
    WriteItem,
    WriteResult,
    WriteStatus,
)
from leeway.v1 import common_pb2, inference_pb2, policy_pb2, replay_pb2, trajectory_pb2
from leeway.wire import CHUNK, CLOSE, FAILURE, Bytes, WireColumn, WireItem, WireWrite, read_write

_RESULTS: Final = b"\x0a"  # of WriteTrajectoriesResponse
_STATUS: Final = 0x20  # of WriteResult
MAX_TENSOR_ELEMENTS: Final = 1 << 31
DIGEST_BYTES: Final = hashlib.sha256().digest_size
_SEGMENT_KINDS: Final = frozenset(int(kind) for kind in SegmentKind)
_PACKED_ROUTING: Final = int(common_pb2.COLUMN_ENCODING_PACKED_ROUTING)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_SECOND: Final = -62_135_596_800
"""The year 1."""
_LAST_SECOND: Final = 253_402_300_799
"""The end of the year 9999."""
EnumT = TypeVar("EnumT", bound=enum.IntEnum)
MessageT = TypeVar("MessageT", bound=Message)

# NumPy has no bfloat16; weights in that type travel as raw bytes and never become arrays here.
_NUMPY_DTYPES: Final = {
    wire_number(name): np.dtype(name).newbyteorder("<")
    for name in ("uint8", "uint16", "int32", "int64", "float16", "float32", "float64")
}


def parse(message: type[MessageT], data: bytes) -> MessageT:
    """Parse serialized bytes that travelled inside another message."""
    try:
        return message.FromString(data)
    except DecodeError as error:
        raise InvalidDataError(f"not a {message.DESCRIPTOR.name}: {error}") from error


def field_tag(message: type[Message], field: str) -> bytes:
    """What precedes the length of a length-delimited field (bytes, string or message) on the wire."""
    return varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | 2)


def varint(number: int) -> bytes:
    """A length as protobuf writes it: seven bits a byte, the lowest first."""
    if number < 0x80:
        return bytes((number,))
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def enum_from_proto(kind: type[EnumT], number: int) -> EnumT:
    """A checked enum; UNSPECIFIED and unknown numbers are refused."""
    try:
        return kind(number)
    except ValueError:
        raise InvalidDataError(f"{number} is not a {kind.__name__}") from None


# Arrays


def array_to_proto(array: Array) -> common_pb2.Tensor:
    """Little-endian bytes of an array; refuses element types without a wire form."""
    little = array.astype(array.dtype.newbyteorder("<"), copy=False) if sys.byteorder == "big" else array
    return common_pb2.Tensor(
        dtype=wire_number(array.dtype.name),  # type: ignore[arg-type]
        shape=array.shape,
        data=little.tobytes(),
    )


def array_from_proto(tensor: common_pb2.Tensor) -> Array:
    """A read-only view of the message's bytes."""
    data, shape = tensor.data, tuple(tensor.shape)
    check_array(tensor.dtype, shape, len(data))
    return np.frombuffer(data, _NUMPY_DTYPES[tensor.dtype]).reshape(shape)


def check_array(number: int, shape: tuple[int, ...], size_bytes: int) -> None:
    """Raises InvalidDataError unless so many bytes are an array of this DataType and shape."""
    dtype = _numpy_dtype(number)
    elements = math.prod(shape)
    if elements > MAX_TENSOR_ELEMENTS or elements * dtype.itemsize != size_bytes:
        raise InvalidDataError(
            f"a {dtype.name} tensor of shape {list(shape)} takes {elements * dtype.itemsize} bytes, "
            f"but {size_bytes} came"
        )


def _numpy_dtype(number: int) -> np.dtype[Any]:
    dtype = _NUMPY_DTYPES.get(number)
    if dtype is None:
        raise InvalidDataError(f"{dtype_name(number)} arrays are only allowed among weights")
    return dtype


# Versions, sampling, signatures


def version_to_proto(version: PolicyVersion) -> common_pb2.PolicyVersion:
    return common_pb2.PolicyVersion(run=version.run, epoch=version.epoch, step=version.step, digest=version.digest)


def version_from_proto(message: common_pb2.PolicyVersion) -> PolicyVersion:
    version = PolicyVersion(message.run, message.epoch, message.step, message.digest)
    check_version(version)
    return version


def check_version(version: PolicyVersion) -> None:
    """Raises InvalidDataError for one that names nothing."""
    if not version.run or len(version.digest) != DIGEST_BYTES:
        raise InvalidDataError("a policy version needs a run and a 32-byte digest")


def sampling_to_proto(params: SamplingParams) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(
        temperature=params.temperature,
        max_tokens=params.max_tokens,
        stop_token_ids=params.stop_token_ids,
        seed=params.seed,
        topk=params.topk,
        routing=params.routing,
    )


def check_sampling(message: common_pb2.SamplingParams) -> None:
    """Raises InvalidDataError for a value that is out of range."""
    if not (math.isfinite(message.temperature) and message.temperature > 0):
        raise InvalidDataError(f"temperature must be a finite number above 0, but is {message.temperature}")
    if message.max_tokens < 1:
        raise InvalidDataError("max_tokens must be at least 1")


def sampling_from_proto(message: common_pb2.SamplingParams) -> SamplingParams:
    check_sampling(message)
    return SamplingParams(
        temperature=message.temperature,
        max_tokens=message.max_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        seed=message.seed,
        topk=message.topk,
        routing=message.routing,
    )


def signature_to_proto(signature: ModelSignature) -> common_pb2.ModelSignature:
    return common_pb2.ModelSignature(
        model_digest=signature.model_digest,
        tokenizer_digest=signature.tokenizer_digest,
        vocab_size=signature.vocab_size,
        moe_layers=signature.moe_layers,
        experts=signature.experts,
        experts_per_token=signature.experts_per_token,
        context_length=signature.context_length,
    )


def signature_from_proto(message: common_pb2.ModelSignature) -> ModelSignature:
    return ModelSignature(
        model_digest=message.model_digest,
        tokenizer_digest=message.tokenizer_digest,
        vocab_size=message.vocab_size,
        moe_layers=message.moe_layers,
        experts=message.experts,
        experts_per_token=message.experts_per_token,
        context_length=message.context_length,
    )


# Trajectories


def chunk_to_proto(chunk: TrajectoryChunk, *, pack: bool = False) -> trajectory_pb2.TrajectoryChunk:
    """`pack`: routing in its packed form, where that is smaller."""
    return trajectory_pb2.TrajectoryChunk(
        columns=[_column_to_proto(column, pack) for column in chunk.columns],
        segments=[_segment_to_proto(segment) for segment in chunk.segments],
        version_spans=[
            common_pb2.VersionSpan(
                start_token=span.start_token, end_token=span.end_token, version=version_to_proto(span.version)
            )
            for span in chunk.version_spans
        ],
    )


def chunk_from_proto(message: trajectory_pb2.TrajectoryChunk) -> TrajectoryChunk:
    return TrajectoryChunk(
        columns=tuple(_column_from_proto(column) for column in message.columns),
        segments=tuple(_segment_from_proto(segment) for segment in message.segments),
        version_spans=tuple(_span_from_proto(span) for span in message.version_spans),
    )


def encode_chunk(chunk: TrajectoryChunk, *, pack: bool = False) -> bytes:
    """The bytes of a chunk as they are written, acknowledged, stored and drawn."""
    return chunk_to_proto(chunk, pack=pack).SerializeToString()


def decode_chunk(data: Bytes) -> TrajectoryChunk:
    return chunk_from_proto(parse(trajectory_pb2.TrajectoryChunk, bytes(data)))


def chain_digest(previous: bytes, chunk: Bytes) -> bytes:
    """d(i+1) = SHA-256(d(i) + chunk i); see TrajectoryClose.digest."""
    chain = hashlib.sha256(previous)
    chain.update(chunk)
    return chain.digest()


EMPTY_CHAIN: Final = hashlib.sha256().digest()
"""d(0) of `chain_digest`."""


def span_versions(chunk: trajectory_pb2.TrajectoryChunk) -> tuple[PolicyVersion, ...]:
    """The policy versions that a chunk's spans name, each once; not checked."""
    versions: tuple[PolicyVersion, ...] = ()
    for span in chunk.version_spans:
        message = span.version
        version = _known_version(message.run, message.epoch, message.step, message.digest)
        if version not in versions:
            versions = (*versions, version)
    return versions


@lru_cache(maxsize=256)
def _known_version(run: str, epoch: int, step: int, digest: bytes) -> PolicyVersion:
    """One object for all the chunks that name it."""
    return PolicyVersion(run, epoch, step, digest)


def wire_column(message: common_pb2.Column) -> WireColumn:
    """A column that was parsed, in the form of those that were not."""
    tensor = message.values
    data = tensor.data
    return WireColumn(
        message.kind,
        message.start_token,
        message.end_token,
        tensor.dtype,
        tuple(tensor.shape),
        data,
        0,
        len(data),
        message.encoding,
    )


def check_column(column: WireColumn) -> None:
    """Raises InvalidDataError unless its values are an array with one row per token of its range.

    What is packed is only judged when it is unpacked.
    """
    shape = column.shape
    if not column.encoding:
        check_array(column.dtype, shape, column.size_bytes)
    elif column.encoding != _PACKED_ROUTING or column.kind != ColumnKind.ROUTING:
        raise InvalidDataError(f"a column of kind {column.kind} cannot have encoding {column.encoding}")
    if not shape or shape[0] != column.end_token - column.start_token:
        raise InvalidDataError(
            f"column {enum_from_proto(ColumnKind, column.kind).name} covers tokens "
            f"[{column.start_token}, {column.end_token}) but has shape {list(shape)}"
        )


def unpacked_planes(column: WireColumn) -> Array:
    """The ids of a packed column, by layer.

    Raises:
        InvalidDataError: they cannot be unpacked.
    """
    return unpack_planes(_packed(column), _numpy_dtype(column.dtype), column.shape)


def _packed(column: WireColumn) -> memoryview:
    return memoryview(column.buffer)[column.offset : column.offset + column.size_bytes]


def _column_to_proto(column: Column, pack: bool) -> common_pb2.Column:
    packed = pack_routing(column.values) if pack and column.kind is ColumnKind.ROUTING else None
    message = common_pb2.Column(
        kind=int(column.kind),  # type: ignore[arg-type]
        start_token=column.start_token,
        end_token=column.end_token,
    )
    if packed is None:
        message.values.CopyFrom(array_to_proto(column.values))
        return message
    message.values.dtype = wire_number(column.values.dtype.name)  # type: ignore[assignment]
    message.values.shape.extend(column.values.shape)
    message.values.data = packed
    message.encoding = common_pb2.COLUMN_ENCODING_PACKED_ROUTING
    return message


def _column_from_proto(message: common_pb2.Column) -> Column:
    column = wire_column(message)
    check_column(column)
    if column.encoding:
        values = unpack_routing(_packed(column), _numpy_dtype(column.dtype), column.shape)
    else:
        values = np.frombuffer(column.buffer, _NUMPY_DTYPES[column.dtype]).reshape(column.shape)
    return Column(enum_from_proto(ColumnKind, column.kind), column.start_token, column.end_token, values)


def _segment_to_proto(segment: Segment) -> common_pb2.Segment:
    return common_pb2.Segment(
        kind=int(segment.kind),  # type: ignore[arg-type]
        start_token=segment.start_token,
        end_token=segment.end_token,
        in_loss=segment.in_loss,
        sampling=None if segment.sampling is None else sampling_to_proto(segment.sampling),
        engine=segment.engine,
    )


def check_segment(message: common_pb2.Segment) -> None:
    """Raises InvalidDataError for a segment that makes no sense by itself."""
    kind = message.kind
    if kind not in _SEGMENT_KINDS:
        enum_from_proto(SegmentKind, kind)
    if message.end_token < message.start_token:
        raise InvalidDataError(f"a segment ends at token {message.end_token}, before its start {message.start_token}")
    if message.in_loss and kind != SegmentKind.MODEL:
        raise InvalidDataError(f"a {SegmentKind(kind).name} segment cannot be in the loss")
    if message.HasField("sampling"):
        check_sampling(message.sampling)


def _segment_from_proto(message: common_pb2.Segment) -> Segment:
    check_segment(message)
    kind = enum_from_proto(SegmentKind, message.kind)
    sampling = sampling_from_proto(message.sampling) if message.HasField("sampling") else None
    return Segment(kind, message.start_token, message.end_token, message.in_loss, sampling, message.engine)


def _span_from_proto(message: common_pb2.VersionSpan) -> VersionSpan:
    if message.end_token <= message.start_token:
        raise InvalidDataError(f"version span [{message.start_token}, {message.end_token}) is empty")
    return VersionSpan(message.start_token, message.end_token, version_from_proto(message.version))


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


def close_from_proto(message: trajectory_pb2.TrajectoryClose, encoded: Bytes = b"") -> TrajectoryClose:
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
        encoded=bytes(encoded),
    )


def failure_to_proto(failure: TrajectoryFailure) -> trajectory_pb2.TrajectoryFailure:
    return trajectory_pb2.TrajectoryFailure(message=failure.message, retryable=failure.retryable)


def failure_from_proto(message: trajectory_pb2.TrajectoryFailure) -> TrajectoryFailure:
    return TrajectoryFailure(message.message, message.retryable)


# Delivery


_MOST: Final = {
    "groups_per_step": 1 << 16,
    "members": 1 << 12,
    "total_steps": 1 << 48,
    "train_task_count": 1 << 48,
    "max_attempts": 1 << 31,
}
"""Largest numbers of a run. What a caller makes the buffer hold at once is a product of the first two."""
_MOST_TASKS: Final = 1 << 32
"""Of an evaluation."""


def spec_to_proto(spec: RunSpec) -> replay_pb2.RunSpec:
    return replay_pb2.RunSpec(
        run=spec.run,
        groups_per_step=spec.groups_per_step,
        members=spec.members,
        max_staleness=spec.max_staleness,
        total_steps=spec.total_steps,
        seed=spec.seed,
        train_task_count=spec.train_task_count,
        sampling=sampling_to_proto(spec.sampling),
        signature=signature_to_proto(spec.signature),
        dataset_digest=spec.dataset_digest,
        root=version_to_proto(spec.root),
        max_attempts=spec.max_attempts,
        drop_no_signal=spec.drop_no_signal,
    )


def spec_from_proto(message: replay_pb2.RunSpec) -> RunSpec:
    for name, most in _MOST.items():
        if not 1 <= getattr(message, name) <= most:
            raise InvalidDataError(f"run {message.run!r}: {name} must be between 1 and {most}")
    if message.max_staleness > _MOST["total_steps"]:
        raise InvalidDataError(f"run {message.run!r}: max_staleness must be at most {_MOST['total_steps']}")
    if message.drop_no_signal and message.members < 2:
        raise InvalidDataError(f"run {message.run!r}: groups of one member never have a signal; unset drop_no_signal")
    root = version_from_proto(message.root)
    if root.run != message.run or root.epoch or root.step:
        raise InvalidDataError(f"run {message.run!r}: the root version must be epoch 0, step 0 of the same run")
    return RunSpec(
        run=message.run,
        groups_per_step=message.groups_per_step,
        members=message.members,
        max_staleness=message.max_staleness,
        total_steps=message.total_steps,
        seed=message.seed,
        train_task_count=message.train_task_count,
        sampling=sampling_from_proto(message.sampling),
        signature=signature_from_proto(message.signature),
        dataset_digest=message.dataset_digest,
        root=root,
        max_attempts=message.max_attempts,
        drop_no_signal=message.drop_no_signal,
    )


def ticket_to_proto(ticket: Ticket) -> replay_pb2.Ticket:
    return replay_pb2.Ticket(
        group_id=ticket.group_id,
        attempt=ticket.attempt,
        purpose=int(ticket.purpose),  # type: ignore[arg-type]
        task_index=ticket.task_index,
        members=[
            replay_pb2.TicketMember(trajectory_id=member.trajectory_id, member=member.member, seed=member.seed)
            for member in ticket.members
        ],
        sampling=sampling_to_proto(ticket.sampling),
        lease=duration_to_proto(ticket.lease_seconds),
        pinned_version=None if ticket.pinned_version is None else version_to_proto(ticket.pinned_version),
        evaluation_id=ticket.evaluation_id,
    )


def ticket_from_proto(message: replay_pb2.Ticket) -> Ticket:
    return Ticket(
        group_id=message.group_id,
        attempt=message.attempt,
        purpose=enum_from_proto(Purpose, message.purpose),
        task_index=message.task_index,
        members=tuple(TicketMember(member.trajectory_id, member.member, member.seed) for member in message.members),
        sampling=sampling_from_proto(message.sampling),
        lease_seconds=seconds_from_proto(message.lease),
        pinned_version=version_from_proto(message.pinned_version) if message.HasField("pinned_version") else None,
        evaluation_id=message.evaluation_id,
    )


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
        close = parse(trajectory_pb2.TrajectoryClose, bytes(data))
        return WriteItem(trajectory_id, attempt, seq, close_from_proto(close, data))
    if tag == FAILURE:
        failure = parse(trajectory_pb2.TrajectoryFailure, bytes(data))
        return WriteItem(trajectory_id, attempt, seq, failure_from_proto(failure))
    raise InvalidDataError(f"a write to {trajectory_id!r} carries neither chunk, close nor failure")


def item_from_proto(message: replay_pb2.WriteItem) -> WriteItem:
    return item_from_wire(_wire_item(message))


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


def evaluation_to_proto(evaluation: Evaluation, epoch: int) -> replay_pb2.CreateEvaluationRequest:
    return replay_pb2.CreateEvaluationRequest(
        run=evaluation.version.run,
        epoch=epoch,
        evaluation_id=evaluation.evaluation_id,
        version=version_to_proto(evaluation.version),
        task_count=evaluation.task_count,
        members=evaluation.members,
        sampling=sampling_to_proto(evaluation.sampling),
    )


def evaluation_from_proto(message: replay_pb2.CreateEvaluationRequest) -> Evaluation:
    if not message.evaluation_id or message.task_count < 1 or message.members < 1:
        raise InvalidDataError("an evaluation needs an id, at least one task and at least one member")
    if message.task_count > _MOST_TASKS or message.members > _MOST["members"]:
        most = f"{_MOST_TASKS} tasks and {_MOST['members']} members"
        raise InvalidDataError(f"evaluation {message.evaluation_id!r} is too large: at most {most}")
    return Evaluation(
        message.evaluation_id,
        version_from_proto(message.version),
        message.task_count,
        message.members,
        sampling_from_proto(message.sampling),
    )


def status_to_proto(status: RunStatus) -> replay_pb2.GetRunStatusResponse:
    return replay_pb2.GetRunStatusResponse(
        spec=spec_to_proto(status.spec),
        epoch=status.epoch,
        head=version_to_proto(status.head),
        committed_step=status.committed_step,
        finished=status.finished,
        issued=status.issued,
        open=status.open,
        ready=status.ready,
        drawn=status.drawn,
        consumed=status.consumed,
        dropped=[
            replay_pb2.DropCount(reason=int(reason), count=count)  # type: ignore[arg-type]
            for reason, count in sorted(status.dropped.items())
        ],
        rollback=None if status.rollback is None else rollback_to_proto(status.rollback),
        dead_letters=status.dead_letters,
    )


def status_from_proto(message: replay_pb2.GetRunStatusResponse) -> RunStatus:
    return RunStatus(
        spec=spec_from_proto(message.spec),
        epoch=message.epoch,
        head=version_from_proto(message.head),
        committed_step=message.committed_step,
        finished=message.finished,
        issued=message.issued,
        open=message.open,
        ready=message.ready,
        drawn=message.drawn,
        consumed=message.consumed,
        dropped={enum_from_proto(DropReason, entry.reason): entry.count for entry in message.dropped},
        rollback=rollback_from_proto(message.rollback) if message.HasField("rollback") else None,
        dead_letters=message.dead_letters,
    )


def rollback_to_proto(rollback: Rollback) -> replay_pb2.Rollback:
    return replay_pb2.Rollback(version=version_to_proto(rollback.version), epoch=rollback.epoch)


def rollback_from_proto(message: replay_pb2.Rollback) -> Rollback:
    return Rollback(version_from_proto(message.version), message.epoch)


def letter_to_proto(letter: DeadLetter) -> replay_pb2.DeadLetter:
    return replay_pb2.DeadLetter(
        group_id=letter.group_id,
        task_index=letter.task_index,
        reason=int(letter.reason),  # type: ignore[arg-type]
        message=letter.message,
        attempts=letter.attempts,
        server_id=letter.server_id,
    )


def letter_from_proto(message: replay_pb2.DeadLetter) -> DeadLetter:
    return DeadLetter(
        message.group_id,
        message.task_index,
        enum_from_proto(DropReason, message.reason),
        message.message,
        message.attempts,
        message.server_id,
    )


def drain_to_proto(drain: Drain) -> replay_pb2.Drain:
    return replay_pb2.Drain(
        reason=int(drain.reason),  # type: ignore[arg-type]
        message=drain.message,
        drained_at=timestamp_to_proto(drain.drained_at),
    )


def drain_from_proto(message: replay_pb2.Drain) -> Drain:
    reason = enum_from_proto(DrainReason, message.reason)
    return Drain(reason, message.message, timestamp_from_proto(message.drained_at))


def server_status_to_proto(status: ServerStatus) -> replay_pb2.ServerStatus:
    return replay_pb2.ServerStatus(
        server_id=status.server_id,
        present=status.present,
        drained=None if status.drained is None else drain_to_proto(status.drained),
        version=None if status.version is None else version_to_proto(status.version),
        loans=status.loans,
        oldest_loan=duration_to_proto(status.oldest_loan_seconds),
        timed_loans=status.timed_loans,
        median_loan=duration_to_proto(status.median_loan_seconds),
    )


def server_status_from_proto(message: replay_pb2.ServerStatus) -> ServerStatus:
    return ServerStatus(
        server_id=message.server_id,
        present=message.present,
        drained=drain_from_proto(message.drained) if message.HasField("drained") else None,
        version=version_from_proto(message.version) if message.HasField("version") else None,
        loans=message.loans,
        oldest_loan_seconds=seconds_from_proto(message.oldest_loan),
        timed_loans=message.timed_loans,
        median_loan_seconds=seconds_from_proto(message.median_loan),
    )


def optional_state(number: int) -> GroupState | None:
    """A state filter; 0 means none."""
    return enum_from_proto(GroupState, number) if number else None


def optional_purpose(number: int) -> Purpose | None:
    """A purpose filter; 0 means none."""
    return enum_from_proto(Purpose, number) if number else None


# Weights and engines


def manifest_to_proto(manifest: WeightManifest) -> inference_pb2.WeightManifest:
    return inference_pb2.WeightManifest(
        tensors=[
            inference_pb2.TensorEntry(
                name=entry.name,
                dtype=wire_number(entry.dtype),  # type: ignore[arg-type]
                shape=entry.shape,
                digest=entry.digest,
            )
            for entry in manifest.tensors
        ],
        size_bytes=manifest.size_bytes,
    )


def manifest_from_proto(message: inference_pb2.WeightManifest) -> WeightManifest:
    entries: list[TensorEntry] = []
    for tensor in message.tensors:
        dtype = dtype_name(tensor.dtype)
        size_bytes = math.prod(tensor.shape) * element_size_bytes(dtype)
        entries.append(TensorEntry(tensor.name, dtype, tuple(tensor.shape), tensor.digest, size_bytes))
    manifest = WeightManifest(tuple(entries))
    names = [entry.name for entry in entries]
    if names != sorted(set(names), key=str.encode):
        raise InvalidDataError("a weight manifest lists each tensor once, in byte order of the names")
    if manifest.size_bytes != message.size_bytes:
        raise InvalidDataError(f"the manifest's tensors take {manifest.size_bytes} bytes, not {message.size_bytes}")
    return manifest


def delta_to_proto(delta: WeightDelta) -> policy_pb2.WeightDelta:
    return policy_pb2.WeightDelta(
        base_digest=delta.base_digest,
        target_digest=delta.target_digest,
        digest=delta.digest,
        size_bytes=delta.size_bytes,
    )


def delta_from_proto(message: policy_pb2.WeightDelta) -> WeightDelta:
    return WeightDelta(message.base_digest, message.target_digest, message.digest, message.size_bytes)


def weight_request_to_proto(request: WeightRequest) -> policy_pb2.FetchWeightsRequest:
    return policy_pb2.FetchWeightsRequest(
        version=version_to_proto(request.version),
        base_digest=request.base_digest,
        first_part=request.first_part,
        end_part=request.end_part,
    )


def weight_request_from_proto(message: policy_pb2.FetchWeightsRequest) -> WeightRequest:
    version = version_from_proto(message.version)
    return WeightRequest(version, message.base_digest, message.first_part, message.end_part)


def info_to_proto(info: EngineInfo) -> inference_pb2.GetServerInfoResponse:
    return inference_pb2.GetServerInfoResponse(
        signature=signature_to_proto(info.signature),
        engine=info.engine,
        logprob_mode=int(info.logprob_mode),  # type: ignore[arg-type]
        version=None if info.version is None else version_to_proto(info.version),
        max_topk=info.max_topk,
        routing=info.routing,
        max_concurrency=info.max_concurrency,
    )


def info_from_proto(message: inference_pb2.GetServerInfoResponse) -> EngineInfo:
    return EngineInfo(
        signature=signature_from_proto(message.signature),
        engine=message.engine,
        logprob_mode=enum_from_proto(LogprobMode, message.logprob_mode),
        version=version_from_proto(message.version) if message.HasField("version") else None,
        max_topk=message.max_topk,
        routing=message.routing,
        max_concurrency=message.max_concurrency,
    )


def split_buffers(manifest: WeightManifest, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Cut a stream of bytes at the manifest's tensor boundaries.

    Raises:
        InvalidDataError: the stream is shorter or longer than the manifest says.
    """
    pending = bytearray()
    source = iter(pieces)
    for entry in manifest.tensors:
        while len(pending) < entry.size_bytes:
            piece = next(source, None)
            if piece is None:
                raise InvalidDataError(f"the weights end inside tensor {entry.name}")
            pending += piece
        yield bytes(pending[: entry.size_bytes])
        del pending[: entry.size_bytes]
    if pending or next(source, b""):
        raise InvalidDataError("more bytes came than the weight manifest lists")


# Times


def timestamp_to_proto(moment: datetime) -> Timestamp:
    since = moment - _EPOCH
    return Timestamp(seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1000)


def timestamp_from_proto(message: Timestamp) -> datetime:
    seconds, nanos = message.seconds, message.nanos
    if not (_FIRST_SECOND <= seconds <= _LAST_SECOND and 0 <= nanos < 1_000_000_000):
        raise InvalidDataError(f"not a time: {seconds} seconds and {nanos} nanoseconds")
    return _EPOCH + timedelta(seconds=seconds, microseconds=nanos // 1000)


def duration_to_proto(seconds: float) -> Duration:
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def seconds_from_proto(message: Duration) -> float:
    return message.seconds + message.nanos * 1e-9
