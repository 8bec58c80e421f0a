"""The servers of a run."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime

from leeway.types.policy import PolicyVersion


class DrainReason(enum.IntEnum):
    """Why a server is drained."""

    DIVERGING = 1
    SLOW = 2
    OPERATOR = 3


@dataclass(frozen=True, slots=True)
class Drain:
    """The mark on a server that gets no more tickets, with the reason."""

    reason: DrainReason
    message: str
    drained_at: datetime


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """The state of one server of a run in the buffer; times are on the buffer's clock."""

    server_id: str
    present: bool  # has said something within a lease, and has not left
    drained: Drain | None
    version: PolicyVersion | None  # at which it last requested tickets
    tickets: int  # groups that it holds
    oldest_ticket_seconds: float  # age of the oldest that it holds; 0 without one
    timed_tickets: int  # training groups that it finished lately or still holds
    median_ticket_seconds: float  # of these, from ticket to last close; one that it holds counts with its age
