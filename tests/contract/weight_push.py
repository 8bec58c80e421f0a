"""A learner's publisher behind a real server, and engines whose receivers follow it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import zmq
from prometheus_client import CollectorRegistry

from inference_server.served_policy import ServedPolicy
from inference_server.weights.receiver import WeightReceiver
from inference_server.weights.transports import ZmqTransport
from learner.weights.collective import BroadcastOutlet
from learner.weights.outlets import ZmqOutlet
from learner.weights.publisher import Publisher
from leeway import arithmetic, codec
from leeway.rpc import RunningServer, Security, cancel_and_wait, mapped_errors, open_channel, start_server
from leeway.service.metrics import InferenceServerMetrics, LearnerMetrics
from leeway.service.ports import free_port
from leeway.types import PolicyVersion, WeightRequest, WeightSnapshot
from leeway.v1 import policy_pb2, policy_pb2_grpc
from tests.deadlines import WAIT_SECONDS
from tests.harness.weights_engine import WeightsEngine

RUN = "rehearsal"


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.wait({asyncio.ensure_future(asyncio.sleep(0.002))})


class Learner:
    """A publisher that can be stopped and started again at the same address."""

    def __init__(
        self, *, local: bool = True, run: str = RUN, security: Security | None = None, broadcasts: Any = None
    ) -> None:
        self.security = security or Security()
        self.metrics = LearnerMetrics(CollectorRegistry())
        self.local = ZmqOutlet(self.metrics) if local else None
        outlets = [] if self.local is None else [self.local]
        if broadcasts is not None:
            self.broadcasts = BroadcastOutlet(self.metrics, "127.0.0.1", **broadcasts)
            outlets = [self.broadcasts]
        self.publisher = Publisher(run, arithmetic.SIGNATURE, self.metrics, outlets)
        self.address = ""
        self.acknowledged: list[PolicyVersion] = []
        self.fetched_over_grpc = 0
        self.server: RunningServer | None = None
        acknowledge, fetch = self.publisher._acknowledged, self.publisher.FetchWeights

        def on_acknowledged(server_id: str, server: Any, message: Any) -> None:
            acknowledge(server_id, server, message)
            self.acknowledged.append(server.version)

        async def fetch_weights(request: Any, context: Any) -> AsyncGenerator[Any, None]:
            self.fetched_over_grpc += 1
            async for piece in fetch(request, context):
                yield piece

        self.publisher._acknowledged = on_acknowledged
        self.publisher.FetchWeights = fetch_weights

    async def start(self, address: str = "") -> str:
        self.address = address or f"127.0.0.1:{free_port('127.0.0.1')}"  # nobody gets it between a stop and a start

        def add(server: Any) -> None:
            policy_pb2_grpc.add_PolicyServiceServicer_to_server(self.publisher, server)

        self.server = await start_server(self.address, add, [], self.security)
        return self.address

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(0.0)
        for outlet in self.publisher._outlets:
            await outlet.aclose()

    async def push(self, servers: Server | Sequence[Server], *snapshots: WeightSnapshot) -> None:
        """Publish one version after the other, each when the one before is in force."""
        for wanted in snapshots:
            await self.publisher.publish(wanted)
            await all_serve([servers] if isinstance(servers, Server) else servers, wanted)

    def refusal(self) -> str:
        return next(iter(self.publisher._servers.values())).refusal if self.publisher._servers else ""

    def sent(self, transport: str, kind: str = "snapshot") -> int:
        return int(self.metrics.published_bytes.labels(transport, kind)._value.get())

    @property
    def failed(self) -> int:
        return int(self.metrics.failed_broadcasts._value.get())

    @property
    def group(self) -> int:
        return self.broadcasts._group[0] if self.broadcasts._group is not None else 0


class Server:
    """An engine with a receiver that keeps it up to date."""

    def __init__(self, address: str, engine: Any = None, **options: Any) -> None:
        self.engine = engine or WeightsEngine()
        self.policy = ServedPolicy(self.engine, RUN)
        self.metrics = InferenceServerMetrics(CollectorRegistry())
        fields: dict[str, Any] = {
            "policy": self.policy,
            "signature": self.engine.info().signature,
            "run": RUN,
            "server_id": "server-0",
            "address": address,
            "security": Security(),
            "transports": ("zmq", "grpc"),
            "fetch_timeout_seconds": WAIT_SECONDS,
            "metrics": self.metrics,
        }
        self.receiver = WeightReceiver(**(fields | options))
        for transport in self.receiver._fetcher._transports:
            if isinstance(transport, ZmqTransport):
                transport.timeout_seconds = WAIT_SECONDS  # a learner that is late is not passed over
        self.task = asyncio.create_task(self.receiver.run())

    @property
    def local(self) -> ZmqTransport:
        transport = self.receiver._fetcher._transports[0]
        assert isinstance(transport, ZmqTransport)
        return transport

    def received(self, transport: str, kind: str = "snapshot") -> int:
        return int(self.metrics.received_weight_bytes.labels(transport, kind)._value.get())

    def fallbacks(self, given_up: str) -> int:
        return int(self.metrics.weight_fallbacks.labels(given_up)._value.get())

    async def serves(self, wanted: WeightSnapshot) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while self.policy.version != wanted.version:
                await self.policy.wait_for_change(self.policy.version)
        if isinstance(self.engine, WeightsEngine):
            assert [bytes(live) for live in self.engine._live] == [bytes(buffer) for buffer in wanted.buffers]

    async def stop(self) -> None:
        await cancel_and_wait(self.task)
        await self.engine.aclose()


@asynccontextmanager
async def pair(
    *, local: bool = True, engine: Any = None, **options: Any
) -> AsyncGenerator[tuple[Learner, Server, str], None]:
    """A learner and one server."""
    learner = Learner(local=local)
    address = await learner.start()
    server = Server(address, engine, **options)
    try:
        yield learner, server, address
    finally:
        await server.stop()
        with suppress(zmq.ZMQError):
            await learner.stop()


@asynccontextmanager
async def broadcaster(
    *, patience_seconds: float = WAIT_SECONDS, gather_seconds: float = WAIT_SECONDS
) -> AsyncGenerator[Learner]:
    """A learner that broadcasts."""
    learner = Learner(broadcasts={"patience_seconds": patience_seconds, "gather_seconds": gather_seconds}, local=False)
    await learner.start()
    try:
        yield learner
    finally:
        await learner.stop()


@asynccontextmanager
async def fleet(count: int = 2, **options: Any) -> AsyncGenerator[tuple[Learner, list[Server]]]:
    """A learner that broadcasts and has announced nothing, and servers that watch it."""
    async with broadcaster(**options) as learner:
        servers = [member(learner, index) for index in range(count)]
        try:
            await until(lambda: len(learner.publisher.servers) == count)
            yield learner, servers
        finally:
            for server in servers:
                await server.stop()


def member(learner: Learner, index: int, **options: Any) -> Server:
    """One that takes part in broadcasts."""
    return Server(learner.address, server_id=f"server-{index}", **({"transports": ("collective", "grpc")} | options))


async def all_serve(servers: Sequence[Server], wanted: WeightSnapshot) -> None:
    await asyncio.gather(*(server.serves(wanted) for server in servers))


async def all_have(learner: Learner, servers: Sequence[Server], wanted: WeightSnapshot) -> None:
    """They serve it, and the learner, which may hear of it last, has ended the broadcast and kept the group."""
    await all_serve(servers, wanted)
    await until(lambda: learner.group)


async def seat_of(learner: Learner, name: str, version: WeightSnapshot) -> policy_pb2.JoinBroadcastResponse:
    wanted = codec.weight_request_to_proto(WeightRequest(version.version))
    async with open_channel(learner.address, Security()) as channel:
        stub: policy_pb2_grpc.PolicyServiceAsyncStub = policy_pb2_grpc.PolicyServiceStub(channel)
        with mapped_errors("JoinBroadcast"):
            return await stub.JoinBroadcast(
                policy_pb2.JoinBroadcastRequest(server_id=name, weights=wanted), timeout=WAIT_SECONDS
            )
