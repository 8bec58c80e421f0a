"""Weights that the kit can push: those of a checkpoint, or of the arithmetic law, and a second set made from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import safetensors

from leeway import arithmetic
from leeway.errors import ConfigError
from leeway.types import ModelSignature, TensorEntry, WeightManifest
from leeway.weights.digests import tensor_entry, weights_digest

_DTYPES: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "U16": "uint16",
}
LARGEST_PIECE_BYTES: Final = 4 << 20
"""Data in one message of an update, at most."""
_safetensors: Any = safetensors


@dataclass(frozen=True, slots=True)
class Weights:
    """One set of weights; nobody has named a version of it yet."""

    manifest: WeightManifest
    buffers: Sequence[bytes]

    @property
    def digest(self) -> bytes:
        """The digest of a policy version with these weights."""
        return weights_digest(self.manifest)


def arithmetic_weights() -> Weights:
    """Weights for servers that sample by the arithmetic law."""
    return Weights(*arithmetic.published_weights(history=1, step=0))


def is_arithmetic(signature: ModelSignature) -> bool:
    """True if a server says that it samples by that law."""
    return signature == arithmetic.SIGNATURE


def checkpoint_weights(directory: Path) -> Weights:
    """The tensors of a Hugging Face directory, in the types in which they are stored.

    Raises:
        ConfigError: there are none, or one has a type without a wire form.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{directory}: holds no *.safetensors; give a Hugging Face model directory")
    entries: list[tuple[TensorEntry, bytes]] = []
    for file in files:
        try:
            tensors: list[tuple[str, dict[str, Any]]] = _safetensors.deserialize(file.read_bytes())
        except (OSError, safetensors.SafetensorError) as error:
            raise ConfigError(f"{file}: cannot be read as safetensors: {error}") from error
        for name, tensor in tensors:
            if tensor["dtype"] not in _DTYPES:
                raise ConfigError(f"{file}: tensor {name} is {tensor['dtype']}, which has no wire form")
            data = bytes(tensor["data"])
            entries.append((tensor_entry(name, _DTYPES[tensor["dtype"]], tuple(tensor["shape"]), data), data))
    entries.sort(key=lambda pair: pair[0].name.encode())
    return Weights(WeightManifest(tuple(entry for entry, _ in entries)), [data for _, data in entries])


def rolled(weights: Weights) -> Weights:
    """Other weights for the same model: the rows of every tensor moved on by one.

    Finite numbers stay finite and every element type will do; embedding and head change hands, so the distributions
    have nothing to do with those before.
    """
    buffers = [_rolled(entry, data) for entry, data in zip(weights.manifest.tensors, weights.buffers, strict=True)]
    entries = tuple(
        tensor_entry(entry.name, entry.dtype, entry.shape, data)
        for entry, data in zip(weights.manifest.tensors, buffers, strict=True)
    )
    return Weights(WeightManifest(entries), buffers)


def renamed(weights: Weights) -> Weights:
    """The same bytes under a name that no model has."""
    tensors = list(weights.manifest.tensors)
    tensors[-1] = replace(tensors[-1], name=f"{tensors[-1].name}.of_another_model")
    return Weights(WeightManifest(tuple(tensors)), weights.buffers)


def foreign_piece() -> Weights:
    """Weights of no model: one tensor, as large as a message of an update may be."""
    data = bytes(LARGEST_PIECE_BYTES)
    return Weights(WeightManifest((tensor_entry("leeway.conformance", "uint8", (len(data),), data),)), [data])


def flipped(data: Sequence[bytes]) -> list[bytes]:
    """The same bytes but for one bit, in the last tensor: all others have been seen when it comes."""
    *whole, last = data
    return [*whole, last[:-1] + bytes([last[-1] ^ 1])]


def pieces(data: Sequence[bytes], first_sizes: Sequence[int] = ()) -> Iterator[bytes]:
    """The bytes of all tensors, one after the other, cut without regard to where tensors end.

    Args:
        data: bytes of each tensor.
        first_sizes: sizes of the first pieces; all others are as large as the contract allows.
    """
    sizes = iter(first_sizes)
    size = next(sizes, LARGEST_PIECE_BYTES)
    pending = bytearray()
    for buffer in data:
        view = memoryview(buffer)
        while view:
            taken = view[: size - len(pending)]
            pending += taken
            view = view[len(taken) :]
            if len(pending) == size:
                yield bytes(pending)
                pending.clear()
                size = next(sizes, LARGEST_PIECE_BYTES)
    if pending:
        yield bytes(pending)


def _rolled(entry: TensorEntry, data: bytes) -> bytes:
    if not entry.shape or not data:
        return data
    row = len(data) // entry.shape[0]
    return data[row:] + data[:row]
