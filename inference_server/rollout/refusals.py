"""Which attempts the replay buffer refused lately, so that each is acted upon once."""

from __future__ import annotations

from leeway.types import WriteResult


class Refusals:
    """The newest refused attempts, up to a number; the oldest is forgotten for a new one.

    An attempt can be refused again only by what was written of it before its first refusal was heard, and by the
    failure that ends it: whoever holds as many attempts as a writer holds items, twice over, forgets none too early.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._attempts: dict[tuple[str, int], None] = {}  # (trajectory id, attempt), the one heard of last is last

    def __len__(self) -> int:
        return len(self._attempts)

    def add(self, result: WriteResult) -> bool:
        """Remember a refusal; returns whether it is the first of its attempt."""
        key = (result.trajectory_id, result.attempt)
        first = key not in self._attempts
        self._attempts.pop(key, None)
        self._attempts[key] = None
        if len(self._attempts) > self._capacity:
            del self._attempts[next(iter(self._attempts))]
        return first
