"""Weight bytes to servers on this host, over ZeroMQ.

A ROUTER socket on an ipc endpoint in a folder that only this user can enter. policy.proto says at `local_endpoint` what
a request and its answer are: the answer repeats the request, so that a receiver with several on their way knows which
one it belongs to. The receiver checks every digest, so a wrong byte is noticed, never served.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from pathlib import Path
from typing import Final

import zmq
import zmq.asyncio

from learner.weights.publication import Part, Publication, kind_of
from leeway import codec
from leeway.errors import InvalidDataError, NotFoundError
from leeway.rpc import cancel_and_wait
from leeway.service.metrics import LearnerMetrics
from leeway.v1 import policy_pb2

log = logging.getLogger(__name__)

PROTOCOL: Final = b"leeway/2"


class LocalWeights:
    """Answers weight requests of this host; implements `learner.weights.outlet.WeightOutlet`."""

    def __init__(self, metrics: LearnerMetrics) -> None:
        self._metrics = metrics
        self._folder = tempfile.TemporaryDirectory(prefix="leeway-weights-")  # mode 0700
        self.endpoint = f"ipc://{Path(self._folder.name) / 'weights'}"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 4096)  # of requests; replies may be of any size
        self._socket.bind(self.endpoint)
        self._publication: Publication | None = None
        self._task = asyncio.create_task(self._answer_requests())

    def offer(self, publication: Publication) -> None:
        self._publication = publication

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

    def _reply(self, request: list[bytes]) -> list[Part]:
        try:
            if len(request) != 2 or request[0] != PROTOCOL:
                raise InvalidDataError("not a weight request")
            wanted = codec.weight_request_from_proto(codec.parse(policy_pb2.FetchWeightsRequest, request[1]))
            if self._publication is None:
                raise NotFoundError("nothing is published yet")
            parts = self._publication.parts(wanted)
        except NotFoundError:
            return [b"gone", request[1]]
        except InvalidDataError as error:
            log.warning("refused a request on %s: %s", self.endpoint, error.message)
            return [b"gone", *request[1:2]]
        self._metrics.published_bytes.labels("zmq", kind_of(wanted)).inc(sum(map(len, parts)))
        return [b"ok", request[1], *parts]
