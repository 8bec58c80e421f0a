"""Weights from a learner anywhere, over the gRPC stream FetchWeights (mutual TLS beyond loopback)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from inference_server.weights.transport import BATCH_BYTES, Announcement, Part
from leeway import codec
from leeway.errors import InvalidDataError
from leeway.rpc import mapped_errors
from leeway.types import WeightRequest
from leeway.v1 import policy_pb2_grpc


class StreamedWeights:
    """Implements WeightTransport.

    Args:
        stub: the learner's PolicyService.
        address: of that service, for messages.
        timeout_seconds: longest fetch.
    """

    name = "grpc"

    def __init__(self, stub: policy_pb2_grpc.PolicyServiceAsyncStub, address: str, timeout_seconds: float) -> None:
        self._stub = stub
        self._address = address
        self._timeout_seconds = timeout_seconds

    def reaches(self, announcement: Announcement) -> bool:
        return True

    async def fetch(
        self, announcement: Announcement, request: WeightRequest, sizes: Sequence[int]
    ) -> AsyncGenerator[list[Part]]:
        message = codec.weight_request_to_proto(request)
        batch: list[Part] = []
        cutter = _Cutter(sizes)
        with mapped_errors(f"FetchWeights at {self._address}"):
            async for reply in self._stub.FetchWeights(message, timeout=self._timeout_seconds):
                batch += cutter.cut(reply.data)
                if sum(map(len, batch)) >= BATCH_BYTES:
                    yield batch
                    batch = []
        yield [*batch, *cutter.end()]

    def gave_trouble(self, announcement: Announcement) -> None:
        pass  # there is no other way

    def close(self) -> None:
        pass


class _Cutter:
    """Cuts a stream of pieces into parts of known sizes; holds no more than has come."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = list(reversed(sizes))
        self._pending: list[Part] = []
        self._pending_bytes = 0

    def cut(self, piece: bytes) -> list[Part]:
        """The parts that end within this piece.

        Raises:
            InvalidDataError: bytes follow the last part.
        """
        parts: list[Part] = []
        rest = memoryview(piece)
        while rest:
            if not self._sizes:
                raise InvalidDataError("more bytes came than the weights that were announced")
            taken = rest[: self._sizes[-1] - self._pending_bytes]
            rest = rest[len(taken) :]
            self._pending.append(taken)
            self._pending_bytes += len(taken)
            if self._pending_bytes == self._sizes[-1]:
                parts.append(self._part())
        return parts

    def end(self) -> list[Part]:
        """Empty parts at the end.

        Raises:
            InvalidDataError: bytes are missing.
        """
        parts: list[Part] = []
        while self._sizes and self._sizes[-1] == self._pending_bytes == 0:
            parts.append(self._part())
        if self._sizes:
            raise InvalidDataError("the weights end too early")
        return parts

    def _part(self) -> Part:
        part = self._pending[0] if len(self._pending) == 1 else b"".join(self._pending)
        self._pending, self._pending_bytes = [], 0
        self._sizes.pop()
        return part
