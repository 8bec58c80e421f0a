"""Trajectory chunks: columns, segments, version spans, and the digest chain over them."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Final

import numpy as np

from leeway.codec.arrays import array_to_proto, check_array, numpy_dtype
from leeway.codec.basics import enum_from_proto, parse
from leeway.codec.dtypes import wire_number
from leeway.codec.fields import Bytes, WireColumn
from leeway.codec.policies import (
    check_sampling,
    sampling_from_proto,
    sampling_to_proto,
    version_from_proto,
    version_to_proto,
)
from leeway.codec.routing import pack_routing, unpack_planes, unpack_routing
from leeway.errors import InvalidDataError
from leeway.types import Array, Column, ColumnKind, PolicyVersion, Segment, SegmentKind, TrajectoryChunk, VersionSpan
from leeway.v1 import common_pb2, trajectory_pb2

_SEGMENT_KINDS: Final = frozenset(int(kind) for kind in SegmentKind)
_PACKED_ROUTING: Final = int(common_pb2.COLUMN_ENCODING_PACKED_ROUTING)


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
    return unpack_planes(_packed(column), numpy_dtype(column.dtype), column.shape)


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
        values = unpack_routing(_packed(column), numpy_dtype(column.dtype), column.shape)
    else:
        values = np.frombuffer(column.buffer, numpy_dtype(column.dtype)).reshape(column.shape)
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
