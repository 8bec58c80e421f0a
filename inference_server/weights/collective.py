"""Weights from a learner that broadcasts them to all servers at once, over torch.distributed.

    JoinBroadcast ──> seat ──> group: the one held, or a new one ──> pieces ──> parts, checked while the next come

The bytes land in one piece of host memory, of which the parts are views; it is used again when no engine and no held
snapshot refers to them any more. A group that broke is dropped; the learner forms another one for the next version.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import threading
import weakref
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

import numpy as np

from inference_server.weights.transports import Announcement, Part, WeightSource
from leeway import codec
from leeway.errors import InvalidDataError, PreconditionError, UnavailableError
from leeway.rpc import mapped_errors
from leeway.types import PolicyVersion, WeightRequest
from leeway.v1 import policy_pb2
from leeway.weights.broadcast import LIBRARY, BroadcastGroup

log = logging.getLogger(__name__)

_SEAT_SECONDS: Final = 60.0


class BroadcastTransport:
    """Implements WeightTransport; groups form at the announced port of the learner's host."""

    name = "collective"

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._group: tuple[int, BroadcastGroup] | None = None  # with its number
        self._faulty: PolicyVersion | None = None
        self._memory = HostMemory()

    def greet(self, hello: policy_pb2.PolicyWatcher) -> None:
        hello.broadcast_library = LIBRARY

    def reaches(self, announcement: Announcement) -> bool:
        return announcement.broadcast_port != 0 and announcement.version != self._faulty

    async def fetch(
        self, announcement: Announcement, request: WeightRequest, sizes: Sequence[int]
    ) -> AsyncGenerator[list[Part]]:
        seat = await self._seat(request)
        held, self._group = self._group, None
        group = held[1] if held is not None and held[0] == seat.group else None
        del held
        if group is None:
            address = (self._source.address.rpartition(":")[0], announcement.broadcast_port)
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
            server_id=self._source.server_id,
            weights=codec.weight_request_to_proto(request),
            group=self._group[0] if self._group is not None else 0,
        )
        try:
            with mapped_errors(f"JoinBroadcast at {self._source.address}"):
                seat = await self._source.stub.JoinBroadcast(message, timeout=_SEAT_SECONDS)
        except PreconditionError as error:  # which the call, unlike an UNAVAILABLE, does not repeat
            raise UnavailableError(error.message) from error
        if not 0 < seat.rank < seat.world_size:
            where = f"JoinBroadcast at {self._source.address}"
            raise InvalidDataError(f"{where}: there is no rank {seat.rank} of {seat.world_size}")
        return seat

    def gave_trouble(self, announcement: Announcement) -> None:
        log.info("%s is fetched without a broadcast", announcement.version)
        self._faulty = announcement.version
        self._group = None

    def close(self) -> None:
        self._group = None


class HostMemory:
    """Regions of anonymous memory that are used again: touching fresh pages costs about as much as receiving into them.

    A region is handed out as a view and comes back by itself when nothing refers to it any more, not even a slice of a
    slice. So bytes that an engine or a held snapshot still uses are never overwritten.

    Args:
        keep: free regions that are kept; more are given back to the system.
    """

    def __init__(self, keep: int = 1) -> None:
        self._keep = keep
        self._free: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def take(self, size_bytes: int) -> memoryview:
        """Writable bytes, with whatever was in them before."""
        with self._lock:
            region = next((region for region in self._free if len(region) >= size_bytes), None)
            if region is not None:
                self._free.remove(region)
        if region is None:
            region = mmap.mmap(-1, max(size_bytes, 1))
        view: Any = np.frombuffer(region, np.uint8, size_bytes)
        weakref.finalize(view, self._take_back, region).atexit = False
        return memoryview(view)

    def _take_back(self, region: mmap.mmap) -> None:
        with self._lock:
            self._free.append(region)
            del self._free[: len(self._free) - self._keep]
