"""The fields of a serialized message, found without parsing it: for messages too large to be copied for one of them.

Everything else is left to protobuf. It copies every bytes field twice, which costs less than reading tags in Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from mmap import mmap
from typing import Final, NamedTuple

from leeway.errors import InvalidDataError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT: Final = 10

Buffer = bytes | mmap


class Field(NamedTuple):
    """One field of a message, by its places in the buffer."""

    number: int
    tag_at: int
    begin: int  # of the content
    end: int
    value: int  # of a varint


def fields(data: Buffer, begin: int, end: int) -> Iterator[Field]:
    """The fields of the message at [begin, end), in order.

    Raises:
        InvalidDataError: the bytes are no message.
    """
    at = begin
    while at < end:
        tag_at = at
        tag, at = _varint(data, at, end)
        value, wire_type = 0, tag & 7
        if wire_type == _VARINT:
            value, content_end = _varint(data, at, end)
        elif wire_type == _BYTES:
            size_bytes, at = _varint(data, at, end)
            content_end = at + size_bytes
        elif wire_type in (_FIXED64, _FIXED32):
            content_end = at + (8 if wire_type == _FIXED64 else 4)
        else:
            raise InvalidDataError(f"field {tag >> 3} has the unknown wire type {wire_type}")
        if content_end > end:
            raise InvalidDataError(f"field {tag >> 3} exceeds its message")
        yield Field(tag >> 3, tag_at, at, content_end, value)
        at = content_end


def find_field(data: Buffer, begin: int, end: int, *path: int) -> Field:
    """The field that a path of field numbers leads to, each inside the one before.

    Raises:
        InvalidDataError: there is none, or the bytes are no message.
    """
    found = Field(0, begin, begin, end, 0)
    for number in path:
        inner = fields(data, found.begin, found.end)
        found = next((field for field in inner if field.number == number), None) or _missing(number)
    return found


def _missing(number: int) -> Field:
    raise InvalidDataError(f"the message has no field {number}")


def _varint(data: Buffer, at: int, end: int) -> tuple[int, int]:
    """A number, seven bits a byte with the lowest first, and where it ends."""
    value = 0
    for shift in range(0, 7 * _LONGEST_VARINT, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise InvalidDataError("a number does not end")
