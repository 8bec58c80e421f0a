"""Trajectory chunks: columns, segments, version spans, and the digest chain over them."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Final

from leeway.codec.arrays import array_from_proto, array_to_proto, numpy_dtype
from leeway.codec.basics import enum_from_proto, parse
from leeway.codec.dtypes import wire_number
from leeway.codec.policies import (
    check_version,
    sampling_from_proto,
    sampling_to_proto,
    version_to_proto,
)
from leeway.codec.routing import pack_routing, unpack_routing
from leeway.errors import InvalidDataError
from leeway.types import (
    Column,
    ColumnKind,
    PolicyVersion,
    SamplingParams,
    Segment,
    SegmentKind,
    TrajectoryChunk,
    VersionSpan,
)
from leeway.v1 import common_pb2, trajectory_pb2


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


def decode_chunk(data: bytes) -> TrajectoryChunk:
    return chunk_from_proto(parse(trajectory_pb2.TrajectoryChunk, data))


def chain_digest(previous: bytes, *chunks: bytes) -> bytes:
    """d(i+1) = SHA-256(d(i) + chunk i), over several; see TrajectoryClose.digest."""
    for chunk in chunks:
        chain = hashlib.sha256(previous)
        chain.update(chunk)
        previous = chain.digest()
    return previous


EMPTY_CHAIN: Final = hashlib.sha256().digest()
"""d(0) of `chain_digest`."""


def chunk_versions(data: bytes) -> tuple[PolicyVersion, ...]:
    """Those of a serialized chunk; see `span_versions`."""
    return span_versions(parse(trajectory_pb2.TrajectoryChunk, data))


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
    tensor, kind = message.values, enum_from_proto(ColumnKind, message.kind)
    start, end = message.start_token, message.end_token
    if message.encoding == common_pb2.COLUMN_ENCODING_PACKED_ROUTING and kind is ColumnKind.ROUTING:
        values = unpack_routing(tensor.data, numpy_dtype(tensor.dtype), tuple(tensor.shape))
    elif message.encoding:
        raise InvalidDataError(f"a {kind.name} column cannot have encoding {message.encoding}")
    else:
        values = array_from_proto(tensor)
    if not values.ndim or len(values) != end - start:
        raise InvalidDataError(f"column {kind.name} covers tokens [{start}, {end}) but has shape {list(values.shape)}")
    return Column(kind, start, end, values)


def _segment_to_proto(segment: Segment) -> common_pb2.Segment:
    return common_pb2.Segment(
        kind=int(segment.kind),  # type: ignore[arg-type]
        start_token=segment.start_token,
        end_token=segment.end_token,
        in_loss=segment.in_loss,
        sampling=None if segment.sampling is None else sampling_to_proto(segment.sampling),
        engine=segment.engine,
    )


def _segment_from_proto(message: common_pb2.Segment) -> Segment:
    kind = enum_from_proto(SegmentKind, message.kind)
    if message.end_token < message.start_token:
        raise InvalidDataError(f"a segment ends at token {message.end_token}, before its start {message.start_token}")
    if message.in_loss and kind is not SegmentKind.MODEL:
        raise InvalidDataError(f"a {kind.name} segment cannot be in the loss")
    sampling = _known_sampling(message.sampling.SerializeToString()) if message.HasField("sampling") else None
    return Segment(kind, message.start_token, message.end_token, message.in_loss, sampling, message.engine)


@lru_cache(maxsize=256)
def _known_sampling(data: bytes) -> SamplingParams:
    """One object for all the chunks that repeat it."""
    return sampling_from_proto(parse(common_pb2.SamplingParams, data))


def _span_from_proto(message: common_pb2.VersionSpan) -> VersionSpan:
    if message.end_token <= message.start_token:
        raise InvalidDataError(f"version span [{message.start_token}, {message.end_token}) is empty")
    version = message.version
    known = _known_version(version.run, version.epoch, version.step, version.digest)
    check_version(known)
    return VersionSpan(message.start_token, message.end_token, known)
