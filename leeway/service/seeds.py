"""Seeds and random bits that depend on nothing but the numbers and names they are made from.

Recorded results depend on these functions: whoever repeats a run must get the same tasks, samples and versions.
"""

from __future__ import annotations

import hashlib
from typing import Final, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

MASK_64: Final = (1 << 64) - 1
GAMMA: Final = 0x9E3779B97F4A7C15
"""The increment of SplitMix64."""

BitsT = TypeVar("BitsT", int, NDArray[np.uint64])


def mix64(bits: BitsT) -> BitsT:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), of one number or of each in an array."""
    mixed = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK_64
    return cast("BitsT", mixed ^ (mixed >> 31))


def seed_of(data: bytes) -> int:
    """A seed below 2^63: the first 63 bits of the SHA-256 digest."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little") >> 1
