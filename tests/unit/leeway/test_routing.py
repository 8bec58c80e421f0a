"""Packed routing: the same ids in the same order, near their entropy, and nothing from a peer is believed."""

from __future__ import annotations

import tracemalloc
from random import Random

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from leeway import codec
from leeway.codec.routing import MAX_EXPANSION, MAX_UNPACKED_BYTES, pack_routing, unpack_routing
from leeway.errors import InvalidDataError
from leeway.types import Array, Column, ColumnKind, TrajectoryChunk
from leeway.v1 import common_pb2, trajectory_pb2
from tests.harness.inputs import Inputs


def routing(n: int, layers: int, experts: int, k: int, seed: int = 0) -> Array:
    """Distinct experts for each token, some of them much likelier than others."""
    random = np.random.default_rng(seed)
    popularity = random.normal(0, 1, (layers, experts))
    keys = popularity + random.gumbel(size=(n, layers, experts))
    return np.argsort(-keys, axis=-1)[..., :k].astype(np.uint8 if experts <= 256 else np.uint16)


def packed(ids: Array) -> bytes:
    made = pack_routing(ids)
    assert made is not None
    return made


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 70),
    layers=st.integers(1, 4),
    k=st.integers(1, 5),
    experts=st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17, 128, 256, 257, 512, 513, 65536]),
    seed=st.integers(0, 99),
)
def test_ids_come_back_in_their_order(n: int, layers: int, k: int, experts: int, seed: int) -> None:
    dtype = np.dtype(np.uint8 if experts <= 256 else np.uint16)
    ids = np.random.default_rng(seed).integers(0, experts, (n, layers, k)).astype(dtype)
    made = pack_routing(ids)
    if made is None:
        return
    assert len(made) < ids.nbytes
    back = unpack_routing(made, dtype, ids.shape)
    assert back.dtype == ids.dtype
    np.testing.assert_array_equal(back, ids)


@pytest.mark.parametrize(("experts", "k"), [(128, 8), (8, 2), (512, 10)])
def test_long_columns_come_near_their_entropy(experts: int, k: int) -> None:
    ids = routing(4096, 4, experts, k)
    bits = 0.0
    for layer in range(4):
        counts = np.bincount(ids[:, layer].ravel(), minlength=experts)
        share = counts[counts > 0] / counts.sum()
        bits -= float((share * np.log2(share)).sum()) * 4096 * k
    assert len(packed(ids)) * 8 <= 1.05 * bits


def test_what_would_not_shrink_or_shrinks_too_much_stays_plain() -> None:
    random = np.random.default_rng(0)
    assert pack_routing(random.integers(0, 256, (512, 2, 4), np.uint8)) is None
    assert pack_routing(np.zeros((4096, 8, 8), np.uint8)) is None
    assert pack_routing(np.zeros((0, 8, 8), np.uint8)) is None


def test_a_column_travels_packed_or_plain() -> None:
    ids = routing(300, 3, 16, 2)
    chunk = TrajectoryChunk((Column(ColumnKind.ROUTING, 5, 305, ids),))
    plain, small = codec.encode_chunk(chunk), codec.encode_chunk(chunk, pack=True)
    assert len(small) < 0.6 * len(plain)
    for data in (plain, small):
        np.testing.assert_array_equal(codec.decode_chunk(data).columns[0].values, ids)


def test_only_routing_may_be_packed_and_only_in_known_ways() -> None:
    chunk = TrajectoryChunk((Column(ColumnKind.ROUTING, 0, 300, routing(300, 3, 16, 2)),))
    for kind, encoding in ((ColumnKind.TOKEN_IDS, 1), (ColumnKind.ROUTING, 2)):
        message = trajectory_pb2.TrajectoryChunk.FromString(codec.encode_chunk(chunk, pack=True))
        message.columns[0].kind = int(kind)  # type: ignore[assignment]
        message.columns[0].encoding = encoding  # type: ignore[assignment]
        with pytest.raises(InvalidDataError, match="encoding"):
            codec.decode_chunk(message.SerializeToString())


IDS = routing(300, 3, 16, 2)


@pytest.mark.parametrize(
    ("data", "dtype", "shape", "why"),
    [
        (packed(IDS)[:-1], "uint8", IDS.shape, "cannot be read|shorter"),
        (packed(IDS) + b"x", "uint8", IDS.shape, "cannot be read"),
        (b"", "uint8", IDS.shape, "times its 0 bytes"),
        (b"\x03" + packed(IDS)[1:], "uint8", IDS.shape, "ids of 3 bits"),
        (b"\x09" + packed(IDS)[1:], "uint8", IDS.shape, "ids of 9 bits"),
        (b"\x08" + packed(IDS)[1:], "uint8", IDS.shape, "another size"),
        (packed(IDS), "uint8", (301, 3, 2), "another size"),
        (packed(IDS), "uint8", (0, 3, 2), "not uint8"),
        (packed(IDS), "uint8", (900, 2), "not uint8"),
        (packed(IDS), "int32", IDS.shape, "not int32"),
        (packed(IDS), "uint8", (1 << 14, 1 << 14, 2), "at most 64 MiB"),
        (b"\x08" + bytes(40), "uint8", IDS.shape, "cannot be read|times"),
    ],
)
def test_what_is_not_packed_routing_is_refused(data: bytes, dtype: str, shape: tuple[int, ...], why: str) -> None:
    with pytest.raises(InvalidDataError, match=why):
        unpack_routing(data, np.dtype(dtype), shape)


def test_a_small_message_never_takes_much_memory() -> None:
    content = bytes(MAX_UNPACKED_BYTES)
    bomb = b"\x08" + zstandard.ZstdCompressor().compress(content)
    lying = b"\x08" + zstandard.ZstdCompressor().compress(content + content)
    shape = (MAX_UNPACKED_BYTES // 4, 2, 2)
    small = (len(bomb) * MAX_EXPANSION // 4, 2, 2)
    tracemalloc.start()
    try:
        for data, claimed in ((bomb, shape), (lying, shape), (lying, small)):
            with pytest.raises(InvalidDataError):
                unpack_routing(data, np.dtype(np.uint8), claimed)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_damaged_bytes_are_refused_or_read_as_ids() -> None:
    good = [packed(routing(200, 2, experts, k)) for experts, k in ((128, 8), (8, 2), (512, 3))]
    shapes = [("uint8", (200, 2, 8)), ("uint8", (200, 2, 2)), ("uint16", (200, 2, 3))]
    rng = Random(0)
    inputs = Inputs(rng)
    refused = 0
    for _ in range(3000):
        place = rng.randrange(3)
        dtype, shape = shapes[place]
        message = common_pb2.Column(kind=5, end_token=200, encoding=1)  # type: ignore[arg-type]
        message.values.dtype = 1 + (dtype == "uint16")  # type: ignore[assignment]
        message.values.shape.extend(shape)
        message.values.data = inputs.damaged(good[place])
        data = trajectory_pb2.TrajectoryChunk(columns=[message]).SerializeToString()
        try:
            values = codec.decode_chunk(data).columns[0].values
        except InvalidDataError:
            refused += 1
        else:
            assert (values.shape, values.dtype.name) == (shape, dtype)
    assert refused > 1000
