"""An Engine over a foreign backend that implements InferenceService.

The backend owns slots and weights; this side keeps what it last said of itself. Only `connect` waits for a backend: a
later call fails as soon as the connection is lost, so that nothing is held for a backend that may never come back.
One that restarts has lost its weights, which shows as a failed `generate`, too: the worker's process then ends, and a
new one joins like any late server.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime

from inference_server.engine import GenerationEnd, GenerationRequest
from leeway import codec, rpc
from leeway.errors import UnavailableError
from leeway.rpc import BULK_PIECE_BYTES, Security, mapped_errors
from leeway.types import EngineInfo, FinishReason, TrajectoryChunk, WeightSnapshot
from leeway.v1 import inference_pb2, inference_pb2_grpc

log = logging.getLogger(__name__)


class RemoteEngine:
    """Implements Engine over a channel; made by `connect`."""

    def __init__(self, address: str, security: Security, timeout_seconds: float) -> None:
        self.address = address
        self._timeout_seconds = timeout_seconds
        self._channel = rpc.open_channel(address, security, patient=False)
        self._stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(
            self._channel
        )
        self._info: EngineInfo | None = None

    @classmethod
    async def connect(cls, address: str, security: Security, *, timeout_seconds: float = 600.0) -> RemoteEngine:
        """Wait for the backend and ask what it serves.

        Args:
            address: host:port of an InferenceService.
            security: the run's certificates.
            timeout_seconds: deadline of this and every later call; a generation must end within it.

        Raises:
            DeadlineError, UnavailableError: there is no backend at the address.
        """
        engine = cls(address, security, timeout_seconds)
        log.info("waiting for the backend at %s", address)
        try:
            with mapped_errors(f"GetServerInfo at {address}"):
                reply = await engine._stub.GetServerInfo(
                    inference_pb2.GetServerInfoRequest(), timeout=min(timeout_seconds, 120.0), wait_for_ready=True
                )
            engine._info = codec.info_from_proto(reply)
        except BaseException:
            await engine.aclose()
            raise
        return engine

    def info(self) -> EngineInfo:
        if self._info is None:
            raise UnavailableError(f"nothing is known of the backend at {self.address} yet")
        return self._info

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TrajectoryChunk | GenerationEnd, None]:
        message = inference_pb2.GenerateRequest(
            prompt_token_ids=codec.array_to_proto(request.prompt_token_ids),
            sampling=codec.sampling_to_proto(request.sampling),
        )
        started_at = datetime.now(UTC)
        with mapped_errors(f"Generate at {self.address}"):
            call = self._stub.Generate(message, timeout=self._timeout_seconds)
            try:
                async for response in call:
                    if response.WhichOneof("event") == "chunk":
                        yield codec.chunk_from_proto(response.chunk)
                        continue
                    finished = response.finished
                    reason = codec.enum_from_proto(FinishReason, finished.finish_reason)
                    yield GenerationEnd(reason, finished.token_count, started_at, datetime.now(UTC))
                    return
            finally:
                call.cancel()
        raise UnavailableError(f"Generate at {self.address} ended without `finished`; the backend breaks the contract")

    async def update_weights(self, snapshot: WeightSnapshot) -> float:
        with mapped_errors(f"UpdateWeights at {self.address}"):
            reply = await self._stub.UpdateWeights(_messages(snapshot), timeout=self._timeout_seconds)
        self._info = replace(self.info(), version=codec.version_from_proto(reply.version))
        return codec.seconds_from_proto(reply.paused)

    async def pause(self) -> None:
        with mapped_errors(f"PauseGeneration at {self.address}"):
            await self._stub.PauseGeneration(inference_pb2.PauseGenerationRequest(), timeout=self._timeout_seconds)

    async def resume(self) -> None:
        with mapped_errors(f"ResumeGeneration at {self.address}"):
            await self._stub.ResumeGeneration(inference_pb2.ResumeGenerationRequest(), timeout=self._timeout_seconds)

    async def aclose(self) -> None:
        await self._channel.close()


async def _messages(snapshot: WeightSnapshot) -> AsyncIterator[inference_pb2.UpdateWeightsRequest]:
    """Header, then the bytes of all tensors in manifest order."""
    yield inference_pb2.UpdateWeightsRequest(
        header=inference_pb2.WeightUpdateHeader(
            publisher_epoch=snapshot.publisher_epoch,
            version=codec.version_to_proto(snapshot.version),
            manifest=codec.manifest_to_proto(snapshot.manifest),
        )
    )
    for buffer in snapshot.buffers:
        view = memoryview(buffer)
        for start in range(0, len(view), BULK_PIECE_BYTES):
            yield inference_pb2.UpdateWeightsRequest(data=bytes(view[start : start + BULK_PIECE_BYTES]))
