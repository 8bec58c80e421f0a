"""A run, its evaluations, and the outcomes of its groups."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from leeway.types.policy import ModelSignature, PolicyVersion
from leeway.types.tickets import Purpose
from leeway.types.trajectory import SamplingParams, TrajectoryClose


class GroupState(enum.IntEnum):
    """The states of a group."""

    OPEN = 1
    READY = 2
    DRAWN = 3
    CONSUMED = 4
    DROPPED = 5


class DropReason(enum.IntEnum):
    """Why a group was dropped; the first durable reason stands."""

    STALE = 1
    FAILED = 2
    LEASE_LOST = 3
    DEAD_LETTER = 4
    NO_SIGNAL = 5
    INVALID = 6
    CONFLICT = 7
    UNKNOWN_VERSION = 8
    ROLLED_BACK = 9
    RUN_END = 10
    DIVERGED = 11


@dataclass(frozen=True, slots=True)
class RunSpec:
    """The definition of a run; fixed at its first OpenRun."""

    run: str
    groups_per_step: int  # B
    members: int  # trajectories per group
    max_staleness: int  # S
    total_steps: int  # T
    seed: int
    train_task_count: int
    sampling: SamplingParams
    signature: ModelSignature
    dataset_digest: bytes
    root: PolicyVersion
    max_attempts: int
    drop_no_signal: bool = False  # groups with equal rewards are dropped when complete


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """The answer to a learner that opens a run."""

    epoch: int
    head: PolicyVersion
    finished: bool


@dataclass(frozen=True, slots=True)
class Rollback:
    """An explicit rollback: later steps of lower epochs are abandoned."""

    version: PolicyVersion  # what the run was returned to
    epoch: int  # the fence that it raised; no learner holds it


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Counts of training groups by state; issued = open + ready + drawn + consumed + sum(dropped)."""

    spec: RunSpec
    epoch: int
    head: PolicyVersion
    committed_step: int
    finished: bool
    issued: int
    open: int
    ready: int
    drawn: int
    consumed: int
    dropped: Mapping[DropReason, int]
    rollback: Rollback | None = None  # the newest explicit one
    dead_letters: int = 0  # whose tasks were not queued again


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A measurement of one pinned version on the first `task_count` held-out tasks."""

    evaluation_id: str
    version: PolicyVersion
    task_count: int
    members: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Rewards of the groups that completed, in task and member order."""

    complete: bool
    rewards: tuple[float, ...]
    failed: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A group that was set aside although nothing gives its task back."""

    group_id: str
    task_index: int
    reason: DropReason
    message: str
    attempts: int  # tickets that its task cost, those of lost groups before it included
    server_id: str  # the last that held it


@dataclass(frozen=True, slots=True)
class TrajectoryRecord:
    """A trajectory as exported: its acknowledged bytes and how it ended, if it did."""

    trajectory_id: str
    member: int
    attempt: int
    server_id: str
    close: TrajectoryClose | None
    failure: str
    chunks: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """A group as exported: with its fate, complete or not."""

    group_id: str
    purpose: Purpose
    task_index: int
    state: GroupState
    drop_reason: DropReason | None
    drop_message: str
    step: int
    evaluation_id: str
    issued_at: datetime
    trajectories: tuple[TrajectoryRecord, ...]
