"""Tickets, and what a server writes for them."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from leeway.types.fleet import Drain
from leeway.types.policy import PolicyVersion
from leeway.types.trajectory import SamplingParams, TrajectoryClose, TrajectoryFailure


class Purpose(enum.IntEnum):
    """The purpose of a ticket."""

    TRAIN = 1
    EVAL = 2


class WriteStatus(enum.IntEnum):
    """The outcome of one written item."""

    ACKNOWLEDGED = 1
    ABORTED = 2
    CONFLICT = 3
    OUT_OF_RANGE = 4
    INVALID = 5
    UNKNOWN = 6
    EXHAUSTED = 7


@dataclass(frozen=True, slots=True)
class TicketMember:
    """One trajectory to sample."""

    trajectory_id: str
    member: int
    seed: int


@dataclass(frozen=True, slots=True)
class Ticket:
    """A group's missing members, granted to one server for as long as its lease."""

    group_id: str
    attempt: int
    purpose: Purpose
    task_index: int
    members: tuple[TicketMember, ...]
    sampling: SamplingParams
    lease_seconds: float
    pinned_version: PolicyVersion | None = None  # EVAL only
    evaluation_id: str = ""  # EVAL only


class AcquiredTickets(NamedTuple):
    """The answer to a server that requested tickets."""

    tickets: list[Ticket]
    finished: bool  # the run has; no more requests
    drained: Drain | None  # set while this server gets no tickets


class WriteItem(NamedTuple):
    """One write: a serialized TrajectoryChunk, a close or a failure."""

    trajectory_id: str
    attempt: int
    seq: int
    content: bytes | TrajectoryClose | TrajectoryFailure


class WriteResult(NamedTuple):
    """The answer to one WriteItem."""

    trajectory_id: str
    attempt: int
    seq: int
    status: WriteStatus
    expected_seq: int = 0
    message: str = ""
    retry_seconds: float = 0.0  # for EXHAUSTED: how long to wait; 0 when not said
