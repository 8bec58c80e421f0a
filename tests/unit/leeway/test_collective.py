"""How parts are cut for a broadcast, and which configurations may ask for one."""

from __future__ import annotations

import asyncio
import importlib.util

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leeway.config import NetworkOptions
from leeway.errors import ConfigError, UnavailableError
from leeway.weights.broadcast.gloo import Gloo
from leeway.weights.broadcast.pieces import gather, pieces
from leeway.weights.broadcast.rendezvous import Rendezvous
from leeway.weights.transports import broadcast_library, uses_zeromq


@given(st.integers(0, 5000), st.integers(1, 1100))
def test_pieces_follow_each_other_and_are_all(size_bytes: int, piece_bytes: int) -> None:
    ranges = list(pieces(size_bytes, piece_bytes))
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges)][: len(ranges)]
    assert all(start < end <= start + piece_bytes for start, end in ranges)
    assert (ranges[-1][1] if ranges else 0) == size_bytes


@given(st.lists(st.binary(max_size=9), max_size=12), st.data())
def test_a_piece_holds_the_bytes_of_its_range(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    memory = memoryview(bytearray(end - start))
    gather(parts, start, memory)
    assert bytes(memory) == whole[start:end]


def options(**values: object) -> NetworkOptions:
    return NetworkOptions.model_validate({"weights": "collective", **values})


@pytest.mark.parametrize(("weights", "library"), [("collective", "gloo"), ("collective-nccl", "nccl")])
def test_broadcasts_stay_on_this_host_unless_insecure(weights: str, library: str) -> None:
    assert broadcast_library(options(weights=weights)) == library
    assert broadcast_library(options(weights=weights, policy="learner:7402", insecure=True)) == library
    with pytest.raises(ConfigError, match=f'"{weights}" would send.*insecure = true'):
        broadcast_library(options(weights=weights, policy="learner:7402"))
    with pytest.raises(ConfigError, match="names no host"):
        broadcast_library(options(weights=weights, policy="0.0.0.0:7402", insecure=True))


def test_broadcasts_need_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="needs torch"):
        broadcast_library(options())
    assert broadcast_library(options(weights="grpc")) is None


@pytest.mark.parametrize(
    ("weights", "policy", "zeromq"),
    [
        ("auto", "127.0.0.1:1", True),
        ("auto", "learner:1", False),
        ("zmq", "learner:1", True),
        ("grpc", "127.0.0.1:1", False),
        ("collective", "127.0.0.1:1", False),
        ("collective-nccl", "127.0.0.1:1", False),
    ],
)
def test_zeromq_is_for_one_host(weights: str, policy: str, zeromq: bool) -> None:
    assert uses_zeromq(options(weights=weights, policy=policy)) == zeromq


async def test_a_member_that_takes_nothing_is_noticed_by_the_end() -> None:
    meeting = Rendezvous("127.0.0.1")
    sender, member = await asyncio.gather(
        *(asyncio.to_thread(Gloo().join, meeting.address, 7, rank, 2, 1.0) for rank in range(2))
    )
    with pytest.raises(UnavailableError, match="broke"):
        await asyncio.to_thread(lambda: list(sender.send([b"one piece"])))
    member.close()
