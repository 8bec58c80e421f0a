"""Places in serialized messages, found without a parser: the items of a write, the columns of a chunk.

Protobuf copies every bytes field twice before anybody can look at it; here an item is copied once, as the log keeps it,
and its columns not at all. Chunks are most of a write, and columns most of a chunk; every encoder writes both field by
field in order, so their places are read off here. Whatever is encoded in another way (which the wire format allows) is
left to protobuf.

    WriteTrajectoriesRequest   0x0a length run  0x12 length server_id  0x1a length WriteItem ...
    WriteItem         0x0a length trajectory_id  0x10 attempt  0x18 seq  0x22 chunk, 0x2a close or 0x32 failure

    TrajectoryChunk   0x0a length Column ...  then segments and version spans
    Column            0x08 kind  0x10 start_token  0x18 end_token  0x22 length Tensor  0x28 encoding  zeros are left out
    Tensor            0x08 dtype  0x12 length shape ...  0x1a length data
"""

from __future__ import annotations

from typing import Final, NamedTuple

CHUNK: Final = 0x22
CLOSE: Final = 0x2A
FAILURE: Final = 0x32

_CONTENTS: Final = (CHUNK, CLOSE, FAILURE)
_LARGEST: Final = 0xFFFF_FFFF
_LARGEST_SHIFT: Final = 28
"""Of the fifth byte, the last one that a number of 32 bits needs."""

Bytes = bytes | memoryview


class WireColumn(NamedTuple):
    """A column as it lies in a buffer; nothing but its size on the wire is checked."""

    kind: int
    start_token: int
    end_token: int
    dtype: int
    shape: tuple[int, ...]
    buffer: Bytes
    offset: int  # of the values in the buffer
    size_bytes: int
    encoding: int = 0


class _Unusual(Exception):
    """Encoded in a way that is left to protobuf."""


class WireItem(NamedTuple):
    """A WriteItem as it lies in a message; nothing but its framing is checked."""

    trajectory_id: str
    attempt: int
    seq: int
    tag: int  # of the content: CHUNK, CLOSE, FAILURE, or 0 without any
    content: Bytes
    encoded: bytes  # the whole item


class WireWrite(NamedTuple):
    """A WriteTrajectoriesRequest."""

    run: str
    server_id: str
    items: list[WireItem]


def read_write(message: bytes) -> WireWrite | None:
    """A serialized WriteTrajectoriesRequest; None when it is encoded in a way that is left to protobuf."""
    try:
        run, at = _text(message, 0, 0x0A)
        server_id, at = _text(message, at, 0x12)
        items: list[WireItem] = []
        while at < len(message):
            if message[at] != 0x1A:
                return None
            size_bytes, at = varint_at(message, at + 1)
            items.append(_item(message, at, at + size_bytes))
            at += size_bytes
    except (_Unusual, IndexError, UnicodeDecodeError):
        return None
    return WireWrite(run, server_id, items)


def _item(message: bytes, begin: int, end: int) -> WireItem:
    if end > len(message):
        raise _Unusual
    attempt = seq = tag = 0
    trajectory_id, at = _text(message, begin, 0x0A)
    if at < end and message[at] == 0x10:
        attempt, at = varint_at(message, at + 1)
    if at < end and message[at] == 0x18:
        seq, at = varint_at(message, at + 1)
    content = at
    if at < end:
        tag = message[at]
        size_bytes, content = varint_at(message, at + 1)
        if tag not in _CONTENTS or content + size_bytes != end:
            raise _Unusual
    if content > end or attempt > _LARGEST:
        raise _Unusual
    encoded = message[begin:end]
    return WireItem(trajectory_id, attempt, seq, tag, memoryview(encoded)[content - begin :], encoded)


def _text(message: bytes, at: int, tag: int) -> tuple[str, int]:
    """A string field, which is left out when it is empty, and where it ends."""
    if at == len(message) or message[at] != tag:
        return "", at
    size_bytes, at = varint_at(message, at + 1)
    end = at + size_bytes
    if end > len(message):
        raise _Unusual
    return str(message[at:end], "utf-8"), end


def leading_columns(chunk: Bytes) -> tuple[list[WireColumn], int]:
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


def _column(data: Bytes, at: int, end: int) -> WireColumn:
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


def varint_at(data: Bytes, at: int) -> tuple[int, int]:
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
