"""Published weights as bytes: the manifest, its digest, and the check that a receiver makes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from leeway.codec.dtypes import wire_number
from leeway.errors import CorruptDataError
from leeway.types import TensorEntry, WeightManifest

WEIGHT_THREADS: Final = min(4, os.cpu_count() or 1)
"""Threads that hash or code weights at once."""

_ALONE_BYTES: Final = 4 << 20  # below, threads cost more than they save


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
    if manifest.size_bytes < _ALONE_BYTES:
        faulty = next(filter(None, map(_fault, manifest.tensors, buffers)), None)
    else:
        with ThreadPoolExecutor(WEIGHT_THREADS, thread_name_prefix="verify") as pool:
            faulty = next(filter(None, pool.map(_fault, manifest.tensors, buffers)), None)
    if faulty:
        raise CorruptDataError(f"the bytes of tensor {faulty} differ from their digest; fetch the snapshot again")


def _fault(entry: TensorEntry, data: bytes | memoryview) -> str | None:
    """The tensor's name when its bytes are not what was announced."""
    right = len(data) == entry.size_bytes and hashlib.sha256(data).digest() == entry.digest
    return None if right else entry.name
