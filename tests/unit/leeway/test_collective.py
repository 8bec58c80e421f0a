"""How parts are cut for a broadcast, and which configurations may ask for one."""

from __future__ import annotations

import asyncio
import importlib.util

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leeway.collective import PIECE_BYTES, Group, Rendezvous, _gather, pieces
from leeway.config import NetworkOptions
from leeway.errors import ConfigError, UnavailableError
from leeway.weight_transports import uses_broadcasts, uses_zeromq


@given(st.integers(0, 5 * PIECE_BYTES))
def test_pieces_follow_each_other_and_are_all(size_bytes: int) -> None:
    ranges = list(pieces(size_bytes))
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges)][: len(ranges)]
    assert all(start < end <= start + PIECE_BYTES for start, end in ranges)
    assert (ranges[-1][1] if ranges else 0) == size_bytes


@given(st.lists(st.binary(max_size=9), max_size=12), st.data())
def test_a_piece_holds_the_bytes_of_its_range(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    memory = memoryview(bytearray(end - start))
    _gather(parts, start, memory)
    assert bytes(memory) == whole[start:end]


def options(**values: object) -> NetworkOptions:
    return NetworkOptions.model_validate({"weights": "collective", **values})


def test_broadcasts_stay_on_this_host_unless_insecure() -> None:
    assert uses_broadcasts(options())
    assert uses_broadcasts(options(policy="learner:7402", insecure=True))
    with pytest.raises(ConfigError, match="insecure = true"):
        uses_broadcasts(options(policy="learner:7402"))
    with pytest.raises(ConfigError, match="names no host"):
        uses_broadcasts(options(policy="0.0.0.0:7402", insecure=True))


def test_broadcasts_need_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="needs torch"):
        uses_broadcasts(options())
    assert not uses_broadcasts(options(weights="grpc"))


@pytest.mark.parametrize(
    ("weights", "policy", "zeromq"),
    [
        ("auto", "127.0.0.1:1", True),
        ("auto", "learner:1", False),
        ("zmq", "learner:1", True),
        ("grpc", "127.0.0.1:1", False),
        ("collective", "127.0.0.1:1", False),
    ],
)
def test_zeromq_is_for_one_host(weights: str, policy: str, zeromq: bool) -> None:
    assert uses_zeromq(options(weights=weights, policy=policy)) == zeromq


async def test_a_member_that_takes_nothing_is_noticed_by_the_end() -> None:
    meeting = Rendezvous("127.0.0.1")
    address = meeting.host, meeting.port
    sender, member = await asyncio.gather(
        asyncio.to_thread(Group, meeting.store, 7, 0, 2, meeting.host, 1.0),
        asyncio.to_thread(Group.join, address, 7, 1, 2, 1.0),
    )
    with pytest.raises(UnavailableError, match="broke"):
        await asyncio.to_thread(lambda: list(sender.send([b"one piece"])))
    member.close()
