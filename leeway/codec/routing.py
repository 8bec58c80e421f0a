"""Routing in few bytes: the packed form of a ROUTING column (ColumnEncoding in common.proto).

    ids [n, L, k] ── one plane per layer, ids of b bits ──> zstd, a block for each plane ──> b ‖ frame

Which experts a layer chooses is skewed in a way of its own, and nearly without memory: what there is to gain is the
entropy of each layer's ids. The Huffman stage of zstd comes near it, given a block, and so a table, for each layer.
Where experts are so few that several ids fit into a byte, they are coded together, and with them what one says about
the other. The order of slots is kept.

Shape legend: n tokens, L MoE layers, k experts per token.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import zstandard
from numpy.typing import NDArray

from leeway.errors import InvalidDataError
from leeway.types import Array

MAX_UNPACKED_BYTES: Final = 64 << 20
"""Largest size of one unpacked column: a plain one of this size fills a message."""
MAX_EXPANSION: Final = 32
"""Largest expansion of a packed column: a limit against decompression bombs."""

_BYTE_BITS: Final = 8
_MAX_WINDOW_BYTES: Final = 1 << 27
_LEVEL: Final = zstandard.ZstdCompressionParameters(compression_level=1, min_match=7, write_content_size=True)
"""Repetitions are few and chance ones cost more than they save: only long ones are taken."""

_Bytes = NDArray[np.uint8]


def pack_routing(ids: Array) -> bytes | None:
    """The packed form of ids [n, L, k], uint8 or uint16; None where it is no smaller than the plain one, or too small.

    >>> ids = np.arange(1200, dtype=np.uint8).reshape(100, 4, 3) % 16
    >>> np.array_equal(unpack_routing(pack_routing(ids), ids.dtype, ids.shape), ids)
    True
    """
    if not ids.size or ids.nbytes > MAX_UNPACKED_BYTES:
        return None
    bits = _bits(int(ids.max()))
    planes = ids.transpose(1, 0, 2).reshape(ids.shape[1], -1)  # [L, n * k]
    contents = [_plane_bytes(plane, bits) for plane in planes]
    frame = zstandard.ZstdCompressor(compression_params=_LEVEL).compressobj(size=sum(map(len, contents)))
    parts = [bytes((bits,))]
    for content in contents:
        parts += (frame.compress(content), frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    parts.append(frame.flush())
    packed = b"".join(parts)
    return packed if len(packed) < ids.nbytes <= MAX_EXPANSION * len(packed) else None


def unpack_routing(packed: bytes | memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """The ids of a packed form, [n, L, k].

    Raises:
        InvalidDataError: it is not the packed form of such an array; nothing larger than the array was allocated.
    """
    n, layers, k = _checked_shape(dtype, shape)
    if math.prod(shape) * dtype.itemsize > MAX_EXPANSION * len(packed):
        raise InvalidDataError(f"packed routing stands for more than {MAX_EXPANSION} times its {len(packed)} bytes")
    bits = packed[0]
    if not (bits in (1, 2, 4, 8) or _BYTE_BITS < bits <= _BYTE_BITS * dtype.itemsize):
        raise InvalidDataError(f"packed routing of {dtype.name} cannot have ids of {bits} bits")
    plane_bytes = _num_bytes(n * k, bits)
    content = np.frombuffer(_decompress(packed[1:], layers * plane_bytes), np.uint8).reshape(layers, plane_bytes)
    planes = _ids(content, n * k, bits, dtype)
    return np.ascontiguousarray(planes.reshape(layers, n, k).transpose(1, 0, 2))


def _checked_shape(dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[int, int, int]:
    size_bytes = math.prod(shape) * dtype.itemsize
    if dtype.name not in ("uint8", "uint16") or len(shape) != 3 or not 0 < size_bytes <= MAX_UNPACKED_BYTES:
        raise InvalidDataError(
            f"packed routing is uint8 or uint16 [tokens, layers, k] of at most {MAX_UNPACKED_BYTES >> 20} MiB, "
            f"not {dtype.name} {list(shape)}"
        )
    return shape[0], shape[1], shape[2]


def _decompress(frame: bytes | memoryview, size_bytes: int) -> bytes:
    try:
        if zstandard.get_frame_parameters(frame).content_size != size_bytes:
            raise InvalidDataError("packed routing has another size than its shape says")
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        content = decompressor.decompress(frame, max_output_size=size_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise InvalidDataError(f"packed routing cannot be read: {error}") from error
    if len(content) != size_bytes:
        raise InvalidDataError("packed routing is shorter than its shape says")
    return content


def _bits(largest: int) -> int:
    """Bits of an id: those it needs, and below a byte a number that divides 8."""
    needed = max(largest.bit_length(), 1)
    return next((bits for bits in (1, 2, 4, 8) if bits >= needed), needed)


def _num_bytes(count: int, bits: int) -> int:
    """Bytes of a plane of `count` ids."""
    if bits <= _BYTE_BITS:
        return -(-count * bits // _BYTE_BITS)
    return count + (bits - _BYTE_BITS) * -(-count // _BYTE_BITS)


def _plane_bytes(plane: Array, bits: int) -> bytes:
    """One layer's ids [n * k] as the frame holds them."""
    if bits > _BYTE_BITS:
        high = [np.packbits(plane >> bit & 1, bitorder="little") for bit in range(_BYTE_BITS, bits)]
        return np.concatenate([plane.astype(np.uint8), *high]).tobytes()
    small: _Bytes = plane.astype(np.uint8, copy=False)
    together = _BYTE_BITS // bits
    if together == 1:
        return small.tobytes()
    padded = np.zeros(_num_bytes(len(small), bits) * together, np.uint8)
    padded[: len(small)] = small
    packed = padded[::together].copy()
    for place in range(1, together):
        packed |= padded[place::together] << bits * place
    return packed.tobytes()


def _ids(content: _Bytes, count: int, bits: int, dtype: np.dtype[Any]) -> Array:
    """The ids [L, count] of planes [L, bytes]."""
    if bits <= _BYTE_BITS:
        together, mask = _BYTE_BITS // bits, (1 << bits) - 1
        if together == 1:
            return content.astype(dtype, copy=False)
        ids = np.stack([content >> bits * place & mask for place in range(together)], axis=-1)
        return ids.reshape(len(content), -1)[:, :count].astype(dtype, copy=False)
    ids = content[:, :count].astype(dtype)
    size = -(-count // _BYTE_BITS)
    for bit in range(_BYTE_BITS, bits):
        start = count + (bit - _BYTE_BITS) * size
        high = np.unpackbits(content[:, start : start + size], axis=-1, count=count, bitorder="little")
        ids |= high.astype(dtype) << bit
    return ids
