"""InferenceService over any Engine: protobuf messages on one side, `leeway.types` on the other."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Final

import grpc

from inference_server.engine import Engine, GenerationEnd, GenerationRequest, check_request
from inference_server.served_policy import ServedPolicy
from leeway import codec
from leeway.errors import DeadlineError, FencedError, InvalidDataError, PreconditionError
from leeway.types import WeightManifest, WeightSnapshot
from leeway.v1 import inference_pb2, inference_pb2_grpc
from leeway.weights.digests import verify_weights

SERVICE_NAME: Final = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name

_Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """See inference.proto, which is the specification.

    Args:
        engine: samples.
        policy: takes new weights for that engine.
        staging_timeout_seconds: longest wait for all bytes of an update.
    """

    def __init__(self, engine: Engine, policy: ServedPolicy, staging_timeout_seconds: float = 600.0) -> None:
        self._engine = engine
        self._policy = policy
        self._staging_timeout_seconds = staging_timeout_seconds

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """See inference.proto."""
        generation = GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=codec.array_from_proto(request.prompt_token_ids),
            sampling=codec.sampling_from_proto(request.sampling),
        )
        check_request(generation, self._engine.info())
        async with aclosing(self._engine.generate(generation)) as events:
            async for event in events:
                if isinstance(event, GenerationEnd):
                    finished = inference_pb2.GenerationFinished(
                        finish_reason=int(event.finish_reason),  # type: ignore[arg-type]
                        token_count=event.num_tokens,
                    )
                    yield inference_pb2.GenerateResponse(finished=finished)
                else:
                    yield inference_pb2.GenerateResponse(chunk=codec.chunk_to_proto(event))

    async def UpdateWeights(
        self, request_iterator: AsyncIterator[inference_pb2.UpdateWeightsRequest], context: _Context
    ) -> inference_pb2.UpdateWeightsResponse:
        """See inference.proto."""
        try:
            async with asyncio.timeout(self._staging_timeout_seconds):
                snapshot = await self._stage(aiter(request_iterator))
        except TimeoutError:
            raise DeadlineError(
                f"the weights did not arrive within {self._staging_timeout_seconds:g} s; send them again"
            ) from None
        try:
            paused_seconds = await self._policy.update(snapshot)
        except FencedError as error:
            raise PreconditionError(error.message) from error
        return inference_pb2.UpdateWeightsResponse(
            version=codec.version_to_proto(snapshot.version), paused=codec.duration_to_proto(paused_seconds)
        )

    async def _stage(self, messages: AsyncIterator[inference_pb2.UpdateWeightsRequest]) -> WeightSnapshot:
        """Receive and verify all bytes of an update. Nothing of it has reached the engine yet."""
        first = await anext(messages, None)
        if first is None or not first.HasField("header"):
            raise InvalidDataError("the first message of UpdateWeights must be its header")
        header = first.header
        manifest = codec.manifest_from_proto(header.manifest)
        version = codec.version_from_proto(header.version)
        pieces: list[bytes] = []
        room = manifest.size_bytes
        async for message in messages:
            if message.WhichOneof("message") != "data":
                raise InvalidDataError("every message of UpdateWeights after the header must be data")
            room -= len(message.data)
            if room < 0:
                raise InvalidDataError("UpdateWeights received more bytes than its manifest lists")
            pieces.append(message.data)
        buffers = await asyncio.to_thread(staged_buffers, manifest, pieces, version.digest)
        return WeightSnapshot(version, header.publisher_epoch, manifest, buffers)

    async def PauseGeneration(
        self, request: inference_pb2.PauseGenerationRequest, context: _Context
    ) -> inference_pb2.PauseGenerationResponse:
        """See inference.proto."""
        await self._engine.pause()
        return inference_pb2.PauseGenerationResponse()

    async def ResumeGeneration(
        self, request: inference_pb2.ResumeGenerationRequest, context: _Context
    ) -> inference_pb2.ResumeGenerationResponse:
        """See inference.proto."""
        await self._engine.resume()
        return inference_pb2.ResumeGenerationResponse()

    async def GetServerInfo(
        self, request: inference_pb2.GetServerInfoRequest, context: _Context
    ) -> inference_pb2.GetServerInfoResponse:
        """See inference.proto."""
        return codec.info_to_proto(self._engine.info())


def staged_buffers(manifest: WeightManifest, pieces: Sequence[bytes], digest: bytes) -> list[bytes]:
    """One verified buffer per tensor from a stream of pieces. It hashes everything, so call it in a thread.

    Raises:
        InvalidDataError: fewer or more bytes came than the manifest lists.
        CorruptDataError: bytes are not what their digest says.
    """
    buffers = list(codec.split_buffers(manifest, pieces))
    verify_weights(manifest, buffers, digest)
    return buffers


def add_inference_service(engine: Engine, policy: ServedPolicy) -> Callable[[grpc.aio.Server], None]:
    """The function by which `leeway.rpc.start_server` registers the service."""

    def add(server: grpc.aio.Server) -> None:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(engine, policy), server)

    return add
