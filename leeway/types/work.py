"""What a server is lent, and what it writes."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from leeway.types.policy import PolicyVersion
from leeway.types.trajectory import SamplingParams, TrajectoryClose, TrajectoryFailure


class Purpose(enum.IntEnum):
    """What a ticket is for."""

    TRAIN = 1
    EVAL = 2


class WriteStatus(enum.IntEnum):
    """What became of one written item."""

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
    """A loan of a group's missing members to one server."""

    group_id: str
    attempt: int
    purpose: Purpose
    task_index: int
    members: tuple[TicketMember, ...]
    sampling: SamplingParams
    lease_seconds: float
    pinned_version: PolicyVersion | None = None  # EVAL only
    evaluation_id: str = ""  # EVAL only


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
