"""Bytes, enums and times: what every message is made of."""

from __future__ import annotations

import enum
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from leeway.errors import InvalidDataError

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_SECOND: Final = -62_135_596_800
"""The year 1."""
_LAST_SECOND: Final = 253_402_300_799
"""The end of the year 9999."""
EnumT = TypeVar("EnumT", bound=enum.IntEnum)
MessageT = TypeVar("MessageT", bound=Message)


def parse(message: type[MessageT], data: bytes) -> MessageT:
    """Parse serialized bytes that travelled inside another message."""
    try:
        return message.FromString(data)
    except DecodeError as error:
        raise InvalidDataError(f"not a {message.DESCRIPTOR.name}: {error}") from error


def field_tag(message: type[Message], field: str) -> bytes:
    """The bytes before the length of a length-delimited field (bytes, string or message)."""
    return varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | 2)


def varint(number: int) -> bytes:
    """A length as protobuf writes it: seven bits a byte, the lowest first."""
    if number < 0x80:
        return bytes((number,))
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def enum_from_proto(kind: type[EnumT], number: int) -> EnumT:
    """A checked enum; UNSPECIFIED and unknown numbers are refused."""
    try:
        return kind(number)
    except ValueError:
        raise InvalidDataError(f"{number} is not a {kind.__name__}") from None


def timestamp_to_proto(moment: datetime) -> Timestamp:
    since = moment - _EPOCH
    return Timestamp(seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1000)


def timestamp_from_proto(message: Timestamp) -> datetime:
    seconds, nanos = message.seconds, message.nanos
    if not (_FIRST_SECOND <= seconds <= _LAST_SECOND and 0 <= nanos < 1_000_000_000):
        raise InvalidDataError(f"not a time: {seconds} seconds and {nanos} nanoseconds")
    return _EPOCH + timedelta(seconds=seconds, microseconds=nanos // 1000)


def duration_to_proto(seconds: float) -> Duration:
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def seconds_from_proto(message: Duration) -> float:
    return message.seconds + message.nanos * 1e-9
