"""Lossless sparse deltas: what changed bit-wise between two published versions.

    base, target ── strips, one per element size ──> blocks of at most 2^22 elements ── changed? ──> positions, values
                                                                                                          │ zstd
    payload = header ‖ block ‖ block ...   (a block without a change is left out)  <──────────────────────┘

A *strip* is all elements of one size in manifest order, as unsigned integers u; element types of one size are alike. In
a block, element i changed if u_i differs from v_i of the base. With w bits per element:

    value      z_i = zigzag(u_i - v_i mod 2^w), zigzag(d) = 2d for d >= 0 and -2d - 1 below, d read as signed;
               a step of one unit in the last place is 1 or 2 whatever the element, and any bit pattern has its z
    position   the gap to the changed element before it: the number of unchanged ones between the two

Gaps are bytes, where 255 says that a 32-bit number to be added follows in a stream of its own. Values are split into
byte planes. Every stream is a zstd frame. A block of which most elements changed is *dense*: z_i of all, no gaps.

The receiver adds z to what it holds and checks the result against the target's digests, so that it is the target bit
for bit or nothing. Nothing in a payload is trusted: sizes are known from the manifest before anything is allocated.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Final

import numpy as np
import zstandard
from numpy.typing import NDArray

from leeway.codec.dtypes import element_size_bytes
from leeway.errors import CorruptDataError
from leeway.types import WeightManifest, WeightSnapshot
from leeway.weights.digests import verify_weights

BLOCK_ELEMENTS: Final = 1 << 22

_MAGIC: Final = b"LWDELTA1"
_HEADER: Final = struct.Struct("<8s32s32sI")  # magic, digest of base, digest of target, blocks
_BLOCK: Final = struct.Struct("<BBIII")  # element size, whether dense, index in its strip, changed elements, far gaps
_LENGTH: Final = struct.Struct("<I")  # bytes of one compressed stream
_FAR: Final = 255
_DENSE_ABOVE: Final = 0.6  # fraction of changed elements from which a bit or more for each position is too much
_LEVEL: Final = 1  # what is left is close to noise: more effort finds little
_MAX_WINDOW_BYTES: Final = 1 << 27

Unsigned = NDArray[Any]  # [n] of an unsigned type


@dataclass(frozen=True, slots=True)
class _Span:
    """A part of one tensor: elements [start, end)."""

    tensor: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Block:
    """Consecutive elements of a strip."""

    element_bytes: int
    index: int
    spans: tuple[_Span, ...]

    @property
    def num_elements(self) -> int:
        return sum(span.end - span.start for span in self.spans)


def encode_delta(base: WeightSnapshot, target: WeightSnapshot, threads: int = 1) -> bytes | None:
    """The delta from `base` to `target`; None when a snapshot is as small, or the two have different tensors."""
    if not same_layout(base.manifest, target.manifest):
        return None
    room = target.manifest.size_bytes - _HEADER.size
    encoded: list[bytes] = []
    with ThreadPoolExecutor(threads, thread_name_prefix="delta") as pool:
        blocks = _blocks(target.manifest)
        while room > 0 and (batch := list(islice(blocks, threads))):
            for data in pool.map(partial(_encode_block, base=base.buffers, target=target.buffers), batch):
                encoded += [data] if data else []
                room -= len(data)
    if room <= 0:
        return None
    header = _HEADER.pack(_MAGIC, base.version.digest, target.version.digest, len(encoded))
    return b"".join([header, *encoded])


def apply_deltas(
    base: WeightSnapshot, deltas: Sequence[bytes | memoryview], manifest: WeightManifest, digest: bytes
) -> list[bytes | memoryview]:
    """The buffers of the version with this manifest and digest, verified; `base` is left as it is.

    Args:
        base: what the first delta starts from.
        deltas: each leads to where the next one starts.
        manifest: of the version that the last one leads to.
        digest: of that version.

    Raises:
        CorruptDataError: a delta is malformed or does not fit, or its result is not what was announced.
    """
    if not same_layout(base.manifest, manifest):
        raise CorruptDataError("the deltas belong to a model of other tensors; fetch the snapshot")
    staged = _Staged(base)
    at = base.version.digest
    for delta in deltas:
        at = _apply(staged, delta, at)
    if at != digest:
        raise CorruptDataError("the deltas lead to another version than the announced one; fetch the snapshot")
    buffers = staged.buffers()
    verify_weights(manifest, buffers, digest)
    return buffers


def same_layout(one: WeightManifest, other: WeightManifest) -> bool:
    """True if two manifests list the same names, types and shapes."""
    return len(one.tensors) == len(other.tensors) and all(
        (left.name, left.dtype, left.shape) == (right.name, right.dtype, right.shape)
        for left, right in zip(one.tensors, other.tensors, strict=True)
    )


# Encoding


def _encode_block(block: _Block, base: Sequence[bytes | memoryview], target: Sequence[bytes | memoryview]) -> bytes:
    """A block's bytes; none when nothing in it changed."""
    old, new = _gather(block, base), _gather(block, target)
    positions = np.flatnonzero(old != new)
    if not positions.size:
        return b""
    dense = positions.size > _DENSE_ABOVE * block.num_elements
    values = _zigzag(new - old) if dense else _zigzag(new[positions] - old[positions])
    gaps, far = _NO_GAPS if dense else _split_gaps(positions)
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    streams = [] if dense else [gaps.tobytes(), far.tobytes()]
    streams += [plane.tobytes() for plane in values.view(np.uint8).reshape(-1, block.element_bytes).T]
    parts = [_BLOCK.pack(block.element_bytes, dense, block.index, len(values), len(far))]
    for stream in streams:
        frame = compressor.compress(stream)
        parts += [_LENGTH.pack(len(frame)), frame]
    return b"".join(parts)


