"""The weight receiver against the learner's own publisher, over real gRPC and ZeroMQ."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from inference_server.engines.arithmetic import ArithmeticEngine
from leeway import arithmetic
from leeway.config import ArithmeticEngineOptions
from leeway.errors import NotFoundError, PreconditionError
from leeway.types import PolicyVersion, WeightManifest, WeightSnapshot
from leeway.weights.digests import tensor_entry, weights_digest
from tests.contract.weight_push import RUN, Learner, Server, pair, until
from tests.harness.arithmetic_law import policy_version


def snapshot(step: int, epoch: int = 1, publisher_epoch: int | None = None) -> WeightSnapshot:
    manifest, buffers = arithmetic.published_weights(epoch, step)
    version = policy_version(RUN, epoch, step, history=epoch)
    return WeightSnapshot(version, publisher_epoch or epoch, manifest, buffers)


def arithmetic_engine() -> ArithmeticEngine:
    return ArithmeticEngine(ArithmeticEngineOptions())


def arithmetic_pair(engine: Any = None, **options: Any) -> AbstractAsyncContextManager[tuple[Learner, Server, str]]:
    return pair(engine=engine or arithmetic_engine(), **options)


@pytest.mark.parametrize(("local", "allowed"), [(True, True), (False, True), (True, False)])
async def test_versions_come_into_force_and_are_acknowledged(local: bool, allowed: bool) -> None:
    async with arithmetic_pair(local=local, transports=("zmq", "grpc") if allowed else ("grpc",)) as (
        learner,
        server,
        _,
    ):
        for step in range(4):
            await learner.push(server, snapshot(step))
            await until(lambda step=step: snapshot(step).version in learner.acknowledged)
        assert (learner.fetched_over_grpc == 0) == (local and allowed)
        assert not learner.refusal()


async def test_a_late_server_gets_the_newest_version_only() -> None:
    learner = Learner(local=True)
    address = await learner.start()
    for step in range(5):
        await learner.publisher.publish(snapshot(step))
    server = Server(address, arithmetic_engine())
    await server.serves(snapshot(4))
    await until(lambda: learner.acknowledged)
    assert learner.acknowledged == [snapshot(4).version]
    await server.stop()
    await learner.stop()


async def test_several_tensors_arrive_in_their_order() -> None:
    class Recording(ArithmeticEngine):
        snapshots: list[tuple[bytes, ...]] = []  # noqa: RUF012

        async def update_weights(self, snapshot: WeightSnapshot) -> float:
            self.snapshots.append(tuple(bytes(buffer) for buffer in snapshot.buffers))
            return 0.25

    buffers = [bytes([n]) * (1_500_000 + n) for n in range(4)]
    manifest = WeightManifest(tuple(tensor_entry(f"t{n}", "uint8", (len(b),), b) for n, b in enumerate(buffers)))
    version = PolicyVersion(RUN, 1, 1, weights_digest(manifest))
    for local in (True, False):
        Recording.snapshots = []
        async with arithmetic_pair(local=local, engine=Recording(ArithmeticEngineOptions())) as (learner, server, _):
            await learner.publisher.publish(WeightSnapshot(version, 1, manifest, buffers))
            await until(lambda: server.policy.version == version)
            assert Recording.snapshots == [tuple(buffers)]


@pytest.mark.parametrize("local", [True, False])
async def test_wrong_bytes_are_refused_and_the_old_weights_stay(local: bool) -> None:
    async with arithmetic_pair(local=local) as (learner, server, _):
        await learner.push(server, snapshot(0))
        good = snapshot(1)
        flipped = bytes([good.buffers[0][0] ^ 1]) + bytes(good.buffers[0][1:])
        await learner.publisher.publish(replace(good, buffers=[flipped]))
        await until(learner.refusal)
        assert "digest" in learner.refusal()
        assert server.policy.version == server.engine.info().version == snapshot(0).version
        await learner.push(server, snapshot(2))
        await until(lambda: not learner.refusal())


async def test_a_manifest_that_does_not_fit_is_refused_with_its_reason() -> None:
    async with arithmetic_pair() as (learner, server, _):
        data = b"\0" * 8
        manifest = WeightManifest((tensor_entry("other", "uint8", (8,), data),))
        version = PolicyVersion(RUN, 1, 1, weights_digest(manifest))
        await learner.publisher.publish(WeightSnapshot(version, 1, manifest, [data]))
        await until(learner.refusal)
        assert "do not fit" in learner.refusal()
        assert server.policy.version is None


async def test_an_older_learner_is_refused_after_a_newer_one_was_seen() -> None:
    async with arithmetic_pair() as (learner, server, _):
        await learner.publisher.publish(snapshot(3, publisher_epoch=2))
        await server.serves(snapshot(3))
        await learner.publisher.publish(snapshot(4, publisher_epoch=1))
        await until(learner.refusal)
        assert "epoch 1 are refused" in learner.refusal()
        assert server.policy.version == snapshot(3).version


async def test_a_restarted_learner_is_followed() -> None:
    async with arithmetic_pair() as (learner, server, address):
        await learner.push(server, snapshot(7))
        await learner.stop()
        second = Learner(local=True)
        # It goes back to a checkpoint: the version of the old epoch, then its own.
        await second.publisher.publish(snapshot(5, publisher_epoch=2))
        await second.start(address)
        await server.serves(snapshot(5))
        await second.push(server, snapshot(6, epoch=2))
        await until(lambda: snapshot(6, epoch=2).version in second.acknowledged)
        await second.stop()


async def test_a_fetch_ends_when_its_learner_is_gone(tmp_path: Path) -> None:
    context = zmq.asyncio.Context()
    silent = context.socket(zmq.ROUTER)
    silent.bind(f"ipc://{tmp_path / 'silent'}")
    try:
        async with arithmetic_pair() as (learner, server, address):
            server.local.timeout_seconds = 600.0
            assert learner.local is not None
            learner.local.endpoint = f"ipc://{tmp_path / 'silent'}"
            await learner.publisher.publish(snapshot(7))
            await silent.recv_multipart()  # the fetch has begun, and will have no answer
            await learner.stop()
            second = Learner(local=True)
            await second.publisher.publish(snapshot(5, publisher_epoch=2))
            await second.start(address)
            await server.serves(snapshot(5))
            await second.stop()
    finally:
        silent.close(linger=0)
        context.term()


async def test_a_version_already_served_is_acknowledged_without_a_transfer() -> None:
    async with arithmetic_pair() as (learner, server, address):
        await learner.push(server, snapshot(7))
        await learner.stop()
        second = Learner(local=False)
        await second.publisher.publish(snapshot(7, publisher_epoch=3))
        await second.start(address)
        await until(lambda: snapshot(7).version in second.acknowledged)
        assert second.fetched_over_grpc == 0
        await second.publisher.publish(snapshot(8, publisher_epoch=2))  # the fence was raised nevertheless
        await until(second.refusal)
        await second.stop()


async def test_zeromq_that_never_answers_falls_back_to_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    async with arithmetic_pair() as (learner, server, _):
        server.local.timeout_seconds = 0.05
        assert learner.local is not None
        with monkeypatch.context() as broken:
            broken.setattr(learner.local, "_reply", lambda _request: [b"ok"] * 7)  # nonsense: too many frames
            await learner.push(server, snapshot(0))
            assert learner.fetched_over_grpc == 1
        await learner.push(server, snapshot(1))
        assert learner.fetched_over_grpc == 2  # the endpoint is not tried again, though it would answer now


async def test_a_silent_or_missing_endpoint_falls_back_to_grpc(tmp_path: Path) -> None:
    context = zmq.asyncio.Context()
    silent = context.socket(zmq.ROUTER)
    silent.bind(f"ipc://{tmp_path / 'silent'}")
    try:
        for endpoint in (f"ipc://{tmp_path / 'silent'}", f"ipc://{tmp_path / 'missing'}", "tcp://127.0.0.1:1"):
            async with arithmetic_pair() as (learner, server, _):
                server.local.timeout_seconds = 0.05
                assert learner.local is not None
                learner.local.endpoint = endpoint
                await learner.push(server, snapshot(0))
                assert learner.fetched_over_grpc == 1
    finally:
        silent.close(linger=0)
        context.term()


async def test_an_overtaken_version_is_left_for_the_next_announcement() -> None:
    async with arithmetic_pair(local=False) as (learner, server, _):
        fetch = learner.publisher.FetchWeights
        overtaken = {"times": 2}

        async def fetch_weights(request: Any, context: Any) -> AsyncGenerator[Any, None]:
            if overtaken["times"]:
                overtaken["times"] -= 1
                await learner.publisher.publish(snapshot(10 - overtaken["times"]))
                raise NotFoundError("no longer the newest")
            async for piece in fetch(request, context):
                yield piece

        learner.publisher.FetchWeights = fetch_weights
        await learner.stop()
        learner.local = None
        await learner.publisher.publish(snapshot(1))
        await learner.start(server.receiver._address)
        await server.serves(snapshot(10))
        assert not learner.refusal()


async def test_a_model_that_differs_ends_the_receiver_with_a_line() -> None:
    other = replace(arithmetic.SIGNATURE, model_digest=b"x" * 32)
    async with arithmetic_pair(signature=other) as (_learner, server, _):
        with pytest.RaisesGroup(pytest.RaisesExc(PreconditionError, match="model differs")):
            await asyncio.shield(server.task)
    async with arithmetic_pair(run="another") as (_learner, server, _):
        with pytest.RaisesGroup(pytest.RaisesExc(PreconditionError, match="another")):
            await asyncio.shield(server.task)
