"""A learner whose pushes go wrong: bytes, messages, deltas and announcements are corrupted with a given probability.

It can also be told to die at a given place of a push: `Faults.dies_at`.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from prometheus_client import CollectorRegistry

from learner.weights.collective import BroadcastOutlet
from learner.weights.outlets import GrpcOutlet, ZmqOutlet
from learner.weights.publication import Part, Publication
from learner.weights.publisher import Publisher
from leeway import arithmetic
from leeway.errors import UnavailableError
from leeway.rpc import RunningServer, Security, start_server
from leeway.service.metrics import LearnerMetrics
from leeway.types import ModelSignature, WeightSnapshot
from leeway.v1 import policy_pb2, policy_pb2_grpc
from leeway.weights.broadcast import BroadcastGroup
from tests.push.history import RUN

_PIECE_BYTES = 40_000
Place = Literal["announce", "transfer", "acknowledge"]
PLACES: tuple[Place, ...] = ("announce", "transfer", "acknowledge")


class Faults:
    """When, and what: reproducible from a seed."""

    def __init__(self, seed: int | str, probability: float) -> None:
        self.random = random.Random(seed)
        self.probability = probability
        self.counts: Counter[str] = Counter()
        self.dies_at: Place | None = None

    def may_die(self, place: Place) -> None:
        """SIGKILL this process if it is to die here."""
        if self.dies_at == place:
            os.kill(os.getpid(), signal.SIGKILL)

    def strikes(self, what: str) -> bool:
        """Whether something goes wrong here."""
        if self.random.random() >= self.probability:
            return False
        self.counts[what] += 1
        return True

    def corrupted(self, data: Part) -> bytes:
        """One bit differs, or the end is missing, or there is more of it."""
        changed = bytearray(data)
        kind = self.random.choice(["flip", "cut", "more"])
        if kind == "flip" and changed:
            changed[self.random.randrange(len(changed))] ^= 1 << self.random.randrange(8)
        elif kind == "cut" and changed:
            del changed[self.random.randrange(len(changed)) :]
        else:
            changed += b"\0"
        return bytes(changed)

    def disordered(self, parts: Sequence[Any]) -> list[Any]:
        """Two are swapped, or one comes twice, or one not at all."""
        changed = list(parts)
        if changed:
            one, other = (self.random.randrange(len(changed)) for _ in range(2))
            kind = self.random.choice(["swap", "twice", "lost"])
            if kind == "swap":
                changed[one], changed[other] = changed[other], changed[one]
            elif kind == "twice":
                changed.insert(one, changed[other])
            else:
                del changed[one]
        return changed


class FaultyZmq(ZmqOutlet):
    """Answers over ZeroMQ, some of them wrongly."""

    def __init__(self, metrics: LearnerMetrics, faults: Faults) -> None:
        self._faults = faults
        super().__init__(metrics)

    def _reply(self, request: list[bytes]) -> list[Part]:
        reply = super()._reply(request)
        self._faults.may_die("transfer")
        if reply[0] == b"ok" and self._faults.strikes("zmq frame corrupted"):
            at = self._faults.random.randrange(1, len(reply))
            reply = [*reply[:at], self._faults.corrupted(reply[at]), *reply[at + 1 :]]
        if reply[0] == b"ok" and self._faults.strikes("zmq frames disordered"):
            reply = [*reply[:2], *self._faults.disordered(reply[2:])]
        return reply


class FaultyGrpc(GrpcOutlet):
    """Answers over gRPC, some of them wrongly."""

    def __init__(self, metrics: LearnerMetrics, faults: Faults) -> None:
        self._faults = faults
        super().__init__(metrics)

    def pieces(self, request: Any) -> Iterator[bytes]:
        pieces = [
            part[at : at + _PIECE_BYTES] for part in super().pieces(request) for at in range(0, len(part), _PIECE_BYTES)
        ]
        if self._faults.strikes("grpc pieces disordered"):
            pieces = self._faults.disordered(pieces)
        for number, piece in enumerate(pieces):
            if number == len(pieces) // 2:
                self._faults.may_die("transfer")
            if self._faults.strikes("grpc piece corrupted"):
                piece = self._faults.corrupted(piece)
            if self._faults.random.random() < 0.02 and self._faults.strikes("grpc stream broken"):
                raise UnavailableError("the stream broke")
            yield piece


class FaultyBroadcasts(BroadcastOutlet):
    """Broadcasts, at times something else, too little, or nothing for longer than the servers' patience."""

    def __init__(self, metrics: LearnerMetrics, faults: Faults) -> None:
        super().__init__(metrics, "127.0.0.1", 1.0, 0.1)
        self._faults = faults

    def _pieces(self, group: BroadcastGroup, parts: Sequence[Part]) -> Generator[int]:
        if self._faults.strikes("broadcast corrupted"):
            at = self._faults.random.choice([index for index, part in enumerate(parts) if len(part)])
            wrong = bytearray(parts[at])
            wrong[self._faults.random.randrange(len(wrong))] ^= 1 << self._faults.random.randrange(8)
            parts = [*parts[:at], bytes(wrong), *parts[at + 1 :]]
        for size_bytes in super()._pieces(group, parts):
            self._faults.may_die("transfer")
            yield size_bytes
            if self._faults.strikes("broadcast broken"):
                raise UnavailableError("the broadcast broke")
            if self._faults.random.random() < 0.1 and self._faults.strikes("broadcast hangs"):
                threading.Event().wait(1.2)


