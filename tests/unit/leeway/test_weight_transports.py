"""How parts are cut for a broadcast, and which configurations may ask for one."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leeway.config import NetworkOptions
from leeway.errors import UnavailableError
from leeway.weights.broadcast import BroadcastGroup, Rendezvous, gather, pieces
from leeway.weights.transports import TRANSPORTS, load_side
from tests.deadlines import WAIT_SECONDS


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


@pytest.mark.parametrize(
    ("weights", "policy", "transports"),
    [
        ("auto", "127.0.0.1:1", ("zmq", "grpc")),
        ("auto", "learner:1", ("grpc",)),
        ("zmq", "learner:1", ("zmq", "grpc")),
        ("grpc", "127.0.0.1:1", ("grpc",)),
        ("collective", "127.0.0.1:1", ("collective", "grpc")),
    ],
)
def test_zeromq_is_for_one_host(weights: str, policy: str, transports: tuple[str, ...]) -> None:
    assert options(weights=weights, policy=policy).weight_transports == transports


def test_every_transport_is_there_on_both_sides() -> None:
    for name, entry in TRANSPORTS.items():
        assert vars(load_side(entry.transport))["name"] == name
        assert entry.outlet is None or callable(load_side(entry.outlet))


def formed(meeting: Rendezvous, number: int, size: int, patience_seconds: float) -> list[BroadcastGroup]:
    """A group of peers within this process; the first one sends."""
    with ThreadPoolExecutor(size) as threads:
        joining = [
            threads.submit(BroadcastGroup, meeting.address, number, rank, size, patience_seconds)
            for rank in range(size)
        ]
        return [future.result() for future in joining]


def parts_of(size_bytes: int) -> list[bytes]:
    """In parts that end anywhere, some of them empty."""
    whole = random.Random(size_bytes).randbytes(size_bytes)
    cuts = sorted(random.Random(0).choices(range(size_bytes + 1), k=5))
    return [whole[start:end] for start, end in zip([0, *cuts], [*cuts, size_bytes], strict=True)]


def received(group: BroadcastGroup, size_bytes: int) -> bytes:
    memory = bytearray(size_bytes)
    ends = [0, *group.receive(memoryview(memory))]
    assert ends == sorted(set(ends))
    assert ends[-1] == size_bytes
    return bytes(memory)


def test_every_byte_arrives_and_a_group_is_used_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    piece = 10_000
    monkeypatch.setattr(BroadcastGroup, "piece_bytes", piece)
    meeting = Rendezvous("127.0.0.1")
    for number, size in ((1, 3), (2, 2)):
        sender, *receivers = formed(meeting, number, size, WAIT_SECONDS)
        for size_bytes in (0, 1, piece - 1, piece, piece + 1, 70 * piece + 3, 1, 0):
            parts = parts_of(size_bytes)
            with ThreadPoolExecutor(len(receivers)) as threads:
                receiving = [threads.submit(received, receiver, size_bytes) for receiver in receivers]
                assert sum(sender.send(parts)) == size_bytes
            assert [future.result() for future in receiving] == [b"".join(parts)] * len(receivers)


def test_a_peer_that_takes_nothing_ends_the_group_within_the_patience() -> None:
    sender, peer = formed(Rendezvous("127.0.0.1"), 7, 2, 1.0)
    with pytest.raises(UnavailableError):
        list(sender.send([b"one piece"]))
    peer.close()


def test_who_never_comes_is_waited_for_within_the_patience() -> None:
    with pytest.raises(UnavailableError):
        BroadcastGroup(Rendezvous("127.0.0.1").address, 7, 0, 2, 0.2)


def test_a_peer_that_closes_ends_the_group_for_all_before_their_patience_does() -> None:
    sender, peer = formed(Rendezvous("127.0.0.1"), 7, 2, 100 * WAIT_SECONDS)
    peer.close()
    for group in (peer, sender):
        with pytest.raises(UnavailableError):
            list(group.send([b"one piece"]))
