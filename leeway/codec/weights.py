"""Weight manifests, deltas and requests; what an engine says of itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from leeway.codec.basics import enum_from_proto
from leeway.codec.dtypes import dtype_name, element_size_bytes, wire_number
from leeway.codec.policies import signature_from_proto, signature_to_proto, version_from_proto, version_to_proto
from leeway.errors import InvalidDataError
from leeway.types import EngineInfo, LogprobMode, TensorEntry, WeightDelta, WeightManifest, WeightRequest
from leeway.v1 import inference_pb2, policy_pb2


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
