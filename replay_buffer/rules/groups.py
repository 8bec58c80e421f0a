"""The parts of a run's state: groups with their members, batches, evaluations. Bytes stay in the log.

Where a record lies is storage's own business: the rules carry its handle about and never look into it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, NewType, Protocol

from leeway.types import DeadLetter, DropReason, Evaluation, GroupState, PolicyVersion, Purpose

SET_ASIDE: Final = frozenset(
    {
        DropReason.DEAD_LETTER,
        DropReason.FAILED,
        DropReason.INVALID,
        DropReason.CONFLICT,
        DropReason.UNKNOWN_VERSION,
    }
)
"""A group dropped for one of these is a dead letter until a person queues its task again."""


RecordHandle = NewType("RecordHandle", bytes)
"""Names a record of the log: `HANDLE_BYTES` that only storage can read."""
HANDLE_BYTES: Final = 16


class RecordHandles:
    """Handles end to end: a long run's have to fit into memory."""

    __slots__ = ("_packed",)

    def __init__(self, packed: bytes = b"") -> None:
        self._packed = bytearray(packed)

    def __len__(self) -> int:
        return len(self._packed) // HANDLE_BYTES

    def __getitem__(self, index: int) -> RecordHandle:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return RecordHandle(bytes(self._packed[index * HANDLE_BYTES : (index + 1) * HANDLE_BYTES]))

    def __iter__(self) -> Iterator[RecordHandle]:
        return (self[index] for index in range(len(self)))

    def append(self, record: RecordHandle) -> None:
        """Add one."""
        self._packed += record

    def packed(self) -> bytes:
        """All of them, for another `RecordHandles`."""
        return bytes(self._packed)


class MemberProgress(IntEnum):
    """The progress of one trajectory."""

    OPEN = 1
    CLOSED = 2
    FAILED = 3


class GroupMember:
    """One trajectory of a group, in its newest attempt."""

    __slots__ = ("attempt", "progress", "records", "reward", "server_id", "trajectory_id", "versions")

    def __init__(self, trajectory_id: str) -> None:
        self.trajectory_id = trajectory_id
        self.begin_attempt(0, "")

    def begin_attempt(self, attempt: int, server_id: str) -> None:
        """Begin an attempt; what an earlier one wrote is dead."""
        self.attempt = attempt
        self.server_id = server_id
        self.progress = MemberProgress.OPEN
        self.records = RecordHandles()  # index = seq: the chunks, then the close or failure
        self.versions: tuple[PolicyVersion, ...] = ()  # of the tokens sampled so far
        self.reward = 0.0

    @property
    def chunk_count(self) -> int:
        return len(self.records) - (self.progress is not MemberProgress.OPEN)

    @property
    def end_record(self) -> RecordHandle | None:
        """The close or failure that ended it."""
        return None if self.progress is MemberProgress.OPEN else self.records[len(self.records) - 1]


