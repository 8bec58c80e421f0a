"""Transitions: everything that can happen to a run, each an atomic record of the log.

The two that are made for every written item are tuples, which are cheaper to make than frozen dataclasses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from leeway.types import (
    DrainReason,
    DropReason,
    Evaluation,
    PolicyVersion,
    RunSpec,
    Ticket,
    TrajectoryClose,
    TrajectoryFailure,
)


@dataclass(frozen=True, slots=True)
class RunOpened:
    """A learner opened the run: raises the epoch, commits every batch up to the checkpoint, voids every later one."""

    spec: RunSpec
    epoch: int
    checkpoint: PolicyVersion  # the new head
    incarnation: bytes = b""  # names the learner's process; empty when it has no name


@dataclass(frozen=True, slots=True)
class TicketIssued:
    """A server got the ticket of a group's missing members. The first ticket of a group creates it."""

    ticket: Ticket
    server_id: str
    version: PolicyVersion  # what the server had acknowledged
    task_cursor: int  # after this issue; unchanged when the task came from the requeue list


class ChunkWritten(NamedTuple):
    """A chunk of a trajectory, byte for byte."""

    trajectory_id: str
    attempt: int
    seq: int
    chunk: bytes
    versions: tuple[PolicyVersion, ...]  # those of its spans; read from the chunk, not stored beside it

    def __repr__(self) -> str:
        return f"ChunkWritten({self.trajectory_id!r}, {self.attempt}, {self.seq}, {len(self.chunk)} bytes)"


class TrajectoryClosed(NamedTuple):
    """A trajectory is complete and valid."""

    trajectory_id: str
    attempt: int
    close: TrajectoryClose


@dataclass(frozen=True, slots=True)
class TrajectoryFailed:
    """This attempt will not complete a trajectory. Not retryable: its group, unless ended, is dropped as failed."""

    trajectory_id: str
    attempt: int
    failure: TrajectoryFailure


@dataclass(frozen=True, slots=True)
class GroupsDropped:
    """Groups were set aside for one reason."""

    group_ids: tuple[str, ...]
    reason: DropReason
    message: str


@dataclass(frozen=True, slots=True)
class BatchDrawn:
    """A step got its groups; replaces an earlier batch of the same step that had lost some."""

    epoch: int
    step: int
    group_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PolicyAdvanced:
    """A step was trained: its batch is sealed, its version is the head, what became stale is dropped."""

    version: PolicyVersion
    parent: PolicyVersion
    stale_group_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepsCommitted:
    """Every step up to this one is consumed."""

    step: int
    oldest_kept_step: int = 0  # of the learner's checkpoints; 0 while it has not said


@dataclass(frozen=True, slots=True)
class EvaluationCreated:
    """A learner created an evaluation; it replaces an ended one of the same id."""

    evaluation: Evaluation
    epoch: int


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The run ended; the groups that were still live are dropped with reason run_end."""

    group_ids: tuple[str, ...]
    given_up: bool = False  # by a person: groups of steps that are trained and not committed are among them


@dataclass(frozen=True, slots=True)
class RunRolledBack:
    """A person returned the run to an older version: raises the epoch, voids every later batch, drops these groups.

    Unlike any other drop it takes consumed groups too: those of the steps that it abandons.
    """

    version: PolicyVersion  # the new head
    epoch: int
    group_ids: tuple[str, ...]
    task_indices: tuple[int, ...]  # of these groups


@dataclass(frozen=True, slots=True)
class DeadLettersRequeued:
    """The tasks of these groups, which were set aside, are queued again with all their tries."""

    group_ids: tuple[str, ...]
    task_indices: tuple[int, ...]  # of these groups
    is_all: bool = False  # no other dead letter is left that could be queued again


@dataclass(frozen=True, slots=True)
class RunRestored:
    """The log goes on as a restored backup: fences and numbers rise above the original's, OPEN groups are dropped."""

    epoch: int
    created: int
    group_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ServerDrained:
    """A server gets no more tickets; what a diverging one wrote of these groups is dropped with them."""

    server_id: str
    reason: DrainReason
    message: str
    group_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ServerReadmitted:
    """A drained server gets tickets again."""

    server_id: str


Transition = (
    RunOpened
    | TicketIssued
    | ChunkWritten
    | TrajectoryClosed
    | TrajectoryFailed
    | GroupsDropped
    | BatchDrawn
    | PolicyAdvanced
    | StepsCommitted
    | EvaluationCreated
    | RunFinished
    | RunRolledBack
    | DeadLettersRequeued
    | RunRestored
    | ServerDrained
    | ServerReadmitted
)
