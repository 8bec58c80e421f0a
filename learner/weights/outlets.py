"""The ways that weight bytes leave the learner. Control always travels over WatchPolicy.

ZeroMQ: a ROUTER socket on an ipc endpoint in a folder that only this user can enter. policy.proto says at
`local_endpoint` what a request and its answer are: the answer repeats the request, so that a receiver with several in
flight knows which one it belongs to. The receiver checks every digest, so a wrong byte is noticed, never served.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

import zmq
import zmq.asyncio

from learner.weights.publication import Part, Publication, kind_of
from leeway import codec
from leeway.errors import InvalidDataError, NotFoundError
from leeway.rpc import BULK_PIECE_BYTES, cancel_and_wait
from leeway.service.metrics import LearnerMetrics
from leeway.types import WeightRequest
from leeway.v1 import policy_pb2

log = logging.getLogger(__name__)

PROTOCOL: Final = b"leeway/2"


class WeightOutlet(Protocol):
    """Answers requests for the parts of the newest publication, and of no other."""

    def offer(self, publication: Publication) -> None:
        """Answer with this one from now on."""
        ...

    def announce(self, message: policy_pb2.WatchPolicyResponse, hello: policy_pb2.PolicyWatcher) -> None:
        """Write into an announcement how the server that said hello reaches this outlet, if it can."""
        ...

    async def aclose(self) -> None:
        """Stop answering."""
        ...


@dataclass(frozen=True, slots=True)
class Seat:
    """A place in a broadcast: rank `rank` of `world_size` in a group; the learner is rank 0."""

    group: int
    rank: int
    world_size: int
    patience_seconds: float  # longest wait for the group to form, and for each piece


@runtime_checkable
class Broadcasts(WeightOutlet, Protocol):
    """An outlet that sends to several servers at once."""

    library: str
    """Servers with another one cannot take part."""

    def expect(self, server_ids: frozenset[str]) -> None:
        """The servers that will ask for the newest publication, if nothing happens to them."""
        ...

    async def join(self, server_id: str, request: WeightRequest, group: int) -> Seat:
        """A seat in the next broadcast of the requested parts, when the others have come or the wait is over.

        Args:
            server_id: who asks.
            request: the parts; its range is not used.
            group: that the server is still part of; 0 for none.

        Raises:
            NotFoundError: as Publication.parts; also when a newer version is published before the broadcast begins.
        """
        ...


class GrpcOutlet:
    """The bytes of PolicyService.FetchWeights, to servers anywhere."""

    def __init__(self, metrics: LearnerMetrics) -> None:
        self._metrics = metrics
        self._publication: Publication | None = None

    def offer(self, publication: Publication) -> None:
        self._publication = publication

    def pieces(self, request: WeightRequest) -> Iterator[bytes]:
        """The parts' bytes, in pieces that fit into messages.

        Raises:
            NotFoundError, InvalidDataError: as Publication.parts.
        """
        if self._publication is None:
            raise NotFoundError("nothing is published yet; wait for the first announcement")
        sent = self._metrics.published_bytes.labels("grpc", kind_of(request))
        for part in self._publication.parts(request):
            view = memoryview(part)
            for start in range(0, len(view), BULK_PIECE_BYTES):
                piece = bytes(view[start : start + BULK_PIECE_BYTES])
                sent.inc(len(piece))
                yield piece


class ZmqOutlet:
    """Implements WeightOutlet for servers on this host."""

    def __init__(self, metrics: LearnerMetrics, _host: str = "", _patience_seconds: float = 0.0) -> None:
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

    def announce(self, message: policy_pb2.WatchPolicyResponse, hello: policy_pb2.PolicyWatcher) -> None:
        message.local_endpoint = self.endpoint

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