class Group:
    """The members sampled for one task."""

    __slots__ = (
        "attempt",
        "created",
        "drop_message",
        "drop_reason",
        "ended_at",
        "evaluation_id",
        "group_id",
        "issued_at_ns",
        "lost_attempts",
        "members",
        "number",
        "place",
        "purpose",
        "requeued",
        "server_id",
        "state",
        "step",
        "task_index",
        "version",
    )

    def __init__(self, group_id: str, created: int, purpose: Purpose, task_index: int, member_count: int) -> None:
        self.group_id = group_id
        self.created = created  # groups of the run: in the order of issue, from 1
        self.number = 0  # training groups: in the order of issue, from 1
        self.purpose = purpose
        self.task_index = task_index
        self.evaluation_id = ""
        self.issued_at_ns = 0
        self.members = tuple(GroupMember(f"{group_id}.{index}") for index in range(member_count))
        self.state = GroupState.OPEN
        self.drop_reason: DropReason | None = None
        self.drop_message = ""
        self.lost_attempts = 0  # dead letters: what earlier groups of the task cost
        self.requeued = False  # dead letters: the task was queued again
        self.step = 0
        self.place = 0  # in the step's batch
        self.attempt = 0
        self.server_id = ""
        self.version: PolicyVersion | None = None  # what the server of the newest ticket had acknowledged
        self.ended_at: RecordHandle | None = None  # the record that ended it

    @property
    def missing(self) -> list[int]:
        """Members that are not closed."""
        return [index for index, member in enumerate(self.members) if member.progress is not MemberProgress.CLOSED]

    @property
    def being_sampled(self) -> bool:
        """Whether the server of the newest ticket may still write a member."""
        return any(member.progress is MemberProgress.OPEN for member in self.members)

    @property
    def sampled_versions(self) -> set[PolicyVersion]:
        """Versions of the tokens sampled so far; before the first, the one its server had acknowledged."""
        versions = {version for member in self.members for version in member.versions}
        if not versions and self.version is not None:
            return {self.version}
        return versions

    @property
    def ended(self) -> bool:
        return self.state in (GroupState.CONSUMED, GroupState.DROPPED)

    @property
    def is_dead_letter(self) -> bool:
        """Whether it was set aside, and nobody has queued its task again."""
        return self.purpose is Purpose.TRAIN and self.drop_reason in SET_ASIDE and not self.requeued

    def letter(self) -> DeadLetter:
        """What a person is shown of a group that was set aside."""
        assert self.drop_reason is not None
        attempts = self.lost_attempts + self.attempt
        return DeadLetter(self.group_id, self.task_index, self.drop_reason, self.drop_message, attempts, self.server_id)

    def frozen(self) -> Group:
        """A copy that stays as the group is now."""
        group = copy.copy(self)
        group.members = tuple(copy.copy(member) for member in self.members)
        for member in group.members:
            member.records = RecordHandles(member.records.packed())
        return group


@dataclass(slots=True)
class DrawnBatch:
    """The ordered groups of one step."""

    step: int
    group_ids: tuple[str, ...]
    sealed: bool = False


@dataclass(slots=True)
class EvaluationState:
    """One evaluation: at most one group per task, made when a server requests a ticket for it."""

    evaluation: Evaluation
    group_ids: dict[int, str] = field(default_factory=dict[int, str])  # by task
    outcomes: dict[int, tuple[float, ...]] = field(default_factory=dict[int, tuple[float, ...]])
    """Rewards of each task whose group has ended; none where it was dropped."""
    closed: bool = False  # nothing more is issued: the run ended, or the version was left behind

    @property
    def ended(self) -> bool:
        """Whether nothing about it will change."""
        return len(self.outcomes) == (len(self.group_ids) if self.closed else self.evaluation.task_count)


class Ended(Protocol):
    """What has ended in one run, outside of memory. Reading it may touch the disk."""

    def get(self, group_id: str) -> Group | None:
        """An ended group that has not been retired."""
        ...

    def put(self, group: Group) -> None:
        """Take a group over, or again when a late record was added to it."""
        ...

    def batch(self, step: int) -> tuple[str, ...]:
        """The groups that a committed step trained on, in order; fewer once some have been retired."""
        ...

    def evaluation(self, evaluation_id: str) -> EvaluationState | None:
        """An ended evaluation."""
        ...

    def put_evaluation(self, evaluation: EvaluationState, record: RecordHandle) -> None:
        """Take an evaluation over that this record ended; replaces one of the same id."""
        ...

    def groups(self) -> Iterator[Group]:
        """Every ended group, in the order of issue."""
        ...

    def dead_letters(self, newest: int) -> list[Group]:
        """Dead letters, in the order of issue; at most so many, the newest."""
        ...


class Groups:
    """Every group of a run by id: those that have not ended in memory, the others behind `Ended`."""

    def __init__(self, ended: Ended) -> None:
        self.unended: dict[str, Group] = {}
        self._ended = ended

    def __getitem__(self, group_id: str) -> Group:
        group = self.get(group_id)
        if group is None:
            raise KeyError(group_id)
        return group

    def get(self, group_id: str) -> Group | None:
        """A group; None when there is none, or it has been retired."""
        group = self.unended.get(group_id)
        return self._ended.get(group_id) if group is None else group

    def values(self) -> list[Group]:
        """Every group, in the order of issue; for checks, since it brings all of them into memory."""
        return sorted([*self._ended.groups(), *self.unended.values()], key=lambda group: group.created)
