"""The ways that weight bytes come to this server. Control always travels over WatchPolicy."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import zmq
import zmq.asyncio

from leeway import codec
from leeway.errors import DeadlineError, InvalidDataError, NotFoundError, UnavailableError
from leeway.rpc import mapped_errors
from leeway.types import PolicyVersion, WeightDelta, WeightManifest, WeightRequest
from leeway.v1 import policy_pb2, policy_pb2_grpc

_PROTOCOL: Final = b"leeway/2"
_IPC: Final = "ipc://"
_REQUESTS_IN_FLIGHT: Final = 3

log = logging.getLogger(__name__)

BATCH_BYTES: Final = 4 << 20
"""Parts are handed on in batches of at least this size, which are checked while the next ones come."""

Part = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Announcement:
    """The learner's description of its newest version."""

    publisher_epoch: int
    version: PolicyVersion
    manifest: WeightManifest
    local_endpoint: str = ""
    deltas: tuple[WeightDelta, ...] = ()  # a chain that ends at the version
    broadcast_port: int = 0  # at the learner's host; 0: none

    def deltas_from(self, digest: bytes) -> tuple[WeightDelta, ...]:
        """The shortest part of the chain that starts at weights with this digest; empty when there is none."""
        for index in range(len(self.deltas) - 1, -1, -1):
            if self.deltas[index].base_digest == digest:
                return self.deltas[index:]
        return ()


@dataclass(frozen=True, slots=True)
class WeightSource:
    """The learner whose weights are fetched; a transport is made from it."""

    stub: policy_pb2_grpc.PolicyServiceAsyncStub
    address: str  # of its PolicyService
    server_id: str  # this server's name in the run
    fetch_timeout_seconds: float = 600.0  # longest fetch of one version


class WeightTransport(Protocol):
    """A way for bytes, which need not be right: the fetcher checks every part."""

    name: str
    """The label in metrics."""

    def greet(self, hello: policy_pb2.PolicyWatcher) -> None:
        """Write into this server's hello what the learner must know of the transport."""
        ...

    def reaches(self, announcement: Announcement) -> bool:
        """True if this way leads to the learner that announced."""
        ...

    def fetch(
        self, announcement: Announcement, request: WeightRequest, sizes: Sequence[int]
    ) -> AsyncGenerator[list[Part]]:
        """All requested parts in order, in batches; `sizes` are theirs in bytes.

        Raises:
            NotFoundError: the learner does not have them.
            InvalidDataError: more or fewer bytes came.
            UnavailableError, DeadlineError: the learner cannot be reached this way.
        """
        ...

    def gave_trouble(self, announcement: Announcement) -> None:
        """Wrong bytes came, or none: `reaches` may say no from now on."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


def batches(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges [first, end) of consecutive parts of at least BATCH_BYTES together, the last one fewer."""
    ranges: list[tuple[int, int]] = []
    first, size_bytes = 0, 0
    for index, size in enumerate(sizes):
        size_bytes += size
        if size_bytes >= BATCH_BYTES:
            ranges.append((first, index + 1))
            first, size_bytes = index + 1, 0
    return [*ranges, (first, len(sizes))] if first < len(sizes) else ranges


class GrpcTransport:
    """Implements WeightTransport: the stream FetchWeights of a learner anywhere (mutual TLS beyond loopback)."""

    name = "grpc"

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def greet(self, hello: policy_pb2.PolicyWatcher) -> None:
        pass

    def reaches(self, announcement: Announcement) -> bool:
        return True

    async def fetch(
        self, announcement: Announcement, request: WeightRequest, sizes: Sequence[int]
    ) -> AsyncGenerator[list[Part]]:
        message = codec.weight_request_to_proto(request)
        batch: list[Part] = []
        cutter = _Cutter(sizes)
        with mapped_errors(f"FetchWeights at {self._source.address}"):
            async for reply in self._source.stub.FetchWeights(message, timeout=self._source.fetch_timeout_seconds):
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


class ZmqTransport:
    """Implements WeightTransport: ZeroMQ, a DEALER socket on the announced ipc endpoint of a learner on this host.

    Parts are requested in ranges, a few of them at a time, so that a range is checked while the next one is copied. A
    socket lives for one fetch: a late answer to an abandoned one can never be taken for the next.
    """

    timeout_seconds = 5.0
    """Longest wait for one answer, beside a second per 100 MB."""

    name = "zmq"

    def __init__(self, _source: WeightSource) -> None:
        self._unusable: set[str] = set()
        self._context = zmq.asyncio.Context()

    def greet(self, hello: policy_pb2.PolicyWatcher) -> None:
        pass

    def reaches(self, announcement: Announcement) -> bool:
        endpoint = announcement.local_endpoint
        if not endpoint or endpoint in self._unusable:
            return False
        if endpoint.startswith(_IPC) and Path(endpoint.removeprefix(_IPC)).exists():
            return True
        log.info("the learner's ZeroMQ endpoint %s is not on this host", endpoint)
        self._unusable.add(endpoint)
        return False

    async def fetch(
        self, announcement: Announcement, request: WeightRequest, sizes: Sequence[int]
    ) -> AsyncGenerator[list[Part]]:
        waiting = deque(batches(sizes))
        asked: deque[tuple[int, int, bytes]] = deque()
        socket: Any
        with self._context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            try:
                socket.connect(announcement.local_endpoint)
                while waiting or asked:
                    while waiting and len(asked) < _REQUESTS_IN_FLIGHT:
                        first, end = waiting.popleft()
                        message = codec.weight_request_to_proto(replace(request, first_part=first, end_part=end))
                        asked.append((first, end, message.SerializeToString()))
                        await socket.send_multipart([_PROTOCOL, asked[-1][2]])
                    first, end, key = asked.popleft()
                    async with asyncio.timeout(self.timeout_seconds + sum(sizes[first:end]) / 100e6):
                        frames = await socket.recv_multipart(copy=False)
                    yield _parts(frames, key, sizes[first:end], announcement)
            except TimeoutError:
                raise DeadlineError(f"no answer at {announcement.local_endpoint}") from None
            except zmq.ZMQError as error:
                raise UnavailableError(f"{announcement.local_endpoint}: {error}") from error

    def gave_trouble(self, announcement: Announcement) -> None:
        self._unusable.add(announcement.local_endpoint)

    def close(self) -> None:
        self._context.destroy(linger=0)


def _parts(frames: list[zmq.Frame], key: bytes, sizes: Sequence[int], announcement: Announcement) -> list[Part]:
    status = frames[0].bytes
    if len(frames) < 2 or frames[1].bytes != key or status not in (b"ok", b"gone"):
        raise InvalidDataError(f"what came at {announcement.local_endpoint} answers another request")
    if status == b"gone":
        raise NotFoundError(f"{announcement.version} is no longer the newest version")
    if [len(frame.buffer) for frame in frames[2:]] != list(sizes):
        raise InvalidDataError(f"the answer at {announcement.local_endpoint} has parts of other sizes than announced")
    return [frame.buffer for frame in frames[2:]]
