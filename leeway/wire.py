"""The columns at the front of a serialized TrajectoryChunk, found without copying their values.

Protobuf copies every bytes field twice before an array can look at it. Columns are most of a chunk, and every encoder
writes them first and field by field in order, so their places are read off here; whatever is encoded in another way
(which the wire format allows) is left to protobuf.

    TrajectoryChunk   0x0a length Column ...  then segments and version spans
    Column            0x08 kind  0x10 start_token  0x18 end_token  0x22 length Tensor  0x28 encoding  zeros are left out
    Tensor            0x08 dtype  0x12 length shape ...  0x1a length data
"""

from __future__ import annotations

from typing import NamedTuple

_LARGEST = 0xFFFF_FFFF
_LARGEST_SHIFT = 28
"""Of the fifth byte, the last one that a number of 32 bits needs."""


class WireColumn(NamedTuple):
    """A column as it lies in a buffer; nothing but its size on the wire is checked."""

    kind: int
    start_token: int
    end_token: int
    dtype: int
    shape: tuple[int, ...]
    buffer: bytes
    offset: int  # of the values in the buffer
    size_bytes: int
    encoding: int = 0


class _Unusual(Exception):
    """Encoded in a way that is left to protobuf."""


def leading_columns(chunk: bytes) -> tuple[list[WireColumn], int]:
    """The columns that a chunk begins with, and where the rest begins."""
    columns: list[WireColumn] = []
    at = 0
    try:
        while at < len(chunk) and chunk[at] == 0x0A:
            size_bytes, begin = varint_at(chunk, at + 1)
            end = begin + size_bytes
            if end > len(chunk):
                break
            columns.append(_column(chunk, begin, end))
            at = end
    except (_Unusual, IndexError):
        pass  # `at` is where protobuf goes on
    return columns, at


def _column(data: bytes, at: int, end: int) -> WireColumn:
    kind = start_token = end_token = dtype = 0
    if data[at] == 0x08:
        kind, at = varint_at(data, at + 1)
    if data[at] == 0x10:
        start_token, at = varint_at(data, at + 1)
    if data[at] == 0x18:
        end_token, at = varint_at(data, at + 1)
    if data[at] != 0x22:
        raise _Unusual
    size_bytes, at = varint_at(data, at + 1)
    tensor_end = at + size_bytes
    encoding = 0
    if tensor_end != end:
        if tensor_end > end or data[tensor_end] != 0x28:
            raise _Unusual
        encoding, encoding_end = varint_at(data, tensor_end + 1)
        if encoding_end != end:
            raise _Unusual
    if data[at] == 0x08:
        dtype, at = varint_at(data, at + 1)
    shape: list[int] = []
    if data[at] == 0x12:
        size_bytes, at = varint_at(data, at + 1)
        shape_end = at + size_bytes
        while at < shape_end:
            extent, at = varint_at(data, at)
            shape.append(extent)
        if at != shape_end:
            raise _Unusual
    if data[at] != 0x1A:
        raise _Unusual
    size_bytes, at = varint_at(data, at + 1)
    if at + size_bytes != tensor_end or max(kind, start_token, end_token, dtype, encoding, *shape) > _LARGEST:
        raise _Unusual
    return WireColumn(kind, start_token, end_token, dtype, tuple(shape), data, at, size_bytes, encoding)


def varint_at(data: bytes, at: int) -> tuple[int, int]:
    """The number at a place, and where it ends. Raises IndexError at the end of the data, and for long numbers."""
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    number, shift = byte & 0x7F, 7
    while True:
        at += 1
        byte = data[at]
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
        if shift > _LARGEST_SHIFT:
            raise IndexError
    return number, at + 1
