"""The kit's own client of InferenceService: the only module of the kit that sees protobuf.

It hides nothing that a check may want to see: a chunk that cannot be decoded is kept as a finding, a status is raised
as `Refused` with its code, and bytes of an update travel cut as the check says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import grpc

from leeway import codec, rpc
from leeway.conformance.completion import Completion
from leeway.conformance.violation import Violation
from leeway.errors import InvalidDataError
from leeway.rpc import Security, cancellation_kept
from leeway.types import EngineInfo, FinishReason, Int32Array, PolicyVersion, SamplingParams, WeightManifest
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
    """A prompt tensor that may be malformed."""

    dtype: int  # leeway.v1.DataType
    shape: tuple[int, ...]
    data: bytes


class Stream:
    """One Generate call; leaving the block cancels what is left of it."""

    def __init__(self, call: _GenerateCall, completion: Completion) -> None:
        self._call = call
        self.completion = completion

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._call.cancel()

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
        """What the server says of itself.

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

    def open(self, prompt: Int32Array, sampling: SamplingParams) -> Stream:
        """Begin to generate."""
        request = inference_pb2.GenerateRequest(
            prompt_token_ids=codec.array_to_proto(prompt), sampling=codec.sampling_to_proto(sampling)
        )
        return Stream(self._stub.Generate(request, timeout=self._timeout_seconds), Completion(prompt, sampling))

    def open_raw(self, prompt: RawPrompt, sampling: SamplingParams) -> Stream:
        """Begin to generate from a prompt that no codec has seen."""
        request = inference_pb2.GenerateRequest(
            prompt_token_ids=common_pb2.Tensor(
                dtype=prompt.dtype,  # type: ignore[arg-type]
                shape=prompt.shape,
                data=prompt.data,
            ),
            sampling=codec.sampling_to_proto(sampling),
        )
        empty = codec.array_from_proto(common_pb2.Tensor(dtype=common_pb2.DATA_TYPE_INT32, shape=[0]))
        return Stream(self._stub.Generate(request, timeout=self._timeout_seconds), Completion(empty, sampling))

    async def update(self, update: Update) -> PolicyVersion:
        """Send an update; the version that the server says is in force.

        Raises:
            Refused: the server refused it, or the update gave up.
            InvalidDataError: the answer is malformed.
        """
        with _refusals("UpdateWeights"):
            call = self._stub.UpdateWeights(timeout=self._timeout_seconds)
            try:
                async for message in _messages(update):
                    await call.write(message)
                if not update.cancel_at_end:
                    await call.done_writing()
            except grpc.aio.AioRpcError:
                pass  # the server has answered before the end; the answer is read below
            except (asyncio.InvalidStateError, grpc.aio.UsageError, grpc.aio.InternalError):
                pass  # likewise: the call is done already
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


async def _messages(update: Update) -> AsyncIterator[inference_pb2.UpdateWeightsRequest]:
    yield inference_pb2.UpdateWeightsRequest(
        header=inference_pb2.WeightUpdateHeader(
            publisher_epoch=update.publisher_epoch,
            version=codec.version_to_proto(update.version),
            manifest=codec.manifest_to_proto(update.manifest),
        )
    )
    for piece in update.pieces:
        yield inference_pb2.UpdateWeightsRequest(data=piece)


@contextmanager
def _refusals(call: str) -> Generator[None]:
    try:
        with cancellation_kept():
            yield
    except grpc.aio.AioRpcError as error:
        raise Refused(call, error.code(), error.details() or "") from error
