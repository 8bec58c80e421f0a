"""Publishing weights: one snapshot at a time, announced to every server, fetched by each at its own pace.

    loop ── publish(snapshot) ──> delta from the one before ──> publication ── condition ──> WatchPolicy stream of each
                 ▲                                                  │         server: announcement out, acknowledgement
            hold / release                                          │         or refusal back in
        (an evaluation keeps                                        │
         servers at its version)        the outlets answer requests ├──> gRPC: servers anywhere
                                        for it and no other         ├──> ZeroMQ: servers on this host
                                                                    └──> broadcasts: all servers at once

`publish` waits for its delta, never for a server. A server that falls behind skips what was overtaken and takes several
deltas at once; one that joins late gets the newest announcement first. While the publication is held, `publish` keeps
the newest snapshot back and `release` announces it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import grpc

from learner.weights.outlets import Broadcasts, GrpcOutlet, WeightOutlet
from learner.weights.publication import Publication
from leeway import codec
from leeway.errors import InvalidDataError, PreconditionError
from leeway.rpc import cancel_and_wait
from leeway.service.metrics import LearnerMetrics
from leeway.types import ModelSignature, PolicyVersion, WeightSnapshot
from leeway.v1 import policy_pb2, policy_pb2_grpc

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Server:
    """State of a connected server."""

    version: PolicyVersion | None = None
    refusal: str = ""
    takes_broadcasts: bool = False


class Publisher(policy_pb2_grpc.PolicyServiceServicer):
    """The PolicyService of one learner incarnation.

    Args:
        run: name of the run.
        signature: of the model whose weights are published.
        metrics: shows bytes sent and versions acknowledged.
        outlets: ways for the bytes beside gRPC, at most one of them Broadcasts.
        max_delta_chain: newest versions from which deltas are offered.
    """

    def __init__(
        self,
        run: str,
        signature: ModelSignature,
        metrics: LearnerMetrics,
        outlets: Sequence[WeightOutlet] = (),
        max_delta_chain: int = 8,
    ) -> None:
        self._run = run
        self._signature = signature
        self._metrics = metrics
        self._grpc = GrpcOutlet(metrics)
        self._outlets = outlets
        self._broadcasts = next((outlet for outlet in outlets if isinstance(outlet, Broadcasts)), None)
        self._max_delta_chain = max_delta_chain
        self._newest: Publication | None = None
        self._announcing = asyncio.Lock()
        self._announced_at: dict[PolicyVersion, float] = {}
        self._held: WeightSnapshot | None = None
        self._holds = 0
        self._changed = asyncio.Condition()
        self._servers: dict[str, _Server] = {}
        self.push_seconds: list[float] = []
        """Announcement to acknowledgement, over all versions and servers."""

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
        async with self._announcing:  # in the order in which they come
            publication = await self._publication(snapshot)
            self._newest = publication
            self._announced_at = {snapshot.version: time.monotonic()}
            for outlet in (self._grpc, *self._outlets):
                outlet.offer(publication)
            self._expect()
            async with self._changed:
                self._changed.notify_all()

    async def _publication(self, snapshot: WeightSnapshot) -> Publication:
        if self._newest is None:
            return Publication(snapshot)
        began = time.monotonic()
        publication = await asyncio.to_thread(self._newest.followed_by, snapshot, self._max_delta_chain)
        self._metrics.delta_seconds.observe(time.monotonic() - began)
        newest_bytes = publication.deltas[-1].size_bytes if publication.deltas else snapshot.manifest.size_bytes
        self._metrics.delta_ratio.set(newest_bytes / max(snapshot.manifest.size_bytes, 1))
        return publication

    # PolicyService

    async def WatchPolicy(
        self,
        request_iterator: AsyncIterator[policy_pb2.WatchPolicyRequest],
        context: grpc.aio.ServicerContext[policy_pb2.WatchPolicyRequest, policy_pb2.WatchPolicyResponse],
    ) -> AsyncIterator[policy_pb2.WatchPolicyResponse]:
        """See policy.proto."""
        requests = aiter(request_iterator)
        hello = self._admit(await anext(requests, None))
        server_id = hello.server_id
        server = _Server(takes_broadcasts=self._takes_broadcasts(hello))
        self._servers[server_id] = server
        self._expect()
        log.info("%s watches the policy", server_id)
        answers = asyncio.create_task(self._read_answers(server_id, server, requests))
        announced: PolicyVersion | None = None
        try:
            while (publication := await self._next_publication(announced, answers)) is not None:
                announced = publication.snapshot.version
                yield self._announcement(publication, hello)
            await answers
        finally:
            await cancel_and_wait(answers)
            if self._servers.get(server_id) is server:
                del self._servers[server_id]
                self._count_refusing()
                self._expect()
            log.info("%s no longer watches the policy", server_id)

    async def FetchWeights(
        self,
        request: policy_pb2.FetchWeightsRequest,
        context: grpc.aio.ServicerContext[policy_pb2.FetchWeightsRequest, policy_pb2.FetchWeightsResponse],
    ) -> AsyncIterator[policy_pb2.FetchWeightsResponse]:
        """See policy.proto."""
        for piece in self._grpc.pieces(codec.weight_request_from_proto(request)):
            yield policy_pb2.FetchWeightsResponse(data=piece)

    async def JoinBroadcast(
        self,
        request: policy_pb2.JoinBroadcastRequest,
        context: grpc.aio.ServicerContext[policy_pb2.JoinBroadcastRequest, policy_pb2.JoinBroadcastResponse],
    ) -> policy_pb2.JoinBroadcastResponse:
        """See policy.proto."""
        if self._broadcasts is None:
            raise PreconditionError("this learner does not broadcast; set the same network.weights for both")
        wanted = codec.weight_request_from_proto(request.weights)
        seat = await self._broadcasts.join(request.server_id, wanted, request.group)
        return policy_pb2.JoinBroadcastResponse(
            group=seat.group,
            rank=seat.rank,
            world_size=seat.world_size,
            patience=codec.duration_to_proto(seat.patience_seconds),
        )

    async def _next_publication(
        self, announced: PolicyVersion | None, answers: asyncio.Task[None]
    ) -> Publication | None:
        """Wait for a version newer than `announced`; None when the server's side of the stream has ended."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: answers.done() or (self._newest is not None and self._newest.snapshot.version != announced)
            )
        return None if answers.done() else self._newest

    def _admit(self, request: policy_pb2.WatchPolicyRequest | None) -> policy_pb2.PolicyWatcher:
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
        return hello

    def _takes_broadcasts(self, hello: policy_pb2.PolicyWatcher) -> bool:
        if self._broadcasts is None or hello.broadcast_library == self._broadcasts.library:
            return self._broadcasts is not None
        log.warning(
            "%s takes no part in broadcasts: it has %s, this learner %s",
            hello.server_id,
            hello.broadcast_library or "no library for them; set the same network.weights there",
            self._broadcasts.library,
        )
        return False

    def _expect(self) -> None:
        """Tell who will ask for a seat in the newest publication's broadcast."""
        if self._broadcasts is None or self._newest is None:
            return
        newest = self._newest.snapshot.version
        asking = [
            name for name, server in self._servers.items() if server.takes_broadcasts and server.version != newest
        ]
        self._broadcasts.expect(frozenset(asking))

    def _announcement(
        self, publication: Publication, hello: policy_pb2.PolicyWatcher
    ) -> policy_pb2.WatchPolicyResponse:
        snapshot = publication.snapshot
        message = policy_pb2.WatchPolicyResponse(
            publisher_epoch=snapshot.publisher_epoch,
            version=codec.version_to_proto(snapshot.version),
            manifest=codec.manifest_to_proto(snapshot.manifest),
            deltas=map(codec.delta_to_proto, publication.deltas),
        )
        for outlet in self._outlets:
            outlet.announce(message, hello)
        return message

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
                        self._count_refusing()
                        log.error("%s is fenced: it cannot apply the new weights: %s", server_id, server.refusal)
                    case _:
                        raise InvalidDataError(f"{server_id}: after hello come acknowledgements and refusals only")
        finally:
            async with self._changed:
                self._changed.notify_all()

    def _acknowledged(self, server_id: str, server: _Server, message: policy_pb2.PolicyAcknowledgement) -> None:
        server.version = codec.version_from_proto(message.version)
        server.refusal = ""
        self._count_refusing()
        self._expect()
        self._metrics.server_policy_step.labels(server_id).set(server.version.step)
        announced_at = self._announced_at.get(server.version)
        if announced_at is not None:
            self.push_seconds.append(time.monotonic() - announced_at)

    def _count_refusing(self) -> None:
        self._metrics.refusing_servers.set(sum(bool(server.refusal) for server in self._servers.values()))
