"""Published weights, and the deltas from one version to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from leeway.types.policy import PolicyVersion


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a published version."""

    name: str
    dtype: str  # "bfloat16", "float32", ...
    shape: tuple[int, ...]
    digest: bytes  # SHA-256 of its bytes
    size_bytes: int


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """The tensors of a published version, ordered by name."""

    tensors: tuple[TensorEntry, ...]

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.tensors)


@dataclass(frozen=True, slots=True)
class WeightSnapshot:
    """Published weights: little-endian bytes per tensor, in manifest order."""

    version: PolicyVersion
    publisher_epoch: int
    manifest: WeightManifest
    buffers: Sequence[bytes | memoryview] = field(repr=False)


@dataclass(frozen=True, slots=True)
class WeightDelta:
    """A payload that leads from one published version to another."""

    base_digest: bytes
    target_digest: bytes
    digest: bytes  # SHA-256 of the payload
    size_bytes: int


@dataclass(frozen=True, slots=True)
class WeightRequest:
    """Parts [first_part, end_part) of a version: its tensors, or the deltas that lead to it from `base_digest`."""

    version: PolicyVersion
    base_digest: bytes = b""  # empty: tensors
    first_part: int = 0
    end_part: int = 0  # 0: all that follow
