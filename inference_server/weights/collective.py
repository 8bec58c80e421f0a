"""Weights from a learner that broadcasts them to all servers at once, over torch.distributed.

    JoinBroadcast ──> seat ──> group: the one held, or a new one ──> pieces ──> parts, checked while the next come

The bytes land in one piece of host memory, of which the parts are views; it is used again when no engine and no held
snapshot refers to them any more. A group that broke is dropped; the learner
forms another one for the next version.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence

from inference_server.weights.host_memory import HostMemory
from inference_server.weights.transport import Announcement, Part
from leeway import codec
from leeway.errors import InvalidDataError, PreconditionError, UnavailableError
from leeway.rpc import mapped_errors
from leeway.types import PolicyVersion, WeightRequest
from leeway.v1 import policy_pb2, policy_pb2_grpc
from leeway.weights.broadcast import LIBRARY, BroadcastGroup

__all__ = ["LIBRARY", "CollectiveWeights"]

log = logging.getLogger(__name__)


class CollectiveWeights:
    """Implements WeightTransport.

    Args:
        stub: the learner's PolicyService.
        address: of that service; groups meet at the announced port of its host.
        server_id: this server's name in the run.
        timeout_seconds: longest wait for a seat.
    """

    name = "collective"

    def __init__(
        self,
        stub: policy_pb2_grpc.PolicyServiceAsyncStub,
        address: str,
        server_id: str,
        timeout_seconds: float = 60.0,
    ) -> None:
        self._stub = stub
        self._address = address
        self._host = address.rpartition(":")[0]
        self._server_id = server_id
        self._timeout_seconds = timeout_seconds
        self._group: tuple[int, BroadcastGroup] | None = None  # with its number
        self._spoilt: PolicyVersion | None = None
        self._memory = HostMemory()

    def reaches(self, announcement: Announcement) -> bool:
        return announcement.broadcast_port != 0 and announcement.version != self._spoilt

    async def fetch(
        self, announcement: Announcement, request: WeightRequest, sizes: Sequence[int]
    ) -> AsyncGenerator[list[Part]]:
        seat = await self._seat(request)
        held, self._group = self._group, None
        group = held[1] if held is not None and held[0] == seat.group else None
        del held
        if group is None:
            address = (self._host, announcement.broadcast_port)
            patience_seconds = codec.seconds_from_proto(seat.patience)
            group = await asyncio.to_thread(
                BroadcastGroup, address, seat.group, seat.rank, seat.world_size, patience_seconds
            )
        memory = self._memory.take(sum(sizes))
        first = at = 0
        whole = False
        try:
            arriving = group.receive(memory)
            while (end := await asyncio.to_thread(next, arriving, None)) is not None:
                parts: list[Part] = []
                while first < len(sizes) and at + sizes[first] <= end:
                    parts.append(memory[at : at + sizes[first]].toreadonly())
                    at += sizes[first]
                    first += 1
                yield parts
            yield [b""] * (len(sizes) - first)  # empty parts at the end
            whole = True
        finally:
            if whole:
                self._group = seat.group, group
            else:
                group.close()

    async def _seat(self, request: WeightRequest) -> policy_pb2.JoinBroadcastResponse:
        message = policy_pb2.JoinBroadcastRequest(
            server_id=self._server_id,
            weights=codec.weight_request_to_proto(request),
            group=self._group[0] if self._group is not None else 0,
        )
        try:
            with mapped_errors(f"JoinBroadcast at {self._address}"):
                seat = await self._stub.JoinBroadcast(message, timeout=self._timeout_seconds)
        except PreconditionError as error:  # which the call, unlike an UNAVAILABLE, does not repeat
            raise UnavailableError(error.message) from error
        if not 0 < seat.rank < seat.world_size:
            raise InvalidDataError(f"JoinBroadcast at {self._address}: rank {seat.rank} of {seat.world_size} is none")
        return seat

    def gave_trouble(self, announcement: Announcement) -> None:
        log.info("%s is fetched without a broadcast", announcement.version)
        self._spoilt = announcement.version
        self._group = None

    def close(self) -> None:
        self._group = None
