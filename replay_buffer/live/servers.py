"""Which servers a run has, and how long they take: on the buffer's clock, in memory, for people and the learner.

    join, ask, write, renew ──> present, for a lease          leave ──> gone at once
    ticket ──> last close of its members ──> how long a loan takes, the newest few dozen

Nothing here decides what is safe: whether a server is drained is in the run's state, and what it may write is fenced.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Final

from leeway.types import PolicyVersion

_MOST_SERVERS: Final = 1000
"""Those that were silent longest are forgotten beyond it."""
_MOST_LOANS: Final = 1 << 16
_RECENT_LOANS: Final = 32


@dataclass(slots=True)
class Member:
    """One server."""

    seen_at: float
    left: bool = False
    version: PolicyVersion | None = None
    loan_seconds: deque[float] = field(default_factory=lambda: deque[float](maxlen=_RECENT_LOANS))  # finished ones


class Fleet:
    """The servers of one run."""

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self.members: OrderedDict[str, Member] = OrderedDict()
        self._lent_at: OrderedDict[str, tuple[str, float]] = OrderedDict()  # by group: server, time of the ticket

    def seen(self, server_id: str, now: float, version: PolicyVersion | None = None) -> None:
        """A server said something."""
        if not server_id:
            return
        member = self.members.setdefault(server_id, Member(now))
        self.members.move_to_end(server_id)
        member.seen_at, member.left = now, False
        if version is not None:
            member.version = version
        while len(self.members) > _MOST_SERVERS:
            self.members.popitem(last=False)

    def left(self, server_id: str) -> None:
        """A server said that it goes."""
        if (member := self.members.get(server_id)) is not None:
            member.left = True

    def present(self, now: float) -> set[str]:
        """Servers that said something within a lease, and did not leave."""
        return {
            server_id
            for server_id, member in list(self.members.items())  # also called from the metrics thread
            if not member.left and member.seen_at > now - self._lease_seconds
        }

    def lent(self, group_id: str, server_id: str, now: float) -> None:
        """A training group goes to a server."""
        self._lent_at[group_id] = server_id, now
        while len(self._lent_at) > _MOST_LOANS:
            self._lent_at.popitem(last=False)

    def finished(self, group_id: str, now: float) -> None:
        """A group is complete."""
        server_id, lent_at = self._lent_at.pop(group_id, ("", now))
        if (member := self.members.get(server_id)) is not None:
            member.loan_seconds.append(now - lent_at)

    def open_loans(self, unended: Container[str], now: float) -> dict[str, list[float]]:
        """Ages of the training groups that each server still holds; forgets what has ended."""
        for group_id in [group_id for group_id in self._lent_at if group_id not in unended]:
            del self._lent_at[group_id]
        ages: dict[str, list[float]] = {}
        for server_id, lent_at in self._lent_at.values():
            ages.setdefault(server_id, []).append(now - lent_at)
        return ages
