"""The kit's own client of InferenceService: the only module of the kit that sees protobuf.

It hides nothing from the checks: a chunk that cannot be decoded is kept as a finding, a status is raised as `Refused`
with its code, and bytes of an update are cut as the check says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterable
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np

from leeway import codec, rpc
from leeway.conformance.requirement import Violation
from leeway.errors import InvalidDataError
from leeway.rpc import Security, cancellation_kept
from leeway.types import (
    Array,
    Column,
    ColumnKind,
    EngineInfo,
    FinishReason,
    Float32Array,
    Int32Array,
    PolicyVersion,
    SamplingParams,
    TrajectoryChunk,
    VersionSpan,
    WeightManifest,
)
from leeway.v1 import common_pb2, inference_pb2, inference_pb2_grpc

_GenerateCall = grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]


class Refused(Exception):
    """A call ended with an error status."""

    def __init__(self, call: str, code: grpc.StatusCode, message: str) -> None:
        super().__init__(f"{call} ended with {code.name}: {message or '(no message)'}")
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class Update:
    """One UpdateWeights call, which may be wrong in any way."""

    publisher_epoch: int
    version: PolicyVersion
    manifest: WeightManifest
    pieces: Iterable[bytes]
    cancel_at_end: bool = False  # the client gives up in place of closing its side


@dataclass(frozen=True, slots=True)
class RawPrompt:
    """A prompt tensor that may be malformed, as no codec would make it."""

    dtype: int  # leeway.v1.DataType
    shape: tuple[int, ...]
    data: bytes


@dataclass(slots=True)
class Completion:
    """One Generate call: its chunks in order, kept as they came, and how it ended."""

    prompt: Int32Array  # [prompt]
    sampling: SamplingParams
    chunks: list[TrajectoryChunk] = field(default_factory=list[TrajectoryChunk])
    malformed: list[str] = field(default_factory=list[str])  # chunks that are none, and why
    finish_reason: FinishReason | None = None
    announced_tokens: int = 0  # as `finished` says
    after_finished: int = 0  # messages that came later

    def columns(self, kind: ColumnKind) -> list[Column]:
        """All columns of a kind, in the order in which they came."""
        return [column for chunk in self.chunks for column in chunk.columns if column.kind is kind]

    def values(self, kind: ColumnKind) -> Array:
        """Their values, one after the other; [0] when there are none."""
        columns = self.columns(kind)
        return np.concatenate([column.values for column in columns]) if columns else np.zeros(0)

    @property
    def token_ids(self) -> Int32Array:
        """[n], the sampled tokens."""
        return self.values(ColumnKind.TOKEN_IDS).astype(np.int32)

    @property
    def logprobs(self) -> Float32Array:
        """[n], what they were sampled with, as claimed."""
        return self.values(ColumnKind.BEHAVIOR_LOGPROBS).astype(np.float32)

    @property
    def spans(self) -> list[VersionSpan]:
        """All version spans, in the order in which they came."""
        return [span for chunk in self.chunks for span in chunk.version_spans]

    def equals(self, other: Completion, tolerance: float, count: int | None = None) -> bool:
        """True if the first `count` tokens are the same and their log-probs agree."""
        ids, logprobs = self.token_ids[:count], self.logprobs[:count]
        other_ids, other_logprobs = other.token_ids[:count], other.logprobs[:count]
        return (
            ids.shape == other_ids.shape
            and logprobs.shape == other_logprobs.shape
            and bool((ids == other_ids).all())
            and bool((np.abs(logprobs - other_logprobs) <= tolerance).all())
        )


@dataclass(frozen=True, slots=True)
class Stream:
    """One Generate call."""

    _call: _GenerateCall
    completion: Completion

    async def read(self) -> bool:
        """Take one message into the completion; False at the end of the stream.

        Raises:
            Refused: the call failed.
        """
        with _refusals("Generate"):
            message = await self._call.read()
        if not isinstance(message, inference_pb2.GenerateResponse):
            return False
        completion = self.completion
        if completion.finish_reason is not None:
            completion.after_finished += 1
        elif message.WhichOneof("event") == "finished":
            completion.announced_tokens = message.finished.token_count
            try:
                completion.finish_reason = codec.enum_from_proto(FinishReason, message.finished.finish_reason)
            except InvalidDataError as error:
                raise Violation(f"finish_reason: {error.message}") from error
        else:
            try:
                completion.chunks.append(codec.chunk_from_proto(message.chunk))
            except InvalidDataError as error:
                completion.malformed.append(error.message)
        return True

    async def rest(self) -> Completion:
        """Read to the end of the stream."""
        while await self.read():
            pass
        return self.completion


class BackendClient:
    """Calls one server.

    Args:
        address: host:port.
        security: certificates, if it wants any.
        timeout_seconds: deadline of each call.
    """

    def __init__(self, address: str, security: Security, timeout_seconds: float) -> None:
        self.address = address
        self._timeout_seconds = timeout_seconds
        self._channel = rpc.open_channel(address, security, patient=False)
        self._stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(
            self._channel
        )

    async def info(self, timeout_seconds: float | None = None) -> EngineInfo:
        """The description that the server gives of itself.

        Raises:
            Refused: the call failed.
            InvalidDataError: the answer is malformed.
        """
        with _refusals("GetServerInfo"):
            reply = await self._stub.GetServerInfo(
                inference_pb2.GetServerInfoRequest(),
                timeout=timeout_seconds or self._timeout_seconds,
                wait_for_ready=True,
            )
        return codec.info_from_proto(reply)

    @asynccontextmanager
    async def open(self, prompt: Int32Array | RawPrompt, sampling: SamplingParams) -> AsyncGenerator[Stream]:
        """Begin to generate; at the end of the block the rest of the call is cancelled."""
        if isinstance(prompt, RawPrompt):
            tensor = common_pb2.Tensor(
                dtype=prompt.dtype,  # type: ignore[arg-type]
                shape=prompt.shape,
                data=prompt.data,
            )
            prompt = np.zeros(0, dtype=np.int32)
        else:
            tensor = codec.array_to_proto(prompt)
        request = inference_pb2.GenerateRequest(prompt_token_ids=tensor, sampling=codec.sampling_to_proto(sampling))
        call = self._stub.Generate(request, timeout=self._timeout_seconds)
        try:
            yield Stream(call, Completion(prompt, sampling))
        finally:
            call.cancel()

    async def update(self, update: Update) -> PolicyVersion:
        """Send an update; the version that the server says is in force.

        Raises:
            Refused: the server refused it, or the update gave up.
            InvalidDataError: the answer is malformed.
        """
        with _refusals("UpdateWeights"):
            call = self._stub.UpdateWeights(timeout=self._timeout_seconds)
            try:
                await call.write(inference_pb2.UpdateWeightsRequest(header=_header(update)))
                for piece in update.pieces:
                    await call.write(inference_pb2.UpdateWeightsRequest(data=piece))
                if not update.cancel_at_end:
                    await call.done_writing()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError, grpc.aio.InternalError):
                pass  # the server has answered before the end; the answer is read below
            if update.cancel_at_end:
                call.cancel()
                raise Refused("UpdateWeights", grpc.StatusCode.CANCELLED, "given up by the kit")
            reply = await call
        return codec.version_from_proto(reply.version)

    async def pause(self) -> None:
        """Stop decoding."""
        with _refusals("PauseGeneration"):
            await self._stub.PauseGeneration(inference_pb2.PauseGenerationRequest(), timeout=self._timeout_seconds)

    async def resume(self) -> None:
        """Go on decoding."""
        with _refusals("ResumeGeneration"):
            await self._stub.ResumeGeneration(inference_pb2.ResumeGenerationRequest(), timeout=self._timeout_seconds)

    async def aclose(self) -> None:
        """Close the channel."""
        await self._channel.close()


def _header(update: Update) -> inference_pb2.WeightUpdateHeader:
    return inference_pb2.WeightUpdateHeader(
        publisher_epoch=update.publisher_epoch,
        version=codec.version_to_proto(update.version),
        manifest=codec.manifest_to_proto(update.manifest),
    )


@contextmanager
def _refusals(call: str) -> Generator[None]:
    try:
        with cancellation_kept():
            yield
    except grpc.aio.AioRpcError as error:
        raise Refused(call, error.code(), error.details() or "") from error
