"""How parts are cut for a broadcast, and which configurations may ask for one."""

from __future__ import annotations

import importlib.util

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leeway.collective import ALONE_BYTES, PIECE_BYTES, _between, _ends, pieces
from leeway.config import NetworkOptions
from leeway.errors import ConfigError
from leeway.weight_transports import uses_broadcasts, uses_zeromq

SIZES = st.lists(
    st.one_of(
        st.integers(0, 3),
        st.integers(0, ALONE_BYTES - 1),
        st.sampled_from([ALONE_BYTES, ALONE_BYTES + 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES]),
    ),
    max_size=40,
)


@given(SIZES)
def test_pieces_follow_each_other_and_are_all(sizes: list[int]) -> None:
    ranges = list(pieces(sizes))
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges)][: len(ranges)]
    assert all(start < end <= start + PIECE_BYTES + ALONE_BYTES for start, end in ranges)
    assert (ranges[-1][1] if ranges else 0) == sum(sizes)


@given(SIZES)
def test_a_part_of_some_size_shares_no_piece(sizes: list[int]) -> None:
    ends = list(_ends([bytes(size) for size in sizes]))
    large = {end - size for size, end in zip(sizes, ends, strict=True) if size >= ALONE_BYTES}
    large |= {end for size, end in zip(sizes, ends, strict=True) if size >= ALONE_BYTES}
    for start, end in pieces(sizes):
        assert not any(start < edge < end for edge in large)


def test_a_piece_holds_the_bytes_of_its_range() -> None:
    sizes = [0, 5, 0, ALONE_BYTES + 3, 7, 0, 9, PIECE_BYTES + 11, 1, 0]
    parts = [bytes([1 + index]) * size for index, size in enumerate(sizes)]
    whole, ends = b"".join(parts), list(_ends(parts))
    for start, end in pieces(sizes):
        assert bytes(_between(parts, ends, start, end)) == whole[start:end]


def test_small_parts_travel_together() -> None:
    assert list(pieces([1000] * 100)) == [(0, 100_000)]
    assert len(list(pieces([200_000] * 100))) == 3


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
