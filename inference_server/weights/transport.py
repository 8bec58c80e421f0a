"""What the receiver needs of a way to bring weights here; one module each, control always travels over WatchPolicy."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from leeway.types import PolicyVersion, WeightDelta, WeightManifest, WeightRequest

BATCH_BYTES: Final = 4 << 20
"""Parts are handed on in batches of at least this size, which are checked while the next ones come."""

Part = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a learner says of its newest version."""

    publisher_epoch: int
    version: PolicyVersion
    manifest: WeightManifest
    local_endpoint: str = ""
    deltas: tuple[WeightDelta, ...] = ()  # a chain that ends at the version
    broadcast_port: int = 0  # at the learner's host; 0: none

    def deltas_from(self, digest: bytes) -> tuple[WeightDelta, ...]:
        """The shortest part of the chain that starts at weights with this digest; empty when there is none."""
        for index in range(len(self.deltas) - 1, -1, -1):
            if self.deltas[index].base_digest == digest:
                return self.deltas[index:]
        return ()


class WeightTransport(Protocol):
    """A way for bytes, which need not be right: the fetcher checks every part."""

    name: str
    """The label in metrics."""

    def reaches(self, announcement: Announcement) -> bool:
        """Whether this way leads to the learner that announced."""
        ...

    def fetch(
        self, announcement: Announcement, request: WeightRequest, sizes: Sequence[int]
    ) -> AsyncGenerator[list[Part]]:
        """All requested parts in order, in batches; `sizes` are theirs in bytes.

        Raises:
            NotFoundError: the learner does not have them.
            InvalidDataError: more or fewer bytes came.
            UnavailableError, DeadlineError: the learner cannot be reached this way.
        """
        ...

    def gave_trouble(self, announcement: Announcement) -> None:
        """What came was wrong, or nothing came: `reaches` may say no from now on."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


def batches(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges [first, end) of consecutive parts of at least BATCH_BYTES together, the last one fewer."""
    ranges: list[tuple[int, int]] = []
    first, size_bytes = 0, 0
    for index, size in enumerate(sizes):
        size_bytes += size
        if size_bytes >= BATCH_BYTES:
            ranges.append((first, index + 1))
            first, size_bytes = index + 1, 0
    return [*ranges, (first, len(sizes))] if first < len(sizes) else ranges
