"""The learner's PolicyService over real gRPC and ZeroMQ."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import zmq
import zmq.asyncio
from prometheus_client import CollectorRegistry

from learner.weights.outlets import PROTOCOL, ZmqOutlet
from learner.weights.publisher import Publisher
from leeway import codec
from leeway.errors import NotFoundError, PreconditionError
from leeway.rpc import Security, mapped_errors, open_channel, start_server
from leeway.service.metrics import LearnerMetrics
from leeway.types import ModelSignature, PolicyVersion, WeightManifest, WeightRequest, WeightSnapshot
from leeway.v1 import policy_pb2, policy_pb2_grpc
from leeway.weights.digests import tensor_entry, weights_digest
from tests.deadlines import WAIT_SECONDS

SIGNATURE = ModelSignature(b"m" * 32, b"t" * 32, 64, 0, 0, 0, 128)
SECURITY = Security()


def snapshot(step: int) -> WeightSnapshot:
    data = bytes([step]) * 3_000_000
    manifest = WeightManifest((tensor_entry("w", "uint8", (len(data),), data),))
    return WeightSnapshot(PolicyVersion("demo", 1, step, weights_digest(manifest)), 1, manifest, [data])


def request(parts: WeightRequest) -> bytes:
    return codec.weight_request_to_proto(parts).SerializeToString()


class Harness:
    """A publisher behind a real server, and watchers of it."""

    def __init__(self, publisher: Publisher, local: ZmqOutlet, stub: policy_pb2_grpc.PolicyServiceAsyncStub) -> None:
        self.publisher = publisher
        self.local = local
        self.stub = stub

    def watch(
        self, server_id: str = "server-0", *, run: str = "demo", signature: ModelSignature = SIGNATURE
    ) -> Watcher:
        return Watcher(self.stub, server_id, run, signature)


class Watcher:
    """One server's stream."""

    def __init__(
        self, stub: policy_pb2_grpc.PolicyServiceAsyncStub, server_id: str, run: str, signature: ModelSignature
    ) -> None:
        self._outgoing: asyncio.Queue[policy_pb2.WatchPolicyRequest | None] = asyncio.Queue()
        hello = policy_pb2.PolicyWatcher(run=run, server_id=server_id, signature=codec.signature_to_proto(signature))
        self._outgoing.put_nowait(policy_pb2.WatchPolicyRequest(hello=hello))
        self._call = stub.WatchPolicy(self._requests(), timeout=WAIT_SECONDS)
        self._responses = aiter(self._call)

    async def _requests(self) -> AsyncIterator[policy_pb2.WatchPolicyRequest]:
        while (request := await self._outgoing.get()) is not None:
            yield request

    async def announcement(self) -> policy_pb2.WatchPolicyResponse:
        with mapped_errors("WatchPolicy"):
            return await asyncio.wait_for(anext(self._responses), WAIT_SECONDS)

    def acknowledge(self, version: PolicyVersion) -> None:
        message = policy_pb2.PolicyAcknowledgement(version=codec.version_to_proto(version))
        self._outgoing.put_nowait(policy_pb2.WatchPolicyRequest(acknowledgement=message))

    def leave(self) -> None:
        self._outgoing.put_nowait(None)


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    metrics = LearnerMetrics(CollectorRegistry())
    local = ZmqOutlet(metrics)
    publisher = Publisher("demo", SIGNATURE, metrics, [local])
    server = await start_server(
        "127.0.0.1:0",
        lambda server: policy_pb2_grpc.add_PolicyServiceServicer_to_server(publisher, server),
        ["leeway.v1.PolicyService"],
        SECURITY,
    )
    async with open_channel(f"127.0.0.1:{server.port}", SECURITY) as channel:
        yield Harness(publisher, local, policy_pb2_grpc.PolicyServiceStub(channel))
    await server.stop(0)
    await local.aclose()


async def test_a_late_joiner_gets_the_newest_and_skips_what_was_overtaken(harness: Harness) -> None:
    await harness.publisher.publish(snapshot(1))
    await harness.publisher.publish(snapshot(2))
    watcher = harness.watch()
    assert (await watcher.announcement()).version.step == 2
    await harness.publisher.publish(snapshot(3))
    assert (await watcher.announcement()).version.step == 3


async def test_acknowledgements_are_known_by_server(harness: Harness) -> None:
    newest = snapshot(1)
    await harness.publisher.publish(newest)
    watcher = harness.watch("server-7")
    await watcher.announcement()
    watcher.acknowledge(newest.version)
    watcher.leave()
    with pytest.raises(StopAsyncIteration):
        await watcher.announcement()
    assert len(harness.publisher.push_seconds) == 1
    assert harness.publisher.servers == {}


async def test_while_held_newer_versions_wait_and_the_newest_follows(harness: Harness) -> None:
    await harness.publisher.publish(snapshot(1))
    watcher = harness.watch()
    await watcher.announcement()
    harness.publisher.hold()
    await harness.publisher.publish(snapshot(2))
    await harness.publisher.publish(snapshot(3))
    late = harness.watch("server-1")
    assert (await late.announcement()).version.step == 1
    await harness.publisher.release()
    assert (await watcher.announcement()).version.step == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "other"}, "belongs to run 'other'"),
        ({"signature": ModelSignature(b"x" * 32, b"t" * 32, 64, 0, 0, 0, 128)}, "model differs"),
        ({"signature": ModelSignature(b"m" * 32, b"x" * 32, 64, 0, 0, 0, 128)}, "tokenizer differs"),
    ],
)
async def test_a_server_that_does_not_fit_is_refused_by_name(
    harness: Harness, changes: dict[str, object], message: str
) -> None:
    await harness.publisher.publish(snapshot(1))
    with pytest.raises(PreconditionError, match=f"server-0.*{message}"):
        await harness.watch(**changes).announcement()  # type: ignore[arg-type]


async def test_bytes_come_whole_over_grpc(harness: Harness) -> None:
    newest = snapshot(5)
    await harness.publisher.publish(newest)
    request = policy_pb2.FetchWeightsRequest(version=codec.version_to_proto(newest.version))
    pieces = [reply.data async for reply in harness.stub.FetchWeights(request, timeout=WAIT_SECONDS)]
    assert len(pieces) > 1
    assert b"".join(pieces) == newest.buffers[0]
    await harness.publisher.publish(snapshot(6))
    with pytest.raises(NotFoundError, match="no longer the newest"), mapped_errors("FetchWeights"):
        _ = [reply async for reply in harness.stub.FetchWeights(request, timeout=WAIT_SECONDS)]


async def test_bytes_come_whole_over_zeromq(harness: Harness) -> None:
    newest = snapshot(5)
    await harness.publisher.publish(newest)
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(harness.local.endpoint)
    try:
        right = request(WeightRequest(newest.version))
        gone = request(WeightRequest(snapshot(4).version))
        beyond = request(WeightRequest(newest.version, first_part=1, end_part=2))
        for frames, expected in [
            ([PROTOCOL, right], [b"ok", right, newest.buffers[0]]),
            ([PROTOCOL, gone], [b"gone", gone]),
            ([PROTOCOL, beyond], [b"gone", beyond]),
            ([PROTOCOL, b"\xff rubbish"], [b"gone", b"\xff rubbish"]),
            ([b"other/9"], [b"gone"]),
        ]:
            await socket.send_multipart(frames)
            assert await asyncio.wait_for(socket.recv_multipart(), WAIT_SECONDS) == expected
    finally:
        socket.close(0)
        context.term()
