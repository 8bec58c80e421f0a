"""What servers have asked for: how much at once, and at which version last. A hint, in memory only."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from leeway.types import PolicyVersion

_MOST_SERVERS: Final = 1000
"""Servers that are remembered; beyond it those that have not asked for longest are forgotten."""


@dataclass(slots=True)
class Ask:
    """One server's. A call that waits keeps it, forgotten or not."""

    epoch_and_step: tuple[int, int]  # of the newest version that it asked at
    capacity: int = 0  # most members it asked for at once


class Asks:
    """Of every server of a run: bounded, however many names come and go."""

    def __init__(self) -> None:
        self._by_server: OrderedDict[str, Ask] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_server)

    def take(self, server_id: str, version: PolicyVersion, max_members: int) -> tuple[Ask, bool]:
        """A server asks; returns what is known of it, and whether it asked before at an older version."""
        at = (version.epoch, version.step)
        ask = self._by_server.setdefault(server_id, Ask(at))
        self._by_server.move_to_end(server_id)
        is_newer = at > ask.epoch_and_step
        ask.epoch_and_step = max(at, ask.epoch_and_step)
        ask.capacity = max(max_members, ask.capacity)
        while len(self._by_server) > _MOST_SERVERS:
            self._by_server.popitem(last=False)
        return ask, is_newer
