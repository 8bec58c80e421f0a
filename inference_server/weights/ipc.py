"""Weights from a learner on this host, over ZeroMQ: a DEALER socket on the announced ipc endpoint.

Parts are asked for in ranges, a few of them at a time, so that a range is checked while the next one is copied. A
socket lives for one fetch: a late answer to an abandoned one can never be taken for the next.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import zmq
import zmq.asyncio

from inference_server.weights.transport import Announcement, Part, batches
from leeway import codec
from leeway.errors import DeadlineError, InvalidDataError, NotFoundError, UnavailableError
from leeway.types import WeightRequest

_PROTOCOL: Final = b"leeway/2"
_IPC: Final = "ipc://"
_REQUESTS_ON_THEIR_WAY: Final = 3

log = logging.getLogger(__name__)


class IpcWeights:
    """Implements WeightTransport.

    Args:
        timeout_seconds: longest wait for one answer, beside a second per 100 MB.
    """

    name = "zmq"

    def __init__(self, timeout_seconds: float = 5.0) -> None:
        self.timeout_seconds = timeout_seconds
        self._unusable: set[str] = set()
        self._context = zmq.asyncio.Context()

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
                    while waiting and len(asked) < _REQUESTS_ON_THEIR_WAY:
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
