"""What the publisher needs of a way to send weights; one module each, control always travels over WatchPolicy."""

from __future__ import annotations

from typing import Protocol

from learner.publication import Publication


class WeightOutlet(Protocol):
    """Answers requests for the parts of the newest publication, and of no other."""

    def offer(self, publication: Publication) -> None:
        """Answer with this one from now on."""
        ...
