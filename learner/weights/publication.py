"""A publication: the newest snapshot, and the deltas that lead to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from leeway.errors import InvalidDataError, NotFoundError
from leeway.types import WeightDelta, WeightRequest, WeightSnapshot
from leeway.weights.deltas import encode_delta, payload_digest
from leeway.weights.digests import WEIGHT_THREADS

Part = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Link:
    """A delta and its bytes."""

    delta: WeightDelta
    payload: bytes


@dataclass(frozen=True, slots=True)
class Publication:
    """A snapshot and a chain of deltas that ends at it; immutable, so that every sender sends it whole."""

    snapshot: WeightSnapshot
    links: tuple[Link, ...] = ()  # each starts where the one before it ends

    def followed_by(self, snapshot: WeightSnapshot, max_chain: int) -> Publication:
        """The publication of the next version. Reads all weights: runs in a thread.

        The chain keeps at most `max_chain` links and fewer bytes than the snapshot; it starts again after a version
        whose delta would not be smaller than its snapshot.
        """
        payload = encode_delta(self.snapshot, snapshot, WEIGHT_THREADS) if max_chain else None
        if payload is None:
            return Publication(snapshot)
        delta = WeightDelta(
            self.snapshot.version.digest, snapshot.version.digest, payload_digest(payload), len(payload)
        )
        links = [*self.links, Link(delta, payload)][-max_chain:]
        sums = accumulate(link.delta.size_bytes for link in reversed(links))
        kept = sum(size_bytes < snapshot.manifest.size_bytes for size_bytes in sums)
        return Publication(snapshot, tuple(links[len(links) - kept :]))

    @property
    def deltas(self) -> tuple[WeightDelta, ...]:
        """The chain, oldest first."""
        return tuple(link.delta for link in self.links)

    def parts(self, request: WeightRequest) -> Sequence[Part]:
        """The requested parts.

        Raises:
            NotFoundError: this is another version, or no deltas lead to it from the base.
            InvalidDataError: there are no such parts.
        """
        version = self.snapshot.version
        if request.version != version:
            raise NotFoundError(f"{request.version} is no longer the newest version; wait for the next announcement")
        parts = self._chain(request.base_digest) if request.base_digest else self.snapshot.buffers
        end = request.end_part or len(parts)
        if not request.first_part <= end <= len(parts):
            raise InvalidDataError(
                f"{version} has no parts {request.first_part} to {end} of {len(parts)}; ask for what is announced"
            )
        return parts[request.first_part : end]

    def _chain(self, base_digest: bytes) -> Sequence[Part]:
        # The newest link from there: weights may come back to what they were.
        for index in range(len(self.links) - 1, -1, -1):
            if self.links[index].delta.base_digest == base_digest:
                return [link.payload for link in self.links[index:]]
        raise NotFoundError(f"no deltas lead to {self.snapshot.version} from the given base; fetch the snapshot")


def kind_of(request: WeightRequest) -> str:
    """The label in metrics of what a request asks for."""
    return "delta" if request.base_digest else "snapshot"
