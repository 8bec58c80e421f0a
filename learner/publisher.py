"""Publishing weights: one snapshot at a time, announced to every server, fetched by each at its own pace.

    loop ── publish(snapshot) ──> newest snapshot ── condition ──> WatchPolicy stream of each server: announcement out,
                 ▲                     │                                      acknowledgement or refusal back in
            hold / release             ├──> FetchWeights (gRPC stream): bytes to servers beyond this host
        (an evaluation keeps           └──> local weights (ZeroMQ ROUTER on ipc): bytes to servers on this host
         servers at its version)

`publish` never waits for a server. A server that falls behind skips what was overtaken; one that joins late gets the
newest announcement first. While the publication is held, `publish` keeps the newest snapshot back and `release`
announces it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from learner.local_weights import LocalWeights
from leeway import codec
from leeway.errors import InvalidDataError, NotFoundError, PreconditionError
from leeway.metrics import LearnerMetrics
from leeway.rpc import BULK_PIECE_BYTES, cancel_and_wait
from leeway.types import ModelSignature, PolicyVersion, WeightSnapshot
from leeway.v1 import policy_pb2, policy_pb2_grpc

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Server:
    """What is known of a connected server."""

    version: PolicyVersion | None = None
    refusal: str = ""


@dataclass(slots=True)
class PushTimes:
    """Announcement to acknowledgement, in seconds, over all versions and servers."""

    seconds: list[float] = field(default_factory=list[float])


class Publisher(policy_pb2_grpc.PolicyServiceServicer):
    """The PolicyService of one learner incarnation."""

    def __init__(
        self, run: str, signature: ModelSignature, metrics: LearnerMetrics, local: LocalWeights | None
    ) -> None:
        self._run = run
        self._signature = signature
        self._metrics = metrics
        self._local = local
        self._newest: WeightSnapshot | None = None
        self._announced_at: dict[PolicyVersion, float] = {}
        self._held: WeightSnapshot | None = None
        self._holds = 0
        self._changed = asyncio.Condition()
        self._servers: dict[str, _Server] = {}
        self.push_times = PushTimes()

    @property
    def servers(self) -> dict[str, PolicyVersion | None]:
        """The version each connected server has acknowledged."""
        return {server_id: server.version for server_id, server in self._servers.items()}

    async def publish(self, snapshot: WeightSnapshot) -> None:
        """Announce a registered version; while held, keep it back instead."""
        if self._holds:
            self._held = snapshot
            return
        await self._announce(snapshot)

    def hold(self) -> None:
        """Keep newer versions back until `release`."""
        self._holds += 1

    async def release(self) -> None:
        """End a hold and announce the newest version that was kept back."""
        self._holds -= 1
        if not self._holds and self._held is not None:
            snapshot, self._held = self._held, None
            await self._announce(snapshot)

    async def _announce(self, snapshot: WeightSnapshot) -> None:
        self._newest = snapshot
        self._announced_at = {snapshot.version: time.monotonic()}
        if self._local is not None:
            self._local.serve(snapshot)
        async with self._changed:
            self._changed.notify_all()

    # PolicyService

    async def WatchPolicy(
        self,
        request_iterator: AsyncIterator[policy_pb2.WatchPolicyRequest],
        context: grpc.aio.ServicerContext[policy_pb2.WatchPolicyRequest, policy_pb2.WatchPolicyResponse],
    ) -> AsyncIterator[policy_pb2.WatchPolicyResponse]:
        """See policy.proto."""
        requests = aiter(request_iterator)
        server_id = self._admit(await anext(requests, None))
        server = _Server()
        self._servers[server_id] = server
        log.info("%s watches the policy", server_id)
        answers = asyncio.create_task(self._read_answers(server_id, server, requests))
        announced: PolicyVersion | None = None
        try:
            while (snapshot := await self._next_snapshot(announced, answers)) is not None:
                announced = snapshot.version
                yield self._announcement(snapshot)
            await answers
        finally:
            await cancel_and_wait(answers)
            if self._servers.get(server_id) is server:
                del self._servers[server_id]
            log.info("%s no longer watches the policy", server_id)

    async def FetchWeights(
        self,
        request: policy_pb2.FetchWeightsRequest,
        context: grpc.aio.ServicerContext[policy_pb2.FetchWeightsRequest, policy_pb2.FetchWeightsResponse],
    ) -> AsyncIterator[policy_pb2.FetchWeightsResponse]:
        """See policy.proto."""
        version = codec.version_from_proto(request.version)
        snapshot = self._newest
        if snapshot is None or snapshot.version != version:
            raise NotFoundError(f"{version} is no longer the newest version; wait for the next announcement")
        for buffer in snapshot.buffers:
            view = memoryview(buffer)
            for start in range(0, len(view), BULK_PIECE_BYTES):
                piece = bytes(view[start : start + BULK_PIECE_BYTES])
                self._metrics.published_bytes.labels("grpc").inc(len(piece))
                yield policy_pb2.FetchWeightsResponse(data=piece)

    async def _next_snapshot(
        self, announced: PolicyVersion | None, answers: asyncio.Task[None]
    ) -> WeightSnapshot | None:
        """Wait for a version newer than `announced`; None when the server's side of the stream has ended."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: answers.done() or (self._newest is not None and self._newest.version != announced)
            )
        return None if answers.done() else self._newest

    def _admit(self, request: policy_pb2.WatchPolicyRequest | None) -> str:
        if request is None or not request.HasField("hello"):
            raise InvalidDataError("a WatchPolicy stream begins with hello")
        hello = request.hello
        if hello.run != self._run:
            raise PreconditionError(f"{hello.server_id} belongs to run {hello.run!r}, this learner to {self._run!r}")
        signature = codec.signature_from_proto(hello.signature)
        if signature.tokenizer_digest != self._signature.tokenizer_digest:
            raise PreconditionError(
                f"{hello.server_id}: its tokenizer differs from the learner's; use the same [model]"
            )
        if signature != self._signature:
            raise PreconditionError(f"{hello.server_id}: its model differs from the learner's; use the same [model]")
        return hello.server_id

    def _announcement(self, snapshot: WeightSnapshot) -> policy_pb2.WatchPolicyResponse:
        return policy_pb2.WatchPolicyResponse(
            publisher_epoch=snapshot.publisher_epoch,
            version=codec.version_to_proto(snapshot.version),
            manifest=codec.manifest_to_proto(snapshot.manifest),
            local_endpoint=self._local.endpoint if self._local is not None else "",
        )

    async def _read_answers(
        self, server_id: str, server: _Server, requests: AsyncIterator[policy_pb2.WatchPolicyRequest]
    ) -> None:
        try:
            async for request in requests:
                match request.WhichOneof("message"):
                    case "acknowledgement":
                        self._acknowledged(server_id, server, request.acknowledgement)
                    case "refusal":
                        server.refusal = request.refusal.message
                        log.error("%s is fenced: it cannot apply the new weights: %s", server_id, server.refusal)
                    case _:
                        raise InvalidDataError(f"{server_id}: after hello come acknowledgements and refusals only")
        finally:
            async with self._changed:
                self._changed.notify_all()

    def _acknowledged(self, server_id: str, server: _Server, message: policy_pb2.PolicyAcknowledgement) -> None:
        server.version = codec.version_from_proto(message.version)
        server.refusal = ""
        self._metrics.server_policy_step.labels(server_id).set(server.version.step)
        announced_at = self._announced_at.get(server.version)
        if announced_at is not None:
            self.push_times.seconds.append(time.monotonic() - announced_at)
