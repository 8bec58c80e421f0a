"""A run's state: the fold of its transitions, and nothing else.

`RunState.apply` is total on what the deciding functions produce, decides nothing beyond what a transition's docstring
says, and never looks at a clock. Occupancy is read off the groups' states, so it cannot leak.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, NamedTuple, assert_never

from leeway.types import (
    DeadLetter,
    DropReason,
    Evaluation,
    EvaluationResult,
    GroupState,
    PolicyVersion,
    Purpose,
    Rollback,
    RunSpec,
    RunStatus,
    Ticket,
)
from replay_buffer.lineage import Lineage
from replay_buffer.transitions import (
    BatchDrawn,
    ChunkWritten,
    DeadLettersRequeued,
    EvaluationCreated,
    GroupsDropped,
    PolicyAdvanced,
    RunFinished,
    RunOpened,
    RunRolledBack,
    StepsCommitted,
    TicketIssued,
    TrajectoryClosed,
    TrajectoryFailed,
    Transition,
)

REQUEUED: Final = frozenset({DropReason.STALE, DropReason.LEASE_LOST, DropReason.ROLLED_BACK})
"""A group dropped for one of these gives its task back."""

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

    def __init__(self) -> None:
        self._words = array("Q")

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


class Progress(Enum):
    """How far one trajectory is."""

    OPEN = auto()
    CLOSED = auto()
    FAILED = auto()


class Member:
    """One trajectory of a group, in its newest attempt. Its bytes stay in the log."""

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
        "drop_message",
        "drop_reason",
        "evaluation_id",
        "group_id",
        "issued_at_ns",
        "members",
        "number",
        "purpose",
        "server_id",
        "state",
        "step",
        "task_index",
        "version",
    )

    def __init__(self, ticket: Ticket, number: int, issued_at_ns: int) -> None:
        self.group_id = ticket.group_id
        self.number = number  # training groups: in the order of issue, from 1
        self.purpose = ticket.purpose
        self.task_index = ticket.task_index
        self.evaluation_id = ticket.evaluation_id
        self.issued_at_ns = issued_at_ns
        self.members = tuple(Member(member.trajectory_id) for member in ticket.members)
        self.state = GroupState.OPEN
        self.drop_reason: DropReason | None = None
        self.drop_message = ""
        self.step = 0
        self.attempt = 0
        self.server_id = ""
        self.version: PolicyVersion | None = None  # what the server of the newest ticket had acknowledged

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
    closed: bool = False  # nothing more is issued: the run ended, or the version was left behind


class RunState:
    """One run."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.epoch = 0
        self.lineage = Lineage(spec.root)
        self.committed_step = 0
        self.finished = False
        self.groups: dict[str, Group] = {}
        self.live: dict[str, Group] = {}  # training groups that have not ended, in the order of issue
        self.live_evaluation: dict[str, Group] = {}
        self.batches: dict[int, Batch] = {}
        self.evaluations: dict[str, EvaluationState] = {}
        self.task_cursor = 0
        self.requeued: deque[int] = deque()
        self.lost_attempts: Counter[int] = Counter()  # by task: what groups cost that were given up unfinished
        self.dead_letters: dict[str, DeadLetter] = {}  # by group, oldest first
        self.rollback: Rollback | None = None  # the newest explicit one
        self.issued = 0
        self.consumed = 0
        self.dropped: Counter[DropReason] = Counter()

    @property
    def head(self) -> PolicyVersion:
        return self.lineage.head

    @property
    def must_open_at(self) -> PolicyVersion | None:
        """The version that the next learner has to bring: after an explicit rollback."""
        return self.rollback.version if self.rollback is not None and self.rollback.epoch == self.epoch else None

    def attempts(self, group: Group) -> int:
        """Tickets that a group's task has cost since it last gave a whole group."""
        lost = self.lost_attempts[group.task_index] if group.purpose is Purpose.TRAIN else 0
        return lost + group.attempt

    def find(self, trajectory_id: str) -> tuple[Group, int] | None:
        """The group of a trajectory and its place in it; None when it was never issued."""
        group_id, _, member = trajectory_id.rpartition(".")
        group = self.groups.get(group_id)
        if group is None or not member.isdecimal() or int(member) >= len(group.members):
            return None
        return group, int(member)

    def occupying(self) -> Iterator[Group]:
        """L of the admission inequality: OPEN, READY, or DRAWN in a batch that is not sealed."""
        for group in self.live.values():
            if group.state is not GroupState.DRAWN or not self.batches[group.step].sealed:
                yield group

    def unended(self) -> list[Group]:
        """Groups that can still be dropped: live ones of either purpose, except those in a sealed batch."""
        return [*self.occupying(), *self.live_evaluation.values()]

    def status(self) -> RunStatus:
        """Counts by state, read off the groups."""
        states = Counter(group.state for group in list(self.live.values()))
        return RunStatus(
            spec=self.spec,
            epoch=self.epoch,
            head=self.head,
            committed_step=self.committed_step,
            finished=self.finished,
            issued=self.issued,
            open=states[GroupState.OPEN],
            ready=states[GroupState.READY],
            drawn=states[GroupState.DRAWN],
            consumed=self.consumed,
            dropped=dict(self.dropped),
            rollback=self.rollback,
            dead_letters=len(self.dead_letters),
        )

    def evaluation_result(self, evaluation_id: str) -> EvaluationResult:
        """What an evaluation has measured so far. A task that cannot get a complete group any more has failed."""
        state = self.evaluations[evaluation_id]
        wanted = state.evaluation
        rewards: list[float] = []
        failed = ended = 0
        for task_index in range(wanted.task_count):
            group_id = state.group_ids.get(task_index)
            group = None if group_id is None else self.groups[group_id]
            if group is not None and group.state is GroupState.CONSUMED:
                rewards += [member.reward for member in group.members]
            elif state.closed or (group is not None and group.ended):
                failed += wanted.members
            else:
                continue
            ended += 1
        return EvaluationResult(ended == wanted.task_count, tuple(rewards), failed)

    # The fold

    def apply(self, transition: Transition, recorded_at_ns: int, location: Location) -> None:
        """Take one transition over; `location` is where its record lies in the log."""
        match transition:
            case ChunkWritten():
                member = self._member(transition.trajectory_id)
                member.records.append(location)
                new = [version for version in transition.versions if version not in member.versions]
                if new:
                    member.versions = (*member.versions, *new)
            case TrajectoryClosed():
                self._close(transition, location)
            case TrajectoryFailed():
                self._fail(transition, location)
            case TicketIssued():
                self._issue(transition, recorded_at_ns)
            case GroupsDropped():
                self._drop(transition.group_ids, transition.reason, transition.message)
            case BatchDrawn():
                self.batches[transition.step] = Batch(transition.step, transition.group_ids)
                for group_id in transition.group_ids:
                    group = self.groups[group_id]
                    group.state, group.step = GroupState.DRAWN, transition.step
            case PolicyAdvanced():
                self.batches[transition.version.step].sealed = True
                self.lineage.register(transition.version, transition.parent)
                self._drop(transition.stale_group_ids, DropReason.STALE, f"too old for version {transition.version}")
            case StepsCommitted():
                self._commit(transition.step)
            case RunOpened():
                self._open(transition)
            case EvaluationCreated():
                evaluation = transition.evaluation
                self.evaluations[evaluation.evaluation_id] = EvaluationState(evaluation)
            case RunFinished():
                self._drop(transition.group_ids, DropReason.RUN_END, "the run ended")
                self.finished = True
                for evaluation_state in self.evaluations.values():
                    evaluation_state.closed = True
            case RunRolledBack():
                self._roll_back(transition)
            case DeadLettersRequeued():
                for group_id in transition.group_ids:
                    task_index = self.dead_letters.pop(group_id).task_index
                    self.lost_attempts.pop(task_index, None)
                    self.requeued.append(task_index)
            case _:
                assert_never(transition)

    def _member(self, trajectory_id: str) -> Member:
        found = self.find(trajectory_id)
        assert found is not None
        return found[0].members[found[1]]

    def _issue(self, issued: TicketIssued, recorded_at_ns: int) -> None:
        ticket = issued.ticket
        group = self.groups.get(ticket.group_id)
        if group is None:
            group = Group(ticket, self.issued + 1, recorded_at_ns)
            self.groups[group.group_id] = group
            if ticket.purpose is Purpose.TRAIN:
                self.live[group.group_id] = group
                self.issued += 1
                if issued.task_cursor == self.task_cursor:
                    self.requeued.remove(ticket.task_index)
                self.task_cursor = issued.task_cursor
            else:
                self.live_evaluation[group.group_id] = group
                self.evaluations[ticket.evaluation_id].group_ids[ticket.task_index] = group.group_id
        group.attempt = ticket.attempt
        group.server_id = issued.server_id
        group.version = issued.version
        for lent in ticket.members:
            group.members[lent.member].lend(ticket.attempt, issued.server_id)

    def _close(self, closed: TrajectoryClosed, location: Location) -> None:
        found = self.find(closed.trajectory_id)
        assert found is not None
        group, index = found
        member = group.members[index]
        member.records.append(location)
        member.progress = Progress.CLOSED
        member.reward = closed.close.reward
        if group.missing:
            return
        if group.purpose is Purpose.TRAIN:
            group.state = GroupState.READY
            self.lost_attempts.pop(group.task_index, None)
        else:
            self._consume(group)

    def _fail(self, failed: TrajectoryFailed, location: Location) -> None:
        found = self.find(failed.trajectory_id)
        assert found is not None
        group, index = found
        member = group.members[index]
        member.records.append(location)
        member.progress = Progress.FAILED
        member.versions = ()
        if not failed.failure.retryable and not group.ended:
            message = f"trajectory {failed.trajectory_id}: {failed.failure.message}"
            self._drop((group.group_id,), DropReason.FAILED, message)

    def _drop(self, group_ids: Iterable[str], reason: DropReason, message: str) -> None:
        for group_id in group_ids:
            group = self.groups[group_id]
            if group.ended:
                continue  # the first durable reason stands
            if group.purpose is Purpose.TRAIN:
                self.dropped[reason] += 1
                if reason in REQUEUED:
                    self.requeued.append(group.task_index)
                    self._count_lost(group, reason)
                elif reason in SET_ASIDE:
                    self.dead_letters[group_id] = DeadLetter(
                        group_id, group.task_index, reason, message, self.attempts(group), group.server_id
                    )
            group.state, group.drop_reason, group.drop_message = GroupState.DROPPED, reason, message
            self._retire(group)

    def _count_lost(self, group: Group, reason: DropReason) -> None:
        """Remember in vain attempts beyond their group, so that a task that kills its servers cannot come for ever."""
        if group.state is not GroupState.OPEN or reason is DropReason.ROLLED_BACK:
            return
        still_tried = group.at_work and reason is DropReason.STALE
        if lost := group.attempt - still_tried:
            self.lost_attempts[group.task_index] += lost

    def _consume(self, group: Group) -> None:
        group.state = GroupState.CONSUMED
        if group.purpose is Purpose.TRAIN:
            self.consumed += 1
        self._retire(group)

    def _retire(self, group: Group) -> None:
        """Forget what only a live group needs."""
        self.live.pop(group.group_id, None)
        self.live_evaluation.pop(group.group_id, None)
        group.version = None
        for member in group.members:
            member.versions = ()

    def _commit(self, step: int) -> None:
        for at in range(self.committed_step + 1, step + 1):
            for group_id in self.batches[at].group_ids:
                self._consume(self.groups[group_id])
        self.committed_step = max(self.committed_step, step)

    def _open(self, opened: RunOpened) -> None:
        self.epoch = opened.epoch
        self._commit(opened.checkpoint.step)
        self._void_batches(opened.checkpoint)
        self.lineage.rollback(opened.checkpoint)

    def _void_batches(self, head: PolicyVersion) -> None:
        """Return what was drawn after the new head; nobody measures another version any more."""
        for step in [step for step in self.batches if step > head.step]:
            for group_id in self.batches.pop(step).group_ids:
                group = self.groups[group_id]
                if group.state is GroupState.DRAWN:
                    group.state, group.step = GroupState.READY, 0
        for evaluation in self.evaluations.values():
            if evaluation.evaluation.version != head:
                evaluation.closed = True

    def _roll_back(self, rolled_back: RunRolledBack) -> None:
        self.epoch = rolled_back.epoch
        self.rollback = Rollback(rolled_back.version, rolled_back.epoch)
        self._void_batches(rolled_back.version)
        self.committed_step = min(self.committed_step, rolled_back.version.step)
        self.lineage.discard_after(rolled_back.version)
        for group_id in rolled_back.group_ids:
            group = self.groups[group_id]
            if group.state is GroupState.CONSUMED:
                self.consumed -= 1
                group.state = GroupState.READY  # for the moment: what has ended is not dropped
            group.step = 0
        self._drop(rolled_back.group_ids, DropReason.ROLLED_BACK, f"the run was rolled back to {rolled_back.version}")
