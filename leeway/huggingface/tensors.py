"""Tensors and their bytes."""

from __future__ import annotations

import math
from typing import Final

import torch

from leeway.codec.dtypes import element_size_bytes
from leeway.errors import InvalidDataError

_TORCH_DTYPE: Final = {
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def torch_dtype(dtype_name: str) -> torch.dtype:
    """The torch element type of a name in leeway.codec.dtypes.

    Raises:
        InvalidDataError: for a name that has no wire form.
    """
    element_size_bytes(dtype_name)
    return _TORCH_DTYPE[dtype_name]


def tensor_dtype_name(tensor: torch.Tensor) -> str:
    """The name in leeway.codec.dtypes of a tensor's element type."""
    return str(tensor.dtype).removeprefix("torch.")


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's elements as little-endian bytes in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensor_from_bytes(dtype_name: str, shape: tuple[int, ...], buffer: bytes | memoryview) -> torch.Tensor:
    """A tensor that owns a copy of little-endian bytes.

    Raises:
        InvalidDataError: the size of the buffer is not what dtype and shape say.
    """
    dtype = torch_dtype(dtype_name)
    if len(buffer) != math.prod(shape) * dtype.itemsize:
        raise InvalidDataError(f"{len(buffer)} bytes are not a {dtype_name} tensor of shape {list(shape)}")
    if not buffer:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(buffer), dtype=dtype).reshape(shape)
