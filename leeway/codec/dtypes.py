"""Element types by name, number on the wire, and size. Needs neither torch nor protobuf."""

from __future__ import annotations

from typing import Final

from leeway.errors import InvalidDataError

# The numbers of leeway.v1.DataType.
_WIRE_NUMBER: Final = {
    "uint8": 1,
    "uint16": 2,
    "int32": 3,
    "int64": 4,
    "float16": 5,
    "bfloat16": 6,
    "float32": 7,
    "float64": 8,
}
_NAME: Final = {number: name for name, number in _WIRE_NUMBER.items()}
_SIZE_BYTES: Final = {1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 2, 7: 4, 8: 8}


def wire_number(name: str) -> int:
    """The number of an element type in leeway.v1.DataType.

    Raises:
        InvalidDataError: for a type that has no wire form.
    """
    try:
        return _WIRE_NUMBER[name]
    except KeyError:
        raise InvalidDataError(
            f"element type {name!r} has no wire form; use one of {', '.join(_WIRE_NUMBER)}"
        ) from None


def dtype_name(number: int) -> str:
    """The name of a leeway.v1.DataType number.

    Raises:
        InvalidDataError: for an unknown number.
    """
    try:
        return _NAME[number]
    except KeyError:
        raise InvalidDataError(f"element type number {number} is not in leeway.v1.DataType") from None


def element_size_bytes(name: str) -> int:
    """Bytes of one element."""
    return _SIZE_BYTES[wire_number(name)]
