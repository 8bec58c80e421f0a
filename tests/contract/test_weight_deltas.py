"""Pushes as deltas: what changed is all that travels, and whatever goes wrong ends in the right weights."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from inference_server.engines.arithmetic import ArithmeticEngine
from learner.weights.publication import Publication
from leeway import codec
from leeway.config import ArithmeticEngineOptions
from leeway.rpc import Security, open_channel
from leeway.types import PolicyVersion, WeightManifest, WeightRequest, WeightSnapshot
from leeway.v1 import policy_pb2, policy_pb2_grpc
from leeway.weights.digests import tensor_entry, verify_weights, weights_digest
from tests.contract.weight_push import RUN, Learner, Server, pair, until
from tests.harness.certificates import make_security


def snapshot(step: int, epoch: int = 1, *, seed: int | None = None) -> WeightSnapshot:
    """Three tensors of which each step changes a few elements; with a `seed`, everything is different."""
    entries, buffers = [], []
    for index, size in enumerate((40_000, 0, 9_000)):
        words = np.random.default_rng(index if seed is None else 100 + seed).integers(0, 1 << 16, size, np.uint16)
        if size:
            words[np.random.default_rng(step).integers(0, size, 50)] += np.uint16(1)
            words[step] += np.uint16(1)
        data = words.astype("<u2").tobytes()
        entries.append(tensor_entry(f"t{index}", "bfloat16", (size,), data))
        buffers.append(data)
    manifest = WeightManifest(tuple(entries))
    return WeightSnapshot(PolicyVersion(RUN, epoch, step, weights_digest(manifest)), epoch, manifest, buffers)


class BytesEngine(ArithmeticEngine):
    """Serves any bytes; checks at every update that they are what the label says."""

    def __init__(self) -> None:
        super().__init__(ArithmeticEngineOptions())
        self.served: list[PolicyVersion] = []
        self.open = asyncio.Event()
        self.open.set()

    async def update_weights(self, snapshot: WeightSnapshot) -> float:
        await self.open.wait()
        verify_weights(snapshot.manifest, snapshot.buffers, snapshot.version.digest)
        self.served.append(snapshot.version)
        return 0.0


@pytest.mark.parametrize(("local", "transport"), [(True, "zmq"), (False, "grpc")])
async def test_a_server_that_holds_a_version_gets_only_what_changed(local: bool, transport: str) -> None:
    engine = BytesEngine()
    async with pair(local=local, engine=engine) as (learner, server, _):
        await learner.push(server, *map(snapshot, range(6)))
        assert engine.served == [snapshot(step).version for step in range(6)]
        assert server.received(transport) == snapshot(0).manifest.size_bytes
        assert 0 < server.received(transport, "delta") < 0.1 * snapshot(0).manifest.size_bytes
        assert learner.sent(transport, "delta") == server.received(transport, "delta")
        assert not server.fallbacks("delta")


async def test_a_slow_server_takes_several_deltas_at_once() -> None:
    engine = BytesEngine()
    async with pair(engine=engine) as (learner, server, _):
        await learner.push(server, snapshot(0))
        engine.open.clear()
        for step in range(1, 6):
            await learner.publisher.publish(snapshot(step))
        engine.open.set()
        await server.serves(snapshot(5))
        assert server.received("zmq") == snapshot(0).manifest.size_bytes


async def test_a_server_beyond_the_chain_gets_the_snapshot() -> None:
    engine = BytesEngine()
    async with pair(engine=engine) as (learner, server, _):
        learner.publisher._max_delta_chain = 2
        await learner.push(server, snapshot(0))
        engine.open.clear()
        await learner.publisher.publish(snapshot(1))
        await until(lambda: server.received("zmq", "delta"))  # the engine has not taken it yet
        for step in range(2, 6):
            await learner.publisher.publish(snapshot(step))
        engine.open.set()
        await server.serves(snapshot(5))
        assert server.received("zmq") == 2 * snapshot(0).manifest.size_bytes


async def test_a_change_of_everything_is_a_snapshot_and_the_chain_goes_on_from_there() -> None:
    async with pair(engine=BytesEngine()) as (learner, server, _):
        await learner.push(server, *(snapshot(step, seed=seed) for step, seed in enumerate([None, 1, 1, 1])))
        assert server.received("zmq") == 2 * snapshot(0).manifest.size_bytes


async def test_the_same_weights_under_another_label_need_no_transfer() -> None:
    engine = BytesEngine()
    async with pair(engine=engine) as (learner, server, _):
        await learner.push(server, snapshot(0))
        again = replace(snapshot(0), version=replace(snapshot(0).version, step=1))
        await learner.push(server, again)
        assert server.received("zmq") == snapshot(0).manifest.size_bytes
        assert server.received("zmq", "delta") == 0


@pytest.mark.parametrize("where", ["learner", "server"])
async def test_without_deltas_every_push_is_a_snapshot(where: str) -> None:
    async with pair(engine=BytesEngine(), take_deltas=where != "server") as (learner, server, _):
        learner.publisher._max_delta_chain = 0 if where == "learner" else 8
        await learner.push(server, *map(snapshot, range(3)))
        assert server.received("zmq") == 3 * snapshot(0).manifest.size_bytes
        assert server.received("zmq", "delta") == 0


async def test_a_server_whose_base_went_bad_repairs_itself() -> None:
    """Also where no delta touches it: every digest of the result is checked."""
    async with pair(engine=BytesEngine()) as (learner, server, _):
        await learner.push(server, snapshot(0))
        held = server.receiver._fetcher._held
        assert held is not None
        bad = bytearray(held.buffers[2])
        bad[17_000] ^= 4
        server.receiver._fetcher._held = replace(held, buffers=[*held.buffers[:2], bytes(bad)])
        await learner.push(server, snapshot(1))
        assert server.fallbacks("delta") == 1
        await learner.push(server, snapshot(2))
        assert server.fallbacks("delta") == 1
        assert not learner.refusal()


async def test_a_delta_that_leads_elsewhere_is_repaired_by_the_snapshot() -> None:
    async with pair(engine=BytesEngine()) as (learner, server, _):
        await learner.push(server, snapshot(0))
        # Right in all its digests, but made of other weights.
        wrong = Publication(replace(snapshot(0), buffers=snapshot(9).buffers))
        learner.publisher._newest = wrong
        await learner.push(server, snapshot(1))
        assert server.received("zmq", "delta") > 0
        assert server.fallbacks("delta") == 1
        assert server.received("zmq") == 2 * snapshot(0).manifest.size_bytes


@pytest.mark.parametrize("fault", ["flip", "cut", "extend", "swap", "twice"])
async def test_deltas_changed_in_transfer_are_repaired(fault: str) -> None:
    async with pair(local=False, engine=BytesEngine()) as (learner, server, address):
        await learner.stop()
        fetch = learner.publisher.FetchWeights

        async def fetch_weights(request: Any, context: Any) -> AsyncGenerator[Any, None]:
            pieces = [reply.data async for reply in fetch(request, context)]
            if request.base_digest:
                match fault:
                    case "flip":
                        pieces[0] = pieces[0][:-1] + bytes([pieces[0][-1] ^ 1])
                    case "cut":
                        pieces[-1] = pieces[-1][:-1]
                    case "extend":
                        pieces.append(b"x")
                    case "swap":
                        pieces = [pieces[0][100:], pieces[0][:100], *pieces[1:]]
                    case _:
                        pieces *= 2
            for piece in pieces:
                yield policy_pb2.FetchWeightsResponse(data=piece)

        learner.publisher.FetchWeights = fetch_weights
        await learner.start(address)
        await learner.push(server, *map(snapshot, range(3)))
        assert server.fallbacks("delta") == 2
        assert not learner.refusal()


async def test_announcements_out_of_order_never_lead_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "inference_server.weights.receiver")
    engine = BytesEngine()
    async with pair(engine=engine) as (learner, server, _):
        await learner.push(server, snapshot(2))
        await learner.publisher.publish(snapshot(1))  # it was sent before, and comes late
        await until(lambda: "passed over" in caplog.text or len(engine.served) > 1)
        await learner.push(server, snapshot(3))
        await until(lambda: snapshot(3).version in learner.acknowledged)
        assert engine.served == [snapshot(2).version, snapshot(3).version]


async def test_a_late_announcement_of_an_older_learner_is_refused_and_hides_nothing() -> None:
    engine = BytesEngine()
    async with pair(engine=engine) as (learner, server, _):
        engine.open.clear()
        await learner.publisher.publish(snapshot(1, epoch=2))
        await until(lambda: server.received("zmq"))
        await learner.publisher.publish(snapshot(2, epoch=2))
        await until(lambda: server.receiver._newest and server.receiver._newest[0].version.step == 2)
        newest = learner.publisher._newest
        await learner.publisher.publish(snapshot(9, epoch=1))
        await until(learner.refusal)
        assert "epoch 2 has taken over" in learner.refusal()
        assert newest is not None
        for outlet in (learner.publisher._grpc, *learner.publisher._outlets):
            outlet.offer(newest)  # the newer learner is still there
        engine.open.set()
        await server.serves(snapshot(2, epoch=2))


async def test_wrong_bytes_are_asked_for_again_without_a_newer_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_server.weights.receiver._ANNOUNCE_AGAIN_SECONDS", 0.01)
    async with pair(local=False, engine=BytesEngine()) as (learner, server, _):
        good = snapshot(0)
        await learner.publisher.publish(replace(good, buffers=[b"\0" * 80_000, *good.buffers[1:]]))
        await until(learner.refusal)
        assert learner.publisher._metrics.refusing_servers._value.get() == 1
        learner.publisher._grpc.offer(Publication(good))
        await server.serves(good)
        await until(lambda: good.version in learner.acknowledged)
        assert not learner.refusal()
        assert learner.publisher._metrics.refusing_servers._value.get() == 0


async def test_an_announcement_names_the_chain_and_no_more_than_that() -> None:
    learner = Learner(local=False)
    learner.publisher._max_delta_chain = 3
    for step in range(6):
        await learner.publisher.publish(snapshot(step))
    assert learner.publisher._newest is not None
    message = learner.publisher._announcement(learner.publisher._newest, policy_pb2.PolicyWatcher())
    deltas = [codec.delta_from_proto(delta) for delta in message.deltas]
    assert [delta.base_digest for delta in deltas] == [snapshot(step).version.digest for step in (2, 3, 4)]
    assert [delta.target_digest for delta in deltas] == [snapshot(step).version.digest for step in (3, 4, 5)]
    assert sum(delta.size_bytes for delta in deltas) < snapshot(5).manifest.size_bytes


async def test_a_killed_server_that_comes_back_has_no_base_and_gets_the_snapshot() -> None:
    async with pair(engine=BytesEngine()) as (learner, server, address):
        await learner.push(server, *map(snapshot, range(2)))
        reborn = Server(address, BytesEngine(), server_id="server-1")
        await reborn.serves(snapshot(1))
        assert reborn.received("zmq") == snapshot(0).manifest.size_bytes
        await reborn.stop()


@pytest.mark.processes
async def test_weights_travel_over_mutual_tls_and_to_nobody_else(tmp_path: Path) -> None:
    security, other = make_security(tmp_path / "run"), make_security(tmp_path / "other")
    learner = Learner(local=False, security=security)
    address = await learner.start()
    server = Server(address, BytesEngine(), security=security)
    try:
        await learner.push(server, *map(snapshot, range(2)))
        assert server.received("grpc") == snapshot(0).manifest.size_bytes
        assert server.received("grpc", "delta") > 0
        for stranger in (Security(), other):
            request = codec.weight_request_to_proto(WeightRequest(snapshot(1).version))
            async with open_channel(address, stranger) as channel:
                stub: policy_pb2_grpc.PolicyServiceAsyncStub = policy_pb2_grpc.PolicyServiceStub(channel)
                with pytest.raises(grpc.aio.AioRpcError, match=r"UNAVAILABLE|DEADLINE"):
                    _ = [reply async for reply in stub.FetchWeights(request, timeout=0.5)]
    finally:
        await server.stop()
        await learner.stop()
