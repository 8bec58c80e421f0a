"""Leases: until when a ticket stays with its server.

A lease is only a hint: a late writer is refused by its attempt, never by this clock.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Final

EXPIRED: Final = float("-inf")


class Leases:
    """Deadlines by group, on a monotonic clock. They are in memory only: a restart renews every lease."""

    def __init__(self, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self._deadlines: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._deadlines)

    def renew(self, group_id: str, now: float) -> None:
        """The group's server showed that it is active."""
        self._deadlines[group_id] = now + self.lease_seconds

    def expire(self, group_ids: Iterable[str]) -> None:
        """The server of these groups is known to be gone."""
        for group_id in group_ids:
            self._deadlines[group_id] = EXPIRED

    def release(self, group_id: str) -> None:
        """The group needs no server any more."""
        self._deadlines.pop(group_id, None)

    def retain(self, group_ids: Container[str]) -> None:
        """Forget every group but these."""
        for group_id in [group_id for group_id in self._deadlines if group_id not in group_ids]:
            del self._deadlines[group_id]

    def expired(self, group_id: str, now: float) -> bool:
        """Whether the group may be issued again."""
        return self._deadlines.get(group_id, EXPIRED) <= now

    def next_deadline(self, now: float) -> float | None:
        """When the next lease runs out; None when none is held."""
        return min((deadline for deadline in self._deadlines.values() if deadline > now), default=None)