def _split_gaps(positions: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    gaps = np.diff(positions, prepend=-1) - 1
    return np.minimum(gaps, _FAR).astype(np.uint8), (gaps[gaps >= _FAR] - _FAR).astype("<u4")


def _gather(block: _Block, buffers: Sequence[bytes | memoryview]) -> Unsigned:
    pieces = [_elements(block, span, buffers[span.tensor]) for span in block.spans]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _elements(block: _Block, span: _Span, buffer: bytes | memoryview | bytearray) -> Unsigned:
    return np.frombuffer(buffer, dtype=f"<u{block.element_bytes}")[span.start : span.end]


def _zigzag(difference: Unsigned) -> Unsigned:
    bits = 8 * difference.itemsize
    negative = (difference >> (bits - 1)).astype(bool)
    doubled = difference << 1
    return np.where(negative, ~doubled, doubled).astype(difference.dtype)


def _unzigzag(values: Unsigned) -> Unsigned:
    halved = values >> 1
    return np.where((values & 1).astype(bool), ~halved, halved).astype(values.dtype)


# Decoding


class _Staged:
    """Tensors of a base, copied when first written to."""

    def __init__(self, base: WeightSnapshot) -> None:
        self.manifest = base.manifest
        self._base = base.buffers
        self._copies: dict[int, bytearray] = {}

    def writable(self, block: _Block, span: _Span) -> Unsigned:
        """Elements of a span, in a copy."""
        if span.tensor not in self._copies:
            self._copies[span.tensor] = bytearray(self._base[span.tensor])
        return _elements(block, span, self._copies[span.tensor])

    def buffers(self) -> list[bytes | memoryview]:
        """All tensors as they are now, read-only."""
        return [
            memoryview(self._copies[index]).toreadonly() if index in self._copies else buffer
            for index, buffer in enumerate(self._base)
        ]


class _Reader:
    """Cuts a payload into its parts."""

    def __init__(self, payload: bytes | memoryview) -> None:
        self._rest = memoryview(payload)
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)

    def fields(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack(self._take(layout.size))

    def stream(self, dtype: str, count: int) -> Unsigned:
        """One compressed stream of exactly `count` elements; not a byte more is allocated."""
        frame = self._take(*self.fields(_LENGTH))
        size_bytes = count * np.dtype(dtype).itemsize
        try:
            if zstandard.get_frame_parameters(frame).content_size != size_bytes:
                raise CorruptDataError("a delta's stream has another size than its block; fetch the snapshot")
            data = self._decompressor.decompress(frame, max_output_size=size_bytes, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CorruptDataError(f"a delta's stream cannot be read ({error}); fetch the snapshot") from error
        if len(data) != size_bytes:
            raise CorruptDataError("a delta's stream is shorter than its block; fetch the snapshot")
        return np.frombuffer(data, dtype=dtype)

    def end(self) -> None:
        if self._rest:
            raise CorruptDataError("bytes follow a delta's last block; fetch the snapshot")

    def _take(self, size_bytes: int) -> memoryview:
        if len(self._rest) < size_bytes:
            raise CorruptDataError("a delta ends before its last block does; fetch the snapshot")
        taken, self._rest = self._rest[:size_bytes], self._rest[size_bytes:]
        return taken


def _apply(staged: _Staged, payload: bytes | memoryview, expected_base: bytes) -> bytes:
    """Apply one delta; returns the digest that it says it leads to."""
    reader = _Reader(payload)
    magic, base, target, num_blocks = reader.fields(_HEADER)
    if magic != _MAGIC:
        raise CorruptDataError("not a delta of weights; fetch the snapshot")
    if base != expected_base:
        raise CorruptDataError("a delta starts from another version than the one it is applied to; fetch the snapshot")
    blocks = _blocks(staged.manifest)  # in the order in which they are encoded: none comes twice
    for _ in range(num_blocks):
        element_bytes, dense, index, num_changed, num_far = reader.fields(_BLOCK)
        block = next((block for block in blocks if (block.element_bytes, block.index) == (element_bytes, index)), None)
        if block is None:
            raise CorruptDataError("a delta has a block that the weights do not; fetch the snapshot")
        _apply_block(staged, block, reader, num_changed, num_far, dense=bool(dense))
    reader.end()
    return target


def _apply_block(
    staged: _Staged, block: _Block, reader: _Reader, num_changed: int, num_far: int, *, dense: bool
) -> None:
    if num_far > num_changed or num_changed > block.num_elements or (dense and num_changed < block.num_elements):
        raise CorruptDataError("a delta changes more elements than its block has; fetch the snapshot")
    positions = None if dense else _read_positions(reader, num_changed, num_far, block.num_elements)
    planes = [reader.stream("u1", num_changed) for _ in range(block.element_bytes)]
    values = np.stack(planes, axis=1).view(f"<u{block.element_bytes}").reshape(-1)
    differences = _unzigzag(values)
    first = 0
    for span in block.spans:
        last = first + span.end - span.start
        if positions is None:
            elements = staged.writable(block, span)
            elements += differences[first:last]
        else:
            low, high = np.searchsorted(positions, (first, last))
            if high > low:
                elements = staged.writable(block, span)
                elements[positions[low:high] - first] += differences[low:high]
        first = last


def _read_positions(reader: _Reader, num_changed: int, num_far: int, num_elements: int) -> NDArray[np.int64]:
    """[num_changed] ascending, below num_elements."""
    gaps = reader.stream("u1", num_changed).astype(np.int64)
    far = reader.stream("<u4", num_far)
    is_far = gaps == _FAR
    if np.count_nonzero(is_far) != num_far:
        raise CorruptDataError("a delta's gaps contradict each other; fetch the snapshot")
    gaps[is_far] += far
    positions = np.cumsum(gaps + 1) - 1
    if positions.size and not positions[-1] < num_elements:
        raise CorruptDataError("a delta changes elements beyond its block; fetch the snapshot")
    return positions


# Layout


def _blocks(manifest: WeightManifest) -> Iterator[_Block]:
    """Every block of every strip: by element size, then in order."""
    for element_bytes in (1, 2, 4, 8):
        tensors = [
            (number, entry.size_bytes // element_bytes)
            for number, entry in enumerate(manifest.tensors)
            if element_size_bytes(entry.dtype) == element_bytes
        ]
        for index, spans in enumerate(_cut(tensors)):
            yield _Block(element_bytes, index, spans)


def _cut(tensors: Iterable[tuple[int, int]]) -> Iterator[tuple[_Span, ...]]:
    """Spans that together have BLOCK_ELEMENTS elements, the last ones fewer."""
    spans: list[_Span] = []
    room = BLOCK_ELEMENTS
    for tensor, num_elements in tensors:
        start = 0
        while start < num_elements:
            end = min(num_elements, start + room)
            spans.append(_Span(tensor, start, end))
            room -= end - start
            start = end
            if not room:
                yield tuple(spans)
                spans, room = [], BLOCK_ELEMENTS
    if spans:
        yield tuple(spans)


def payload_digest(payload: bytes | memoryview) -> bytes:
    """The digest of a delta's bytes in an announcement: SHA-256."""
    return hashlib.sha256(payload).digest()


_NO_GAPS: Final = (np.empty(0, np.uint8), np.empty(0, "<u4"))
