"""Weights broadcast by carriers, as over NCCL, from the publisher to engines; here the carriers' device is the CPU."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import pytest

from inference_server.weights import collective as receiving
from leeway.weights.broadcast.carried import Carried, CarriedGroup
from leeway.weights.broadcast.library import Part
from tests.collective.cpu_carrier import cpu_library
from tests.collective.members import prepared
from tests.contract.broadcasting import PIECE_BYTES, all_have, all_serve, fleet, snapshot, until


@pytest.fixture
def library() -> Generator[Carried]:
    """The learner's."""
    made = cpu_library(PIECE_BYTES)
    prepared([made])
    yield made
    made.close()


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> list[Carried]:
    """The servers', which close them."""
    made: list[Carried] = []

    def make(_name: str) -> Carried:
        made.append(cpu_library(PIECE_BYTES))
        return made[-1]

    monkeypatch.setattr(receiving, "make_library", make)
    return made


async def test_snapshot_and_deltas_reach_all_servers_bit_for_bit(library: Carried, others: list[Carried]) -> None:
    async with fleet(2, library=library) as (learner, servers):
        first = snapshot(1)
        await learner.publisher.publish(first)
        await all_have(learner, servers, first)
        group = learner.group
        second = snapshot(2, first)
        await learner.publisher.publish(second)
        await all_have(learner, servers, second)
        assert learner.group == group != 0
        assert learner.sent("grpc") == learner.sent("grpc", "delta") == learner.failed == 0
        for server in servers:
            assert server.received("collective") == first.manifest.size_bytes
            assert 0 < server.received("collective", "delta") == learner.sent("collective", "delta")
    assert len(others) == 2
    assert not any(one.usable for one in (library, *others))


async def test_all_fetch_what_a_dead_carrier_interrupts_and_the_next_version_is_broadcast_again(
    library: Carried, others: list[Carried], monkeypatch: pytest.MonkeyPatch
) -> None:
    send = CarriedGroup.send

    def striking(group: CarriedGroup, parts: Sequence[Part]) -> Generator[int]:
        for count, size in enumerate(send(group, parts)):
            if count == 1:
                carrier = others[0]._carrier
                assert carrier is not None
                carrier._process.kill()
                carrier._process.wait()
            yield size

    async with fleet(2, library=library) as (learner, servers):
        first, second = snapshot(1), snapshot(2)
        with monkeypatch.context() as struck:
            struck.setattr(CarriedGroup, "send", striking)
            await learner.publisher.publish(first)
            await all_serve(servers, first)
            await until(lambda: learner.failed == 1)
        assert learner.sent("grpc") == 2 * first.manifest.size_bytes
        prepared([library, *others])
        await learner.publisher.publish(second)
        await all_have(learner, servers, second)
        assert [server.received("collective") for server in servers] == [second.manifest.size_bytes] * 2
        assert learner.failed == 1


async def test_nobody_waits_for_a_carrier_that_starts(library: Carried, others: list[Carried]) -> None:
    async with fleet(1, library=library) as (learner, servers):
        for starting in (library, others[0]):
            working = starting._carrier
            starting._carrier = None
            wanted = snapshot(1 if starting is library else 2)
            await learner.publisher.publish(wanted)
            await all_serve(servers, wanted)
            starting._carrier = working
        assert learner.sent("grpc") == 2 * wanted.manifest.size_bytes
        assert learner.sent("collective") == learner.failed == 0
        third = snapshot(3)
        await learner.publisher.publish(third)
        await all_have(learner, servers, third)
        assert servers[0].received("collective") == third.manifest.size_bytes


@pytest.mark.parametrize("whose", ["learner", "server"])
async def test_a_group_is_not_used_again_when_what_carried_it_has_died(
    library: Carried, others: list[Carried], whose: str
) -> None:
    async with fleet(1, library=library) as (learner, servers):
        dying = library if whose == "learner" else others[0]
        await learner.publisher.publish(snapshot(1))
        await all_have(learner, servers, snapshot(1))
        assert dying._carrier is not None
        dying._carrier._process.kill()
        dying._carrier._process.wait()
        await learner.publisher.publish(snapshot(2))
        await all_serve(servers, snapshot(2))
        assert (learner.group == 0) == (whose == "learner"), "another server may still hold it and ask for it again"
        prepared([dying])
        await learner.publisher.publish(snapshot(3))
        await all_serve(servers, snapshot(3))
        assert servers[0].received("collective") == 2 * snapshot(1).manifest.size_bytes
        assert learner.failed == 0
