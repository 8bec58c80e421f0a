"""Sparse deltas: bit-exact whatever the bits, smaller than a snapshot, and never more than was announced."""

from __future__ import annotations

import itertools
import struct
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from leeway.errors import CorruptDataError
from leeway.types import PolicyVersion, WeightManifest, WeightSnapshot
from leeway.weights import deltas
from leeway.weights.deltas import apply_deltas, encode_delta
from leeway.weights.digests import tensor_entry, weights_digest

Tensors = dict[str, tuple[str, NDArray[np.unsignedinteger]]]  # dtype's name and bit patterns
WORDS = {"uint8": "<u1", "bfloat16": "<u2", "float16": "<u2", "float32": "<u4", "float64": "<u8"}
# +0, -0, infinities, quiet and signalling NaNs with payloads, the least and the greatest numbers of each width.
ODD = {
    "<u1": [0, 1, 0x7F, 0x80, 0xFF],
    "<u2": [0, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFF81, 0x7C00, 0x7E01, 1, 0x7FFF, 0xFFFF],
    "<u4": [0, 0x80000000, 0x7F800000, 0x7FC00001, 0x7F800001, 0xFFC0DEAD, 1, 0xFFFFFFFF],
    "<u8": [0, 1 << 63, 0x7FF0 << 48, (0x7FF8 << 48) | 7, (0x7FF0 << 48) | 1, 1, (1 << 64) - 1],
}


def snapshot(tensors: Tensors, step: int = 0) -> WeightSnapshot:
    entries, buffers = [], []
    for name in sorted(tensors, key=str.encode):
        dtype, words = tensors[name]
        data = words.astype(WORDS[dtype]).tobytes()
        entries.append(tensor_entry(name, dtype, words.shape, data))
        buffers.append(data)
    manifest = WeightManifest(tuple(entries))
    return WeightSnapshot(PolicyVersion("run", 1, step, weights_digest(manifest)), 1, manifest, buffers)


def applied(base: WeightSnapshot, payloads: Sequence[bytes], target: WeightSnapshot) -> list[bytes]:
    return [bytes(buffer) for buffer in apply_deltas(base, payloads, target.manifest, target.version.digest)]


def noise(seed: int, count: int) -> NDArray[np.uint16]:
    return np.random.default_rng(seed).integers(0, 1 << 16, count, dtype=np.uint16)


def stepped(words: NDArray[np.uint16], seed: int, fraction: float) -> NDArray[np.uint16]:
    """Some elements one unit in the last place further, as an optimizer's step makes them."""
    generator = np.random.default_rng(seed)
    changed = words.copy()
    moved = generator.random(len(words)) < fraction
    changed[moved] += generator.choice(np.array([1, 0xFFFF], np.uint16), np.count_nonzero(moved))
    return changed


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensors, Tensors]:
    """Two versions of one model whose bits are adversarial, ties and empty tensors among them."""
    padding = "uint8", np.zeros(40_000, np.uint8)  # so that a delta is smaller than a snapshot
    base: Tensors = {"padding": padding}
    target: Tensors = {"padding": padding}
    for index in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(sorted(WORDS)))
        word = WORDS[dtype]
        patterns = st.sampled_from(ODD[word]) | st.integers(0, (1 << 8 * np.dtype(word).itemsize) - 1)
        count = draw(st.sampled_from([0, 1, 2, 7, 300]))
        old = np.array(draw(st.lists(patterns, min_size=count, max_size=count)), dtype=word)
        new = old.copy()
        match draw(st.sampled_from(["none", "all", "one", "some"])):
            case "all":
                new[:] = np.array(draw(st.lists(patterns, min_size=count, max_size=count)), dtype=word)
            case "one" if count:
                new[draw(st.integers(0, count - 1))] = draw(patterns)
            case "some" if count:
                for at in draw(st.lists(st.integers(0, count - 1), max_size=20)):
                    new[at] = draw(patterns)
            case _:
                pass
        base[f"tensor.{index}"], target[f"tensor.{index}"] = (dtype, old), (dtype, new)
    return base, target


@given(pairs(), st.integers(1, 4))
@settings(deadline=None, max_examples=150)
def test_a_delta_is_bit_exact_whatever_the_bits(pair: tuple[Tensors, Tensors], threads: int) -> None:
    base, target = snapshot(pair[0]), snapshot(pair[1], 1)
    payload = encode_delta(base, target, threads)
    assert payload is not None
    assert len(payload) < target.manifest.size_bytes
    assert applied(base, [payload], target) == [bytes(buffer) for buffer in target.buffers]
    assert [bytes(buffer) for buffer in base.buffers] == [bytes(buffer) for buffer in snapshot(pair[0]).buffers]


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.02, 0.5, 0.9, 1.0])
def test_blocks_and_gaps_of_every_density(monkeypatch: pytest.MonkeyPatch, fraction: float) -> None:
    monkeypatch.setattr(deltas, "BLOCK_ELEMENTS", 1000)
    old = noise(1, 25_001)
    new = stepped(old, 2, fraction)
    new[0] ^= 0x8000
    new[-1] ^= 0x8000  # a gap far beyond 255 when little else changes
    cuts = [0, 1, 1, 999, 1000, 2500, 20_000, 25_001]
    parts = [(f"t{index:02}", slice(start, end)) for index, (start, end) in enumerate(itertools.pairwise(cuts))]
    base = snapshot({name: ("bfloat16", old[part]) for name, part in parts})
    target = snapshot({name: ("bfloat16", new[part]) for name, part in parts}, 1)
    payload = encode_delta(base, target)
    assert payload is not None
    assert applied(base, [payload], target) == list(target.buffers)


