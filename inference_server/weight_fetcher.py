"""Brings the bytes of an announced version here and verifies them: ZeroMQ on one host, gRPC otherwise.

ZeroMQ: a DEALER socket sends [b"leeway/1", serialized PolicyVersion] to the learner's ipc endpoint and receives
[b"ok", one frame per tensor in manifest order], or [b"gone"] when that version is no longer the newest. Any trouble
there falls back to gRPC, and an endpoint that gave trouble is not tried again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import zmq
import zmq.asyncio

from inference_server.service import staged_buffers
from leeway import codec
from leeway.errors import CorruptDataError, InvalidDataError, NotFoundError
from leeway.rpc import mapped_errors
from leeway.types import PolicyVersion, WeightManifest, WeightSnapshot
from leeway.v1 import policy_pb2, policy_pb2_grpc
from leeway.weights import verify_weights

_PROTOCOL: Final = b"leeway/1"
_IPC: Final = "ipc://"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a learner says of its newest version."""

    publisher_epoch: int
    version: PolicyVersion
    manifest: WeightManifest
    local_endpoint: str

    @classmethod
    def from_proto(cls, message: policy_pb2.WatchPolicyResponse) -> Announcement:
        """Read an announcement.

        Raises:
            InvalidDataError: it is malformed.
        """
        return cls(
            message.publisher_epoch,
            codec.version_from_proto(message.version),
            codec.manifest_from_proto(message.manifest),
            message.local_endpoint,
        )


class WeightFetcher:
    """Fetches announced versions.

    Args:
        stub: the learner's PolicyService.
        address: of that service, for messages.
        allow_local: whether ZeroMQ may be used at all.
        timeout_seconds: longest fetch.
        local_timeout_seconds: longest wait for an answer over ZeroMQ, beside a second per 100 MB.
    """

    def __init__(
        self,
        stub: policy_pb2_grpc.PolicyServiceAsyncStub,
        address: str,
        *,
        allow_local: bool,
        timeout_seconds: float,
        local_timeout_seconds: float = 5.0,
    ) -> None:
        self._stub = stub
        self._address = address
        self._allow_local = allow_local
        self._timeout_seconds = timeout_seconds
        self._local_timeout_seconds = local_timeout_seconds
        self._unusable_endpoints: set[str] = set()
        self._context = zmq.asyncio.Context()

    def close(self) -> None:
        """Release the ZeroMQ context."""
        self._context.destroy(linger=0)

    async def fetch(self, announcement: Announcement) -> WeightSnapshot:
        """The verified bytes of a version.

        Raises:
            NotFoundError: it is no longer the newest; a newer announcement comes.
            CorruptDataError, InvalidDataError: the bytes are not what was announced.
            UnavailableError, DeadlineError: the learner cannot be reached.
        """
        buffers = await self._fetch_local(announcement)
        if buffers is None:
            buffers = await self._fetch_remote(announcement)
        return WeightSnapshot(announcement.version, announcement.publisher_epoch, announcement.manifest, buffers)

    async def _fetch_local(self, announcement: Announcement) -> Sequence[memoryview] | None:
        """The bytes over ZeroMQ; None when that is not possible."""
        endpoint = announcement.local_endpoint
        if not self._allow_local or not endpoint or endpoint in self._unusable_endpoints:
            return None
        if not _is_on_this_host(endpoint):
            log.info("the learner's ZeroMQ endpoint %s is not on this host; fetching weights over gRPC", endpoint)
            self._unusable_endpoints.add(endpoint)
            return None
        seconds = self._local_timeout_seconds + announcement.manifest.size_bytes / 100e6
        try:
            async with asyncio.timeout(seconds):
                frames = await self._request_local(endpoint, announcement.version)
            if frames[0].bytes == b"gone":
                raise NotFoundError(f"{announcement.version} is no longer the newest version")
            buffers = [frame.buffer for frame in frames[1:]]
            await asyncio.to_thread(verify_weights, announcement.manifest, buffers, announcement.version.digest)
        except TimeoutError:
            problem = f"no answer within {seconds:.1f} s"
        except zmq.ZMQError as error:
            problem = str(error)
        except CorruptDataError as error:
            problem = error.message
        else:
            return buffers
        log.warning("ZeroMQ at %s fails (%s); fetching weights over gRPC from now on", endpoint, problem)
        self._unusable_endpoints.add(endpoint)
        return None

    async def _request_local(self, endpoint: str, version: PolicyVersion) -> list[zmq.Frame]:
        # A socket for each request: a late answer to an abandoned one can never be taken for the next.
        socket: Any
        with self._context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(endpoint)
            await socket.send_multipart([_PROTOCOL, codec.version_to_proto(version).SerializeToString()])
            return await socket.recv_multipart(copy=False)

    async def _fetch_remote(self, announcement: Announcement) -> list[bytes]:
        manifest = announcement.manifest
        request = policy_pb2.FetchWeightsRequest(version=codec.version_to_proto(announcement.version))
        pieces: list[bytes] = []
        room = manifest.size_bytes
        with mapped_errors(f"FetchWeights at {self._address}"):
            async for reply in self._stub.FetchWeights(request, timeout=self._timeout_seconds):
                room -= len(reply.data)
                if room < 0:
                    raise InvalidDataError("more bytes came than the weight manifest lists")
                pieces.append(reply.data)
        return await asyncio.to_thread(staged_buffers, manifest, pieces, announcement.version.digest)


def _is_on_this_host(endpoint: str) -> bool:
    return endpoint.startswith(_IPC) and Path(endpoint.removeprefix(_IPC)).exists()
