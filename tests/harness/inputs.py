"""Messages and bytes that nobody should send: made at random from a descriptor, or from a good one by mutation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

_UNSIGNED: Final = (0, 1, 2, 3, 7, 255, 65_535, 2**31 - 1, 2**31, 2**32 - 1)
_WIDE: Final = (2**32, 2**53, 2**62, 2**63 - 1)
_FLOATS: Final = (0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e308, 5e-324)
_TEXTS: Final = ("", "a", "\0", "é" * 9, "../../x", "x" * 300, "%s%n", "-g1.0", "run-g1.99999999999999999999")
_DEPTH: Final = 5


class Inputs:
    """A seeded source. `words` and `blobs` are pieces of good messages, which reach further than noise."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.words: list[str] = []
        self.blobs: list[bytes] = []
        self.good: dict[str, list[Message]] = {}  # by the full name of their type

    def learn(self, message: Message) -> None:
        """Take a good message to pieces."""
        self.good.setdefault(message.DESCRIPTOR.full_name, []).append(message)
        for field, value in message.ListFields():
            for item in value if field.is_repeated else [value]:
                if isinstance(item, Message):
                    self.learn(item)
                elif isinstance(item, str) and len(self.words) < 200:
                    self.words.append(item)
                elif isinstance(item, bytes) and len(self.blobs) < 200:
                    self.blobs.append(item)

    def message(self, descriptor: Descriptor) -> Message | None:
        """A message of a type; None when the bytes that came are not one, which is where a server's parser stops."""
        chance = self.rng.random()
        good = self.good.get(descriptor.full_name)
        if good and chance < 0.6:
            message = _copy(self.rng.choice(good))
            for _ in range(self.rng.choice((0, 1, 1, 1, 2, 4))):
                self._mutate(message)
            return message
        if chance < 0.85:
            return self._made(descriptor, _DEPTH)
        data = self.rng.choice(good).SerializeToString() if good else self.rng.randbytes(self.rng.randrange(64))
        try:
            return GetMessageClass(descriptor).FromString(self.damaged(data))
        except DecodeError:
            return None

    def damaged(self, data: bytes) -> bytes:
        """Bytes with some of them changed, gone, repeated or new."""
        rng, damaged = self.rng, bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(damaged) + 1)
            match rng.randrange(6):
                case 0 if damaged:
                    damaged[at % len(damaged)] ^= 1 << rng.randrange(8)
                case 1 if damaged:
                    damaged[at % len(damaged)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
                case 2:
                    del damaged[at : at + rng.choice((1, 4, 50))]
                case 3:
                    damaged[at:at] = rng.randbytes(rng.choice((1, 4, 20)))
                case 4:
                    damaged[at:at] = damaged[at : at + rng.choice((1, 8, 64))]
                case _:
                    del damaged[at:]
        return bytes(damaged)

    def _made(self, descriptor: Descriptor, depth: int) -> Message:
        message = GetMessageClass(descriptor)()
        for field in descriptor.fields:
            if self.rng.random() < 0.7:
                self._set(message, field, depth)
        return message

    def _mutate(self, message: Message) -> None:
        """Change one field of the message or of one inside."""
        fields: Sequence[Any] = message.DESCRIPTOR.fields
        if not fields:
            return
        field = self.rng.choice(fields)
        if field.message_type is not None and self.rng.random() < 0.7:
            value: Any = getattr(message, field.name)
            if not field.is_repeated:
                if message.HasField(field.name):
                    self._mutate(value)
                    return
            elif value:
                if self.rng.random() < 0.8:
                    self._mutate(self.rng.choice(value))
                elif self.rng.random() < 0.5:
                    del value[self.rng.randrange(len(value))]
                else:
                    value.add().CopyFrom(self.rng.choice(value))
                return
        if self.rng.random() < 0.2:
            message.ClearField(field.name)
        else:
            self._set(message, field, 2)

    def _set(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        if field.message_type is not None:
            if depth <= 0:
                return
            good = self.good.get(field.message_type.full_name)
            for _ in range(self.rng.randrange(3) if field.is_repeated else 1):
                target: Any = getattr(message, field.name)
                target = target.add() if field.is_repeated else target
                if good and self.rng.random() < 0.5:
                    target.CopyFrom(self.rng.choice(good))
                else:
                    target.CopyFrom(self._made(field.message_type, depth - 1))
        elif field.is_repeated:
            message.ClearField(field.name)
            values: Any = getattr(message, field.name)
            values.extend(self._scalar(field) for _ in range(self.rng.randrange(4)))
        else:
            setattr(message, field.name, self._scalar(field))

    def _scalar(self, field: FieldDescriptor) -> Any:
        rng = self.rng
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
                blob = rng.choice(self.blobs) if self.blobs and rng.random() < 0.7 else rng.randbytes(rng.randrange(40))
                return self.damaged(blob) if rng.random() < 0.3 else blob
            case FieldDescriptor.CPPTYPE_STRING:
                return rng.choice(self.words if self.words and rng.random() < 0.7 else _TEXTS)
            case FieldDescriptor.CPPTYPE_BOOL:
                return rng.random() < 0.5
            case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
                return rng.choice((*_FLOATS, rng.random()))
            case FieldDescriptor.CPPTYPE_UINT32:
                return rng.choice(_UNSIGNED)
            case FieldDescriptor.CPPTYPE_UINT64:
                return rng.choice((*_UNSIGNED, *_WIDE, 2**64 - 1))
            case FieldDescriptor.CPPTYPE_INT64:
                return rng.choice((*_UNSIGNED, *_WIDE, -1, -(2**63)))
            case FieldDescriptor.CPPTYPE_INT32:
                return rng.choice((0, 1, 2, -1, 2**31 - 1, -(2**31), 999_999_999))
            case _:  # an enum; numbers without a name arrive too
                return rng.choice((0, 1, 2, 3, 99, -1))


def _copy(message: Message) -> Message:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
