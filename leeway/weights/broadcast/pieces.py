"""How parts are cut for broadcasts. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from leeway.weights.broadcast.library import Part


def pieces(size_bytes: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """Byte ranges [start, end) of the parts' concatenation that travel as one, as policy.proto says."""
    return ((start, min(start + piece_bytes, size_bytes)) for start in range(0, size_bytes, piece_bytes))


def gather(parts: Sequence[Part], start: int, memory: memoryview) -> None:
    """Fill memory with the bytes from `start` on of the parts' concatenation."""
    at = filled = 0
    for part in parts:
        skipped = max(start - at, 0)
        taken = min(len(part) - skipped, len(memory) - filled)
        if taken > 0:
            copy(part, skipped, memory[filled : filled + taken])
            filled += taken
        at += len(part)


def copy(source: Part, start: int, memory: memoryview) -> None:
    """Fill memory with the bytes from `start` on, without the GIL."""
    np.copyto(np.frombuffer(memory, np.uint8), np.frombuffer(source, np.uint8)[start : start + len(memory)])
