"""Weight bytes to servers on this host, over ZeroMQ.

A ROUTER socket on an ipc endpoint in a folder that only this user can enter. A request is [b"leeway/1", serialized
PolicyVersion]; the reply is [b"ok", one frame per tensor in manifest order], or [b"gone"] when that version is no
longer the newest. The receiver checks every digest, so a wrong byte is noticed, never served.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from pathlib import Path
from typing import Final

import zmq
import zmq.asyncio

from leeway import codec
from leeway.errors import InvalidDataError
from leeway.metrics import LearnerMetrics
from leeway.rpc import cancel_and_wait
from leeway.types import WeightSnapshot
from leeway.v1 import common_pb2

log = logging.getLogger(__name__)

PROTOCOL: Final = b"leeway/1"


class LocalWeights:
    """Answers weight requests of this host with the newest snapshot."""

    def __init__(self, metrics: LearnerMetrics) -> None:
        self._metrics = metrics
        self._folder = tempfile.TemporaryDirectory(prefix="leeway-weights-")  # mode 0700
        self.endpoint = f"ipc://{Path(self._folder.name) / 'weights'}"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 4096)  # of requests; replies may be of any size
        self._socket.bind(self.endpoint)
        self._snapshot: WeightSnapshot | None = None
        self._task = asyncio.create_task(self._answer_requests())

    def serve(self, snapshot: WeightSnapshot) -> None:
        """Answer with this snapshot from now on."""
        self._snapshot = snapshot

    async def aclose(self) -> None:
        """Stop answering and remove the endpoint."""
        await cancel_and_wait(self._task)
        self._socket.close()
        self._context.term()
        self._folder.cleanup()

    async def _answer_requests(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            reply = self._reply(frames[1:])
            await self._socket.send_multipart([frames[0], *reply], copy=False)

    def _reply(self, request: list[bytes]) -> list[bytes | memoryview]:
        try:
            if len(request) != 2 or request[0] != PROTOCOL:
                raise InvalidDataError("not a weight request")
            version = codec.version_from_proto(codec.parse(common_pb2.PolicyVersion, request[1]))
        except InvalidDataError as error:
            log.warning("refused a request on %s: %s", self.endpoint, error.message)
            return [b"gone"]
        snapshot = self._snapshot
        if snapshot is None or snapshot.version != version:
            return [b"gone"]
        self._metrics.published_bytes.labels("zmq").inc(snapshot.manifest.size_bytes)
        return [b"ok", *snapshot.buffers]
