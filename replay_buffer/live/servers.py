"""Which servers a run has, what they request, and how long they take: in memory, on the buffer's clock.

    join, request, write, renew ──> present, for as long as a lease          leave ──> gone at once
    request ──> its version and how many members the server takes at most
    ticket ──> last close of its members ──> how long a ticket takes, the newest few dozen

Nothing here decides what is safe: the run's state says whether a server is drained, and fences guard what it writes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Final

from leeway.types import PolicyVersion

_MOST_SERVERS: Final = 1000
"""Those that were silent longest are forgotten beyond it."""
_MOST_TICKETS: Final = 1 << 16
_RECENT_TICKETS: Final = 32


@dataclass(slots=True)
class ServerEntry:
    """One server. A waiting request keeps its entry, forgotten or not."""

    seen_at: float
    left: bool = False
    version: PolicyVersion | None = None  # of its last request
    newest: tuple[int, int] | None = None  # epoch and step of the newest version that it made a request at
    capacity: int = 0  # the most members that it requested at once
    ticket_seconds: deque[float] = field(default_factory=lambda: deque[float](maxlen=_RECENT_TICKETS))  # finished ones


class Fleet:
    """The servers of one run: bounded, however many names come and go."""

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self.servers: OrderedDict[str, ServerEntry] = OrderedDict()
        self._issued_at: OrderedDict[str, tuple[str, float]] = OrderedDict()  # by group: server, time of the ticket

    def seen(self, server_id: str, now: float) -> ServerEntry:
        """A server said something; one without a name is not remembered."""
        entry = self.servers.get(server_id) or ServerEntry(now)
        entry.seen_at, entry.left = now, False
        if server_id:
            self.servers[server_id] = entry
            self.servers.move_to_end(server_id)
            while len(self.servers) > _MOST_SERVERS:
                self.servers.popitem(last=False)
        return entry

    def requested(
        self, server_id: str, now: float, version: PolicyVersion, max_members: int
    ) -> tuple[ServerEntry, bool]:
        """A server requests tickets; returns its entry, and whether its earlier requests were at older versions."""
        entry, at = self.seen(server_id, now), (version.epoch, version.step)
        is_newer = entry.newest is not None and at > entry.newest
        entry.version, entry.newest = version, max(at, entry.newest or at)
        entry.capacity = max(max_members, entry.capacity)
        return entry, is_newer

    def left(self, server_id: str) -> None:
        """A server said that it leaves."""
        if (entry := self.servers.get(server_id)) is not None:
            entry.left = True

    def present(self, now: float) -> set[str]:
        """Servers that said something within a lease, and did not leave."""
        return {
            server_id
            for server_id, entry in list(self.servers.items())  # also called from the metrics thread
            if not entry.left and entry.seen_at > now - self._lease_seconds
        }

    def ticket_issued(self, group_id: str, server_id: str, now: float) -> None:
        """A server got the ticket of a training group."""
        self._issued_at[group_id] = server_id, now
        while len(self._issued_at) > _MOST_TICKETS:
            self._issued_at.popitem(last=False)

    def finished(self, group_id: str, now: float) -> None:
        """A group is complete."""
        server_id, issued_at = self._issued_at.pop(group_id, ("", now))
        if (entry := self.servers.get(server_id)) is not None:
            entry.ticket_seconds.append(now - issued_at)

    def open_ticket_seconds(self, unended: Container[str], now: float) -> dict[str, list[float]]:
        """By server, the ages of its tickets for training groups that have not ended; forgets the others."""
        for group_id in [group_id for group_id in self._issued_at if group_id not in unended]:
            del self._issued_at[group_id]
        ages: dict[str, list[float]] = {}
        for server_id, issued_at in self._issued_at.values():
            ages.setdefault(server_id, []).append(now - issued_at)
        return ages
