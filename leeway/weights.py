"""Published weights as bytes: the manifest, its digest, and the check that a receiver makes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from leeway.dtypes import wire_number
from leeway.errors import CorruptDataError
from leeway.types import TensorEntry, WeightManifest


def tensor_entry(name: str, dtype: str, shape: tuple[int, ...], data: bytes | memoryview) -> TensorEntry:
    """Describe one tensor; `data` is its little-endian bytes."""
    return TensorEntry(name, dtype, shape, hashlib.sha256(data).digest(), len(data))


def weights_digest(manifest: WeightManifest) -> bytes:
    """The digest of a policy version: SHA-256 over the manifest's entries, as inference.proto's TensorEntry says."""
    digest = hashlib.sha256()
    for entry in manifest.tensors:
        fields = [entry.name, str(wire_number(entry.dtype)), *(str(extent) for extent in entry.shape)]
        digest.update("".join(f"{value}\0" for value in fields).encode())
        digest.update(entry.digest)
    return digest.digest()


def verify_weights(manifest: WeightManifest, buffers: Sequence[bytes | memoryview], expected: bytes) -> None:
    """Check staged bytes against a manifest and the manifest against the announced digest.

    Raises:
        CorruptDataError: naming the first tensor whose bytes are not what was announced.
    """
    if weights_digest(manifest) != expected:
        raise CorruptDataError("the weight manifest does not have the announced digest; fetch the snapshot again")
    if len(buffers) != len(manifest.tensors):
        raise CorruptDataError(f"{len(buffers)} tensors arrived where {len(manifest.tensors)} were announced")
    for entry, data in zip(manifest.tensors, buffers, strict=True):
        if len(data) != entry.size_bytes or hashlib.sha256(data).digest() != entry.digest:
            raise CorruptDataError(
                f"the bytes of tensor {entry.name} differ from their digest; fetch the snapshot again"
            )
