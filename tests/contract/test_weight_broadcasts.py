"""Weights broadcast to several servers at once, and what happens when one of them is not what it should be."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Generator, Sequence

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from inference_server.weights import collective as receiving
from learner.weights.publisher import Publisher
from leeway import arithmetic
from leeway.errors import NotFoundError, PreconditionError
from leeway.service.metrics import LearnerMetrics
from leeway.types import PolicyVersion, WeightManifest, WeightSnapshot
from leeway.v1 import policy_pb2
from leeway.weights.broadcast import BroadcastGroup, Part
from leeway.weights.digests import tensor_entry, weights_digest
from tests.contract.weight_push import (
    RUN,
    all_have,
    all_serve,
    broadcaster,
    fleet,
    member,
    seat_of,
    until,
)
from tests.deadlines import WAIT_SECONDS

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


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BroadcastGroup, "piece_bytes", PIECE_BYTES)


async def test_snapshot_and_deltas_reach_all_servers_bit_for_bit_and_are_sent_once() -> None:
    async with fleet(2) as (learner, servers):
        first = snapshot(1)
        await learner.publisher.publish(first)
        await all_have(learner, servers, first)
        assert learner.sent("collective") == first.manifest.size_bytes
        group = learner.group
        newest = first
        for step in (2, 3):
            newest = snapshot(step, newest)
            await learner.publisher.publish(newest)
            await all_have(learner, servers, newest)
            await until(lambda n=newest: all(v == n.version for v in learner.publisher.servers.values()))
            assert learner.group == group != 0  # nobody joined or left
        assert learner.sent("grpc") == learner.sent("grpc", "delta") == learner.failed == 0
        sent = learner.sent("collective", "delta")
        assert [server.received("collective", "delta") for server in servers] == [sent, sent]
        assert 0 < sent < 0.2 * first.manifest.size_bytes


async def test_a_late_joiner_has_a_broadcast_of_its_own_and_is_with_the_others_next_time() -> None:
    async with fleet(2) as (learner, servers):
        first = snapshot(1)
        await learner.publisher.publish(first)
        await all_have(learner, servers, first)
        group = learner.group
        servers.append(member(learner, 2))
        await all_have(learner, servers[2:], first)
        assert servers[2].received("collective") == first.manifest.size_bytes
        second = snapshot(2, first)
        await learner.publisher.publish(second)
        await all_have(learner, servers, second)
        assert learner.broadcasts._group is not None
        assert learner.broadcasts._group[1].size == 4
        assert learner.group != group
        third = snapshot(3)
        await servers.pop(0).stop()
        await until(lambda: len(learner.publisher.servers) == 2)
        await learner.publisher.publish(third)
        await all_have(learner, servers, third)
        assert learner.broadcasts._group[1].size == 3
        assert learner.sent("grpc") == learner.sent("grpc", "delta") == learner.failed == 0


async def test_servers_with_and_without_a_base_have_different_broadcasts() -> None:
    async with fleet(1) as (learner, servers):
        servers.append(member(learner, 1, take_deltas=False))
        await until(lambda: len(learner.publisher.servers) == 2)
        first = snapshot(1)
        second = snapshot(2, first)
        for version in (first, second):
            await learner.push(servers, version)
        assert servers[0].received("collective", "delta") > 0
        assert servers[1].received("collective") == 2 * first.manifest.size_bytes
        assert learner.failed == 0


async def test_wrong_bytes_are_found_by_their_digest_and_fetched_over_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    send = BroadcastGroup.send

    def with_a_wrong_byte(group: BroadcastGroup, parts: Sequence[Part]) -> Generator[int]:
        wrong = bytearray(parts[3])
        wrong[3_000_000] ^= 1
        return send(group, [*parts[:3], bytes(wrong), *parts[4:]])

    async with fleet(2) as (learner, servers):
        first, second = snapshot(1), snapshot(2)
        with monkeypatch.context() as broken:
            broken.setattr(BroadcastGroup, "send", with_a_wrong_byte)
            await learner.push(servers, first)
        assert learner.sent("grpc") == 2 * first.manifest.size_bytes
        fallbacks = [server.fallbacks("collective") for server in servers]
        assert fallbacks == [1, 1]
        await learner.push(servers, second)
        assert learner.sent("grpc") == 2 * first.manifest.size_bytes
        assert [server.received("collective") for server in servers] == [second.manifest.size_bytes] * 2


async def test_a_server_that_takes_a_seat_and_never_comes_costs_the_others_their_patience() -> None:
    async with fleet(2, patience_seconds=0.5) as (learner, servers):
        learner.publisher._expect = lambda: None
        learner.broadcasts.expect(frozenset({"server-0", "server-1", "ghost"}))
        first = snapshot(1)
        await learner.publisher.publish(first)
        seat = await seat_of(learner, "ghost", first)
        assert seat.world_size == 4
        await all_serve(servers, first)
        await until(lambda: learner.failed == 1)
        assert learner.sent("grpc") == 2 * first.manifest.size_bytes
        learner.broadcasts.expect(frozenset({"server-0", "server-1"}))
        learner.broadcasts._patience_seconds = WAIT_SECONDS
        second = snapshot(2)
        await learner.push(servers, second)
        assert [server.received("collective") for server in servers] == [second.manifest.size_bytes] * 2


async def test_a_server_that_does_not_ask_is_not_waited_for() -> None:
    async with fleet(2, gather_seconds=0.2) as (learner, servers):
        learner.publisher._expect = lambda: None
        learner.broadcasts.expect(frozenset({"server-0", "server-1", "silent"}))
        first = snapshot(1)
        await learner.push(servers, first)
        assert [server.received("collective") for server in servers] == [first.manifest.size_bytes] * 2


MEMBER = """
import sys, signal
from leeway.weights.broadcast import BroadcastGroup
print("ready", flush=True)
port, number, rank, size, piece = map(int, sys.stdin.readline().split())
group = BroadcastGroup(("127.0.0.1", port), number, rank, size, 600.0)
list(group.receive(memoryview(bytearray(piece))))
print("one", flush=True)
signal.pause()
"""


@pytest.mark.parametrize(("how", "patience_seconds"), [(signal.SIGKILL, 2 * WAIT_SECONDS), (signal.SIGSTOP, 8.0)])
@pytest.mark.processes
async def test_a_server_that_dies_or_hangs_in_mid_broadcast_blocks_nobody(
    how: signal.Signals, patience_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    hit = asyncio.Event()
    loop = asyncio.get_running_loop()
    send = BroadcastGroup.send

    def stopping(group: BroadcastGroup, parts: Sequence[Part]) -> Generator[int]:
        sizes = send(group, parts)
        for count, size in enumerate(sizes):
            if count == 1:
                asyncio.run_coroutine_threadsafe(hit.wait(), loop).result(WAIT_SECONDS)
            yield size

    async with fleet(2, patience_seconds=patience_seconds) as (learner, servers):
        learner.publisher._expect = lambda: None
        learner.broadcasts.expect(frozenset({"server-0", "server-1", "victim"}))
        first = snapshot(1)
        with monkeypatch.context() as patched:
            patched.setattr(BroadcastGroup, "send", stopping)
            victim = await asyncio.create_subprocess_exec(
                sys.executable, "-W", "ignore", "-c", MEMBER,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            assert victim.stdin is not None
            assert victim.stdout is not None
            await victim.stdout.readline()
            await learner.publisher.publish(first)
            seat = await seat_of(learner, "victim", first)
            group = learner.broadcasts._rendezvous.address[1], seat.group, seat.rank, seat.world_size, PIECE_BYTES
            victim.stdin.write(" ".join(map(str, group)).encode() + b"\n")
            await victim.stdout.readline()
            os.kill(victim.pid, how)
            hit.set()
            await all_serve(servers, first)  # waits less than the patience with one that is dead
            await until(lambda: learner.failed == 1)
        assert learner.sent("grpc") > 0
        if how is not signal.SIGKILL:
            victim.kill()
        await victim.wait()
        second = snapshot(2)
        learner.broadcasts.expect(frozenset({"server-0", "server-1"}))
        learner.broadcasts._patience_seconds = WAIT_SECONDS
        await learner.push(servers, second)
        assert [server.received("collective") for server in servers] == [second.manifest.size_bytes] * 2


async def test_servers_fetch_when_the_learner_fails_in_mid_broadcast(monkeypatch: pytest.MonkeyPatch) -> None:
    send = BroadcastGroup.send

    def failing(group: BroadcastGroup, parts: Sequence[Part]) -> Generator[int]:
        sizes = send(group, parts)
        yield next(sizes)
        raise receiving.InvalidDataError("planted")

    async with fleet(2, patience_seconds=8.0) as (learner, servers):
        first = snapshot(1)
        with monkeypatch.context() as broken:
            broken.setattr(BroadcastGroup, "send", failing)
            await learner.push(servers, first)
        assert learner.sent("grpc") == 2 * first.manifest.size_bytes
        learner.broadcasts._patience_seconds = WAIT_SECONDS
        second = snapshot(2)
        await learner.push(servers, second)
        assert [server.received("collective") for server in servers] == [second.manifest.size_bytes] * 2


async def test_servers_fetch_when_broadcasts_have_ended_for_a_reason_nobody_thought_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def impossible(_group: BroadcastGroup, _parts: Sequence[Part]) -> Generator[int]:
        raise ZeroDivisionError
        yield

    # A server that is still forming the group, with another that has given it up, waits for as long as its patience.
    async with fleet(2, patience_seconds=8.0) as (learner, servers):
        monkeypatch.setattr(BroadcastGroup, "send", impossible)
        for version in (snapshot(1), snapshot(2)):
            await learner.push(servers, version)
        assert "ZeroDivisionError" in caplog.text
        assert learner.sent("grpc") == 2 * 2 * snapshot(1).manifest.size_bytes


async def test_who_waits_for_an_overtaken_version_is_told() -> None:
    async with broadcaster() as learner:
        first = snapshot(1)
        await learner.publisher.publish(first)
        learner.broadcasts.expect(frozenset({"server-0", "another"}))
        waiting = asyncio.create_task(seat_of(learner, "server-0", first))
        await until(lambda: learner.broadcasts._rounds)
        await learner.publisher.publish(snapshot(2))
        with pytest.raises(NotFoundError, match="newer version"):
            await waiting
        with pytest.raises(NotFoundError, match="no longer the newest"):
            await seat_of(learner, "server-0", first)


async def test_a_server_that_gives_up_waiting_has_no_seat() -> None:
    async with broadcaster(patience_seconds=0.2) as learner:
        first = snapshot(1)
        await learner.publisher.publish(first)
        learner.broadcasts.expect(frozenset({"server-0", "server-1"}))
        leaving = asyncio.create_task(seat_of(learner, "server-0", first))
        await until(lambda: learner.broadcasts._rounds and learner.broadcasts._rounds[0].peers)
        leaving.cancel()
        await until(lambda: not learner.broadcasts._rounds[0].peers)
        seat = await seat_of(learner, "server-1", first)
        assert (seat.rank, seat.world_size) == (1, 2)


@pytest.mark.parametrize(
    ("transports", "said"),
    [(("collective", "grpc"), "it has gloo/1.0"), (("grpc",), "no library for them")],
)
async def test_a_server_with_another_library_or_none_fetches(
    transports: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(receiving, "LIBRARY", "gloo/1.0")
    async with broadcaster() as learner:
        server = member(learner, 0, transports=transports)
        first = snapshot(1)
        await learner.publisher.publish(first)
        await server.serves(first)
        await server.stop()
        assert learner.sent("grpc") == first.manifest.size_bytes
        assert server.fallbacks("collective") == 0
        assert said in caplog.text


async def test_a_learner_that_does_not_broadcast_says_so() -> None:
    publisher = Publisher(RUN, arithmetic.SIGNATURE, LearnerMetrics(CollectorRegistry()))
    with pytest.raises(PreconditionError, match="does not broadcast"):
        await publisher.JoinBroadcast(policy_pb2.JoinBroadcastRequest(), None)  # type: ignore[arg-type]
