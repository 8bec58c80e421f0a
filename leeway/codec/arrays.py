"""Tensors and NumPy arrays."""

from __future__ import annotations

import math
import sys
from typing import Any, Final

import numpy as np

from leeway.codec.dtypes import dtype_name, wire_number
from leeway.errors import InvalidDataError
from leeway.types import Array
from leeway.v1 import common_pb2

MAX_TENSOR_ELEMENTS: Final = 1 << 31


# NumPy has no bfloat16; weights in that type travel as raw bytes and never become arrays here.
_NUMPY_DTYPES: Final = {
    wire_number(name): np.dtype(name).newbyteorder("<")
    for name in ("uint8", "uint16", "int32", "int64", "float16", "float32", "float64")
}


def array_to_proto(array: Array) -> common_pb2.Tensor:
    """Little-endian bytes of an array; refuses element types without a wire form."""
    little = array.astype(array.dtype.newbyteorder("<"), copy=False) if sys.byteorder == "big" else array
    return common_pb2.Tensor(
        dtype=wire_number(array.dtype.name),  # type: ignore[arg-type]
        shape=array.shape,
        data=little.tobytes(),
    )


def array_from_proto(tensor: common_pb2.Tensor) -> Array:
    """A read-only view of the message's bytes.

    Raises:
        InvalidDataError: the bytes are not an array of this element type and shape.
    """
    data, shape, dtype = tensor.data, tuple(tensor.shape), numpy_dtype(tensor.dtype)
    elements = math.prod(shape)
    if elements > MAX_TENSOR_ELEMENTS or elements * dtype.itemsize != len(data):
        raise InvalidDataError(
            f"a {dtype.name} tensor of shape {list(shape)} takes {elements * dtype.itemsize} bytes, "
            f"but {len(data)} came"
        )
    return np.frombuffer(data, dtype).reshape(shape)


def numpy_dtype(number: int) -> np.dtype[Any]:
    dtype = _NUMPY_DTYPES.get(number)
    if dtype is None:
        raise InvalidDataError(f"{dtype_name(number)} arrays are only allowed among weights")
    return dtype
