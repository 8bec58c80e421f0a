"""Weight bytes to all servers at once: broadcasts over torch.distributed.

    JoinBroadcast of each server ──> round of the parts it asks for ── all expected came, or the wait is over ──>
         seats (ranks) for those who came ──> group: the last one if its peers are the same, else a new one ──> pieces

A round is for one version and one base: servers that need the tensors and servers that need deltas are in different
ones. Rounds go one after the other; a server that asks during one is in the next. A newer publication ends rounds
that have not begun. What began is finished, or fails for all of its servers, which then fetch over gRPC: at once when
one of them dies and the library notices, after `patience_seconds` when one is silent. The learner's loop never waits
for any of it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Final

from learner.weights.outlets import Seat
from learner.weights.publication import Part, Publication, kind_of
from leeway.errors import LeewayError, NotFoundError, PreconditionError, UnavailableError
from leeway.rpc import cancel_and_wait
from leeway.service.metrics import LearnerMetrics
from leeway.types import WeightRequest
from leeway.v1 import policy_pb2
from leeway.weights.broadcast import LIBRARY, BroadcastGroup, Rendezvous

log = logging.getLogger(__name__)

_GATHER_SECONDS: Final = 0.5
_NO_MORE: Final = "this learner broadcasts no more; fetch the weights"


@dataclass(slots=True)
class _BroadcastPeer:
    """A server that has asked for a seat."""

    group: int  # that it is still part of
    seat: asyncio.Future[Seat]


@dataclass(slots=True)
class _Round:
    """Servers that wait for the same parts."""

    request: WeightRequest
    parts: Sequence[Part]
    peers: dict[str, _BroadcastPeer] = field(default_factory=dict[str, _BroadcastPeer])


class BroadcastOutlet:
    """Implements `learner.weights.outlets.Broadcasts`.

    Args:
        metrics: shows bytes sent and broadcasts that failed.
        host: address of this learner that servers reach; groups meet at a port of it.
        patience_seconds: longest silence of a peer before a broadcast is given up.
        gather_seconds: longest wait for the expected servers after the first has asked.

    Raises:
        UnavailableError: the host cannot be listened on.
    """

    def __init__(
        self,
        metrics: LearnerMetrics,
        host: str,
        patience_seconds: float = 10.0,
        gather_seconds: float = _GATHER_SECONDS,
    ) -> None:
        self._metrics = metrics
        self._patience_seconds = patience_seconds
        self._gather_seconds = gather_seconds
        self.library = LIBRARY
        self._rendezvous = Rendezvous(host)
        self._publication: Publication | None = None
        self._expected: frozenset[str] = frozenset()
        self._asked: set[str] = set()  # for something of the newest publication
        self._rounds: list[_Round] = []  # that have not begun
        self._changed = asyncio.Event()
        self._group: tuple[int, BroadcastGroup] | None = None  # with its number
        self._closing = False
        self._task = asyncio.create_task(self._broadcast_forever(), name="broadcasts")
        self._task.add_done_callback(self._ended)

    def offer(self, publication: Publication) -> None:
        self._publication = publication
        self._asked.clear()
        self._refuse_waiting(NotFoundError("a newer version is published; wait for its announcement"))

    def announce(self, message: policy_pb2.WatchPolicyResponse, hello: policy_pb2.PolicyWatcher) -> None:
        message.broadcast_port = self._rendezvous.address[1] if hello.broadcast_library == self.library else 0

    def expect(self, server_ids: frozenset[str]) -> None:
        self._expected = server_ids
        self._changed.set()

    async def join(self, server_id: str, request: WeightRequest, group: int) -> Seat:
        if self._task.done():
            raise PreconditionError(_NO_MORE)
        if self._publication is None:
            raise NotFoundError("nothing is published yet; wait for the first announcement")
        whole = replace(request, first_part=0, end_part=0)
        parts = self._publication.parts(whole)
        peer = _BroadcastPeer(group, asyncio.get_running_loop().create_future())
        joined = next((waiting for waiting in self._rounds if waiting.request == whole), None)
        if joined is None:
            joined = _Round(whole, parts)
            self._rounds.append(joined)
        joined.peers[server_id] = peer
        self._asked.add(server_id)
        self._changed.set()
        try:
            return await peer.seat
        finally:
            if joined.peers.get(server_id) is peer:
                del joined.peers[server_id]

    async def aclose(self) -> None:
        """Stop broadcasting; a piece that is being sent ends within its patience."""
        self._closing = True
        await cancel_and_wait(self._task)
        self._group = None

    def _ended(self, task: asyncio.Task[None]) -> None:
        """The task has ended, however it did: nobody waits for it any more."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("broadcasts have ended, servers fetch over gRPC from now on: %r", error)
        self._refuse_waiting(PreconditionError(_NO_MORE))

    def _refuse_waiting(self, error: LeewayError) -> None:
        for waiting in self._rounds:
            for peer in waiting.peers.values():
                if not peer.seat.done():
                    peer.seat.set_exception(error)
        self._rounds.clear()

    async def _broadcast_forever(self) -> None:
        while True:
            await self._until(lambda: bool(self._rounds))
            await self._gather()
            if self._rounds:
                await self._broadcast(self._rounds.pop(0))

    async def _gather(self) -> None:
        """Wait until every expected server has asked for something, but not for long."""
        try:
            async with asyncio.timeout(self._gather_seconds):
                await self._until(lambda: self._expected <= self._asked)
        except TimeoutError:
            log.info("a broadcast begins without %s", ", ".join(sorted(self._expected - self._asked)))

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def _broadcast(self, ready: _Round) -> None:
        peers = {name: peer for name, peer in sorted(ready.peers.items()) if not peer.seat.done()}
        if not peers:
            return
        same = self._group is not None and {self._group[0]} == {peer.group for peer in peers.values()}
        size = len(peers) + 1
        kept = self._group if self._group is not None and same and self._group[1].size == size else None
        number = kept[0] if kept else secrets.randbits(63)
        self._group = None
        for rank, peer in enumerate(peers.values(), start=1):
            peer.seat.set_result(Seat(number, rank, size, self._patience_seconds))
        try:
            group, sent_bytes = await asyncio.to_thread(self._send, kept[1] if kept else None, number, size, ready)
        except LeewayError as error:
            log.warning(
                "the broadcast of %s to %s fails (%s); they fetch it over gRPC",
                ready.request.version,
                ", ".join(peers),
                error.message,
            )
            self._metrics.failed_broadcasts.inc()
            return
        if kept is None:
            log.info("a group of %d for broadcasts: the learner and %s", size, ", ".join(peers))
        self._group = number, group
        self._metrics.published_bytes.labels("collective", kind_of(ready.request)).inc(sent_bytes)

    def _pieces(self, group: BroadcastGroup, parts: Sequence[Part]) -> Generator[int]:
        """Send, and yield the size of each piece in bytes."""
        return group.send(parts)

    def _send(self, group: BroadcastGroup | None, number: int, size: int, ready: _Round) -> tuple[BroadcastGroup, int]:
        if group is None:
            group = BroadcastGroup(self._rendezvous.address, number, 0, size, self._patience_seconds)
        sent_bytes = 0
        try:
            with closing(self._pieces(group, ready.parts)) as pieces:
                for piece_bytes in pieces:
                    sent_bytes += piece_bytes
                    if self._closing:
                        raise UnavailableError("the learner stops")
        except BaseException:
            group.close()
            raise
        return group, sent_bytes
