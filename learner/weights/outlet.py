"""What the publisher needs of a way to send weights; one module each, control always travels over WatchPolicy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from learner.weights.publication import Publication
from leeway.types import WeightRequest


class WeightOutlet(Protocol):
    """Answers requests for the parts of the newest publication, and of no other."""

    def offer(self, publication: Publication) -> None:
        """Answer with this one from now on."""
        ...


@dataclass(frozen=True, slots=True)
class Seat:
    """A place in a broadcast: rank `rank` of `world_size` in a group; the learner is rank 0."""

    group: int
    rank: int
    world_size: int
    patience_seconds: float  # longest wait for the group to form, and for each piece


class Broadcasts(WeightOutlet, Protocol):
    """An outlet that sends to several servers at once."""

    library: str
    """Servers with another one cannot take part."""
    port: int
    """Where groups meet, at the host of the PolicyService."""

    def expect(self, server_ids: frozenset[str]) -> None:
        """The servers that will ask for the newest publication, if nothing happens to them."""
        ...

    async def join(self, server_id: str, request: WeightRequest, group: int) -> Seat:
        """A seat in the next broadcast of the requested parts, when the others have come or the wait is over.

        Args:
            server_id: who asks.
            request: the parts; its range is not used.
            group: that the server is still part of; 0 for none.

        Raises:
            NotFoundError: as Publication.parts; also when a newer version is published meanwhile.
        """
        ...