def test_a_step_in_bfloat16_takes_a_few_percent() -> None:
    old = noise(3, 1_000_000)
    for fraction, limit in [(0.015, 0.013), (0.09, 0.055), (1.0, 0.13)]:
        base = snapshot({"w": ("bfloat16", old)})
        target = snapshot({"w": ("bfloat16", stepped(old, 4, fraction))}, 1)
        payload = encode_delta(base, target)
        assert payload is not None
        assert len(payload) < limit * target.manifest.size_bytes


def test_a_full_push_when_that_is_smaller() -> None:
    base = snapshot({"w": ("float32", np.random.default_rng(1).integers(0, 1 << 32, 5000, np.uint32))})
    target = snapshot({"w": ("float32", np.random.default_rng(2).integers(0, 1 << 32, 5000, np.uint32))}, 1)
    assert encode_delta(base, target) is None
    nothing = snapshot({"w": ("bfloat16", noise(1, 0))})
    assert encode_delta(nothing, nothing) is None


def test_no_delta_between_models_of_other_tensors() -> None:
    one = snapshot({"w": ("bfloat16", noise(1, 5000))})
    for other in ({"w": ("float16", noise(1, 5000))}, {"v": ("bfloat16", noise(1, 5000))}, {}):
        assert encode_delta(one, snapshot(other)) is None
    with pytest.raises(CorruptDataError, match="other tensors"):
        applied(one, [], snapshot({"v": ("bfloat16", noise(1, 5000))}))


def chain(length: int) -> tuple[list[WeightSnapshot], list[bytes]]:
    words = [noise(5, 40_000)]
    for step in range(length):
        words.append(stepped(words[-1], 10 + step, 0.02))
    versions = [snapshot({"w": ("bfloat16", tensor)}, step) for step, tensor in enumerate(words)]
    payloads = [encode_delta(one, other) for one, other in itertools.pairwise(versions)]
    return versions, [payload for payload in payloads if payload is not None]


def test_a_chain_of_deltas_leads_to_its_end_and_in_its_order_only() -> None:
    versions, payloads = chain(3)
    assert applied(versions[0], payloads, versions[3]) == list(versions[3].buffers)
    assert applied(versions[3], [], versions[3]) == list(versions[3].buffers)
    for wrong in (payloads[1:], payloads[:2], payloads[::-1], [payloads[0], *payloads], []):
        with pytest.raises(CorruptDataError):
            applied(versions[0], wrong, versions[3])


def test_a_tensor_that_went_away_and_came_back() -> None:
    (one, other), (there,) = chain(1)
    back = encode_delta(other, one)
    assert back is not None
    assert applied(one, [there, back], one) == list(one.buffers)


def test_a_base_that_is_not_what_it_says_is_noticed() -> None:
    (base, target), (payload,) = chain(1)
    wrong = bytearray(base.buffers[0])
    wrong[12_345] ^= 1
    spoilt = WeightSnapshot(base.version, 1, base.manifest, [bytes(wrong)])
    with pytest.raises(CorruptDataError, match="differ from their digest"):
        applied(spoilt, [payload], target)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_a_corrupted_payload_is_noticed_and_nothing_else_happens(data: st.DataObject) -> None:
    (base, target), (payload,) = CHAIN
    bad = bytearray(payload)
    match data.draw(st.sampled_from(["flip", "cut", "extend", "repeat", "zero"])):
        case "flip":
            bad[data.draw(st.integers(0, len(bad) - 1))] ^= data.draw(st.integers(1, 255))
        case "cut":
            del bad[data.draw(st.integers(0, len(bad) - 1)) :]
        case "extend":
            bad += data.draw(st.binary(min_size=1, max_size=40))
        case "repeat":
            bad += bad[deltas._HEADER.size :]
        case _:
            at = data.draw(st.integers(0, len(bad) - 8))
            bad[at : at + 8] = bytes(8) if any(bad[at : at + 8]) else b"\xff" * 8
    try:
        result = applied(base, [bytes(bad)], target)
    except CorruptDataError:
        return
    assert result == list(target.buffers)  # a flip that zstd does not look at


CHAIN = chain(1)


def test_a_hostile_length_allocates_nothing() -> None:
    (base, target), (payload,) = CHAIN
    block = deltas._HEADER.size
    stream = block + deltas._BLOCK.size
    hostile = [
        payload[:block] + deltas._BLOCK.pack(2, 0, 0, 0xFFFFFFFF, 0) + payload[stream:],  # elements
        payload[:block] + deltas._BLOCK.pack(2, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF) + payload[stream:],
        payload[:block] + deltas._BLOCK.pack(2, 0, 0xFFFFFFFF, 10, 0) + payload[stream:],
        payload[: block - 4] + struct.pack("<I", 0xFFFFFFFF) + payload[block:],  # blocks
        payload[:stream] + struct.pack("<I", 0xFFFFFFFF) + payload[stream + 4 :],  # a stream
    ]
    bomb = zstandard.compress(bytes(64 << 20))  # more elements than the block has, and a stream to match
    many = deltas._BLOCK.pack(2, 0, 0, 64 << 20, 0)
    hostile.append(payload[:block] + many + struct.pack("<I", len(bomb)) + bomb + payload[stream:])
    for bomb in (zstandard.compress(bytes(1 << 30)), zstandard.ZstdCompressor(write_content_size=False).compress(b"x")):
        hostile.append(payload[:stream] + struct.pack("<I", len(bomb)) + bomb + payload[stream:])
    for bad in hostile:
        tracemalloc.start()
        try:
            with pytest.raises(CorruptDataError):
                applied(base, [bad], target)
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()