class FaultyPublisher(Publisher):
    """Publishes, but deltas may be wrong in spite of their digests, and announcements come late, twice or not."""

    def __init__(self, faults: Faults, run: str = RUN, signature: ModelSignature = arithmetic.SIGNATURE) -> None:
        self.metrics = LearnerMetrics(CollectorRegistry())
        self.zmq = FaultyZmq(self.metrics, faults)
        self.broadcasts = FaultyBroadcasts(self.metrics, faults)
        super().__init__(run, signature, self.metrics, [self.zmq, self.broadcasts], max_delta_chain=4)
        self._grpc = FaultyGrpc(self.metrics, faults)
        self._faults = faults
        self.acknowledged = 0
        self.on_acknowledged: Callable[[], None] = lambda: None

    async def start(self, address: str) -> RunningServer:
        """Serve."""
        return await start_server(
            address, lambda server: policy_pb2_grpc.add_PolicyServiceServicer_to_server(self, server), [], Security()
        )

    async def aclose(self) -> None:
        """Let go of what it sends with."""
        await self.zmq.aclose()
        await self.broadcasts.aclose()

    async def _publication(self, snapshot: WeightSnapshot) -> Publication:
        if self._newest is not None and self._faults.strikes("delta made of other weights"):
            wrong = [bytes(len(buffer)) for buffer in self._newest.snapshot.buffers[:1]]
            base = replace(self._newest.snapshot, buffers=[*wrong, *self._newest.snapshot.buffers[1:]])
            self._newest = replace(self._newest, snapshot=base)
        return await super()._publication(snapshot)

    async def WatchPolicy(self, request_iterator: Any, context: Any) -> AsyncIterator[policy_pb2.WatchPolicyResponse]:
        earlier: list[policy_pb2.WatchPolicyResponse] = []
        async for message in super().WatchPolicy(request_iterator, context):
            if earlier and self._faults.strikes("older announcement first"):
                yield self._faults.random.choice(earlier)
            if self._faults.strikes("announcement lost"):
                earlier.append(message)
                continue
            yield message
            self._faults.may_die("announce")
            if self._faults.strikes("announcement twice"):
                yield message
            if earlier and self._faults.strikes("older announcement after"):
                yield self._faults.random.choice(earlier)
            earlier = [*earlier[-3:], message]

    def _acknowledged(self, server_id: str, server: Any, message: Any) -> None:
        self._faults.may_die("acknowledge")
        super()._acknowledged(server_id, server, message)
        self.acknowledged += 1
        self.on_acknowledged()
