"""What a run's state is made of: groups with their members, batches, evaluations. Bytes stay in the log."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, NamedTuple, Protocol

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


class Location(NamedTuple):
    """Where a record lies in the log."""

    segment: int
    offset: int  # of the payload
    size_bytes: int  # of the payload


class Locations:
    """Locations at 16 bytes each: the index of a long run has to fit into memory."""

    __slots__ = ("_words",)

    def __init__(self, packed: bytes = b"") -> None:
        self._words = array("Q", packed)

    def __len__(self) -> int:
        return len(self._words) // 2

    def __getitem__(self, index: int) -> Location:
        place, size_bytes = self._words[2 * index], self._words[2 * index + 1]
        return Location(place >> 32, place & 0xFFFFFFFF, size_bytes)

    def __iter__(self) -> Iterator[Location]:
        return (self[index] for index in range(len(self)))

    def append(self, location: Location) -> None:
        """Add one."""
        self._words.append(location.segment << 32 | location.offset)
        self._words.append(location.size_bytes)

    def packed(self) -> bytes:
        """All of them, for a `Locations` on the same kind of machine."""
        return self._words.tobytes()


class Progress(IntEnum):
    """How far one trajectory is."""

    OPEN = 1
    CLOSED = 2
    FAILED = 3


class Member:
    """One trajectory of a group, in its newest attempt."""

    __slots__ = ("attempt", "progress", "records", "reward", "server_id", "trajectory_id", "versions")

    def __init__(self, trajectory_id: str) -> None:
        self.trajectory_id = trajectory_id
        self.lend(0, "")

    def lend(self, attempt: int, server_id: str) -> None:
        """Begin an attempt; what an earlier one wrote is dead."""
        self.attempt = attempt
        self.server_id = server_id
        self.progress = Progress.OPEN
        self.records = Locations()  # index = seq: the chunks, then the close or failure
        self.versions: tuple[PolicyVersion, ...] = ()  # of the tokens sampled so far
        self.reward = 0.0

    @property
    def chunk_count(self) -> int:
        return len(self.records) - (self.progress is not Progress.OPEN)


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
        self.members = tuple(Member(f"{group_id}.{index}") for index in range(member_count))
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
        self.ended_at: Location | None = None  # the record that ended it

    @property
    def missing(self) -> list[int]:
        """Members that are not closed."""
        return [index for index, member in enumerate(self.members) if member.progress is not Progress.CLOSED]

    @property
    def at_work(self) -> bool:
        """Whether a member of the newest ticket may still be written."""
        return any(member.progress is Progress.OPEN for member in self.members)

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

    @property
    def oldest_segment(self) -> int | None:
        """The oldest segment that holds something of it; None before the first write."""
        return min((member.records[0].segment for member in self.members if len(member.records)), default=None)


@dataclass(slots=True)
class Batch:
    """The ordered groups of one step."""

    step: int
    group_ids: tuple[str, ...]
    sealed: bool = False


@dataclass(slots=True)
class EvaluationState:
    """One evaluation: at most one group per task, made when a server asks for it."""

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

    def put_evaluation(self, evaluation: EvaluationState, location: Location) -> None:
        """Take an evaluation over that the record at a location ended; replaces one of the same id."""
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
