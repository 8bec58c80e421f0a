"""A learner that broadcasts weights, and servers that take part."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from inference_server.served_policy import ServedPolicy
from inference_server.weights.receiver import WeightReceiver
from learner.weights.collective import CollectiveWeights
from learner.weights.publisher import Publisher
from leeway import arithmetic, codec
from leeway.rpc import Security, cancel_and_wait, mapped_errors, open_channel, start_server
from leeway.service.metrics import InferenceServerMetrics, LearnerMetrics
from leeway.types import PolicyVersion, WeightManifest, WeightRequest, WeightSnapshot
from leeway.v1 import policy_pb2, policy_pb2_grpc
from leeway.weights.digests import tensor_entry, weights_digest
from tests.deadlines import WAIT_SECONDS
from tests.harness.weights_engine import WeightsEngine

RUN = "broadcasts"
SIZES = (300_000, 0, 7, 2_000_000, 1000, 0)  # elements of two bytes: in one piece, in several, empty
PIECE_BYTES = 500_000


def snapshot(step: int, base: WeightSnapshot | None = None) -> WeightSnapshot:
    """Random weights, or a few percent of the base's elements a unit away."""
    generator = np.random.default_rng(step)
    words = [generator.integers(0, 1 << 16, size, np.uint16) for size in SIZES]
    if base is not None:
        words = [np.frombuffer(buffer, np.uint16).copy() for buffer in base.buffers]
        for word in words:
            word[generator.random(len(word)) < 0.02] += 1
    buffers = [word.astype("<u2").tobytes() for word in words]
    manifest = WeightManifest(
        tuple(tensor_entry(f"t{i}", "bfloat16", (len(data) // 2,), data) for i, data in enumerate(buffers))
    )
    return WeightSnapshot(PolicyVersion(RUN, 1, step, weights_digest(manifest)), 1, manifest, buffers)


class Learner:
    """A publisher that broadcasts."""

    def __init__(self, patience_seconds: float, gather_seconds: float) -> None:
        self.metrics = LearnerMetrics(CollectorRegistry())
        self.broadcasts = CollectiveWeights(
            "127.0.0.1", self.metrics, patience_seconds=patience_seconds, gather_seconds=gather_seconds
        )
        self.publisher = Publisher(RUN, arithmetic.SIGNATURE, self.metrics, None, broadcasts=self.broadcasts)
        self.address = ""

    def sent(self, transport: str, kind: str = "snapshot") -> int:
        return int(self.metrics.published_bytes.labels(transport, kind)._value.get())

    @property
    def failed(self) -> int:
        return int(self.metrics.failed_broadcasts._value.get())

    @property
    def group(self) -> int:
        return self.broadcasts._group[0] if self.broadcasts._group is not None else 0


class Server:
    """An engine with a receiver that takes part in broadcasts."""

    def __init__(self, name: str, address: str, **options: Any) -> None:
        self.engine = WeightsEngine()
        self.policy = ServedPolicy(self.engine, RUN)
        self.metrics = InferenceServerMetrics(CollectorRegistry())
        fields: dict[str, Any] = {"broadcasts": True, "allow_local": False, "fetch_timeout_seconds": WAIT_SECONDS}
        self.receiver = WeightReceiver(
            policy=self.policy,
            signature=arithmetic.SIGNATURE,
            run=RUN,
            server_id=name,
            address=address,
            security=Security(),
            metrics=self.metrics,
            **(fields | options),
        )
        self.task = asyncio.create_task(self.receiver.run())

    def received(self, transport: str, kind: str = "snapshot") -> int:
        return int(self.metrics.received_weight_bytes.labels(transport, kind)._value.get())

    async def serves(self, wanted: WeightSnapshot) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while self.policy.version != wanted.version:
                await self.policy.wait_for_change(self.policy.version)
        assert [bytes(live) for live in self.engine._live] == [bytes(buffer) for buffer in wanted.buffers]

    async def stop(self) -> None:
        await cancel_and_wait(self.task)


@asynccontextmanager
async def learner_of(
    *,
    patience_seconds: float = WAIT_SECONDS,
    gather_seconds: float = WAIT_SECONDS,
) -> AsyncGenerator[Learner]:
    learner = Learner(patience_seconds, gather_seconds)
    server = await start_server(
        "127.0.0.1:0",
        lambda s: policy_pb2_grpc.add_PolicyServiceServicer_to_server(learner.publisher, s),
        [],
        Security(),
    )
    learner.address = f"127.0.0.1:{server.port}"
    try:
        yield learner
    finally:
        await server.stop(0.0)
        await learner.broadcasts.aclose()


@asynccontextmanager
async def fleet(count: int = 2, **options: Any) -> AsyncGenerator[tuple[Learner, list[Server]]]:
    """A learner that has announced nothing, and servers that watch it."""
    async with learner_of(**options) as learner:
        servers = [Server(f"server-{index}", learner.address) for index in range(count)]
        try:
            await until(lambda: len(learner.publisher.servers) == count)
            yield learner, servers
        finally:
            for server in servers:
                await server.stop()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.wait({asyncio.ensure_future(asyncio.sleep(0.002))})


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
