"""A run's state: the fold of its transitions, and nothing else.

`RunState.apply` is total on what the deciding functions produce, decides nothing beyond what a transition's docstring
says, and never looks at a clock. Occupancy is read off the groups' states, so it cannot leak.

    live groups, batches that are not committed, the newest evaluations    in memory
    ended groups, older evaluations                                        handed to `Ended`, and asked for by id

So memory is bounded by what is live, however long the run is; only versions (one per step) and counters stay.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import Final, assert_never

from leeway.types import (
    DeadLetter,
    DropReason,
    EvaluationResult,
    GroupState,
    PolicyVersion,
    Purpose,
    Rollback,
    RunSpec,
    RunStatus,
)
from replay_buffer.rules.groups import Batch, Ended, EvaluationState, Group, Groups, Location, Member, Progress
from replay_buffer.rules.lineage import Lineage
from replay_buffer.rules.transitions import (
    BatchDrawn,
    ChunkWritten,
    DeadLettersRequeued,
    EvaluationCreated,
    GroupsDropped,
    PolicyAdvanced,
    RunFinished,
    RunOpened,
    RunRestored,
    RunRolledBack,
    StepsCommitted,
    TicketIssued,
    TrajectoryClosed,
    TrajectoryFailed,
    Transition,
)

REQUEUED: Final = frozenset({DropReason.STALE, DropReason.LEASE_LOST, DropReason.ROLLED_BACK})
"""A group dropped for one of these gives its task back."""

KEPT_EVALUATIONS: Final = 4
"""Ended evaluations that stay in memory: whoever asked for them may ask again, whatever is retired meanwhile."""

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


class RunState:
    """One run."""

    def __init__(self, spec: RunSpec, ended: Ended) -> None:
        self.spec = spec
        self.ended = ended
        self.epoch = 0
        self.incarnations: dict[bytes, int] = {}  # epochs of the learners that named themselves
        self.lineage = Lineage(spec.root)
        self.committed_step = 0
        self.oldest_kept_step = 0  # of the learner's checkpoints; 0 while it has not said
        self.finished = False
        self.groups = Groups(ended)
        self.live: dict[str, Group] = {}  # training groups that have not ended, in the order of issue
        self.live_evaluation: dict[str, Group] = {}
        self.batches: dict[int, Batch] = {}  # of steps that are not committed
        self.evaluations: dict[str, EvaluationState] = {}  # under way, and the newest ended ones
        self.task_cursor = 0
        self.requeued: deque[int] = deque()
        self.lost_attempts: Counter[int] = Counter()  # by task: what groups cost that were given up unfinished
        self.dead_letters: dict[str, DeadLetter] = {}  # by group, oldest first
        self.rollback: Rollback | None = None  # the newest explicit one
        self.restored_at: PolicyVersion | None = None  # the head when the log was last restored from a backup
        self.created = 0  # groups of both purposes
        self.issued = 0  # training groups
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

    def is_retired(self, trajectory_id: str) -> bool:
        """Whether the group of a trajectory was issued and is gone: its number is the only trace that it has left."""
        group_id, _, member = trajectory_id.rpartition(".")
        number = group_id.removeprefix(f"{self.spec.run}-g")
        if not (member.isdecimal() and number != group_id and number.isdecimal() and 1 <= int(number) <= self.created):
            return False
        return self.groups.get(group_id) is None

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

    def batch(self, step: int) -> tuple[str, ...]:
        """The groups that a step drew, in order; none before it did, fewer once some of them are retired."""
        batch = self.batches.get(step)
        return self.ended.batch(step) if batch is None else batch.group_ids

    def evaluation(self, evaluation_id: str) -> EvaluationState | None:
        """An evaluation, ended or not."""
        return self.evaluations.get(evaluation_id) or self.ended.evaluation(evaluation_id)

    def evaluation_result(self, evaluation_id: str) -> EvaluationResult:
        """What an evaluation has measured so far. A task that cannot get a complete group any more has failed."""
        state = self.evaluation(evaluation_id)
        assert state is not None
        wanted, outcomes = state.evaluation, state.outcomes
        rewards = tuple(reward for task_index in sorted(outcomes) for reward in outcomes[task_index])
        tasks_ended = wanted.task_count if state.ended else len(outcomes)
        return EvaluationResult(
            tasks_ended == wanted.task_count, rewards, failed=tasks_ended * wanted.members - len(rewards)
        )

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
                self._drop(transition.group_ids, transition.reason, transition.message, location)
            case BatchDrawn():
                self.batches[transition.step] = Batch(transition.step, transition.group_ids)
                for place, group_id in enumerate(transition.group_ids):
                    group = self.live[group_id]
                    group.state, group.step, group.place = GroupState.DRAWN, transition.step, place
            case PolicyAdvanced():
                self.batches[transition.version.step].sealed = True
                self.lineage.register(transition.version, transition.parent)
                message = f"too old for version {transition.version}"
                self._drop(transition.stale_group_ids, DropReason.STALE, message, location)
            case StepsCommitted():
                self._commit(transition.step, location)
                self.oldest_kept_step = transition.oldest_kept_step
            case RunOpened():
                self._open(transition, location)
            case EvaluationCreated():
                evaluation = transition.evaluation
                self.evaluations[evaluation.evaluation_id] = EvaluationState(evaluation)
            case RunFinished():
                self._drop(transition.group_ids, DropReason.RUN_END, "the run ended", location)
                self.finished = True
                for evaluation_state in list(self.evaluations.values()):
                    evaluation_state.closed = True
                    self._end_if_complete(evaluation_state, location)
            case RunRolledBack():
                self._roll_back(transition, location)
            case RunRestored():
                self.epoch, self.created = transition.epoch, transition.created
                self.restored_at = self.head
                message = "the log was restored from a backup"
                self._drop(transition.group_ids, DropReason.ROLLED_BACK, message, location)
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
        group = self.groups.unended.get(ticket.group_id)
        if group is None:
            group = self._create(issued, recorded_at_ns)
        group.attempt = ticket.attempt
        group.server_id = issued.server_id
        group.version = issued.version
        for lent in ticket.members:
            group.members[lent.member].lend(ticket.attempt, issued.server_id)

    def _create(self, issued: TicketIssued, recorded_at_ns: int) -> Group:
        ticket = issued.ticket
        self.created += 1
        group = Group(ticket.group_id, self.created, ticket.purpose, ticket.task_index, len(ticket.members))
        group.evaluation_id, group.issued_at_ns = ticket.evaluation_id, recorded_at_ns
        self.groups.unended[group.group_id] = group
        if ticket.purpose is Purpose.TRAIN:
            self.live[group.group_id] = group
            self.issued += 1
            group.number = self.issued
            if issued.task_cursor == self.task_cursor:
                self.requeued.remove(ticket.task_index)
            self.task_cursor = issued.task_cursor
        else:
            self.live_evaluation[group.group_id] = group
            self.evaluations[ticket.evaluation_id].group_ids[ticket.task_index] = group.group_id
        return group

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
            self._consume(group, location)

    def _fail(self, failed: TrajectoryFailed, location: Location) -> None:
        found = self.find(failed.trajectory_id)
        if found is None:
            return  # it has been retired since
        group, index = found
        member = group.members[index]
        if group.ended and len(member.records) and member.records[len(member.records) - 1] == location:
            return  # `Ended` was ahead of a restart
        member.records.append(location)
        member.progress = Progress.FAILED
        member.versions = ()
        if group.ended:
            self.ended.put(group)
        elif not failed.failure.retryable:
            message = f"trajectory {failed.trajectory_id}: {failed.failure.message}"
            self._drop((group.group_id,), DropReason.FAILED, message, location)

    def _drop(self, group_ids: Iterable[str], reason: DropReason, message: str, location: Location) -> None:
        for group_id in group_ids:
            group = self.groups.unended.get(group_id)
            if group is None:
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
            self._end(group, location)

    def _count_lost(self, group: Group, reason: DropReason) -> None:
        """Remember in vain attempts beyond their group, so that a task that kills its servers cannot come for ever."""
        if group.state is not GroupState.OPEN or reason is DropReason.ROLLED_BACK:
            return
        still_tried = group.at_work and reason is DropReason.STALE
        if lost := group.attempt - still_tried:
            self.lost_attempts[group.task_index] += lost

    def _consume(self, group: Group, location: Location) -> None:
        group.state = GroupState.CONSUMED
        if group.purpose is Purpose.TRAIN:
            self.consumed += 1
        self._end(group, location)

    def _end(self, group: Group, location: Location) -> None:
        """Let a group leave memory, without what only a live one needs."""
        group.ended_at = location
        group.version = None
        for member in group.members:
            member.versions = ()
        del self.groups.unended[group.group_id]
        self.live.pop(group.group_id, None)
        self.ended.put(group)
        if self.live_evaluation.pop(group.group_id, None) is not None:
            evaluation = self.evaluations[group.evaluation_id]
            consumed = group.state is GroupState.CONSUMED
            evaluation.outcomes[group.task_index] = tuple(member.reward for member in group.members) if consumed else ()
            self._end_if_complete(evaluation, location)

    def _end_if_complete(self, evaluation: EvaluationState, location: Location) -> None:
        if not evaluation.ended:
            return
        ended = [evaluation for evaluation in self.evaluations.values() if evaluation.ended]
        for oldest in ended[:-KEPT_EVALUATIONS]:
            del self.evaluations[oldest.evaluation.evaluation_id]
            self.ended.put_evaluation(oldest, location)

    def _commit(self, step: int, location: Location) -> None:
        for at in range(self.committed_step + 1, step + 1):
            for group_id in self.batches.pop(at).group_ids:
                self._consume(self.live[group_id], location)
        self.committed_step = max(self.committed_step, step)

    def _open(self, opened: RunOpened, location: Location) -> None:
        self.epoch = opened.epoch
        if opened.incarnation:
            self.incarnations[opened.incarnation] = opened.epoch
        self._commit(opened.checkpoint.step, location)
        self._void_batches(opened.checkpoint, location)
        self.lineage.rollback(opened.checkpoint)

    def _void_batches(self, head: PolicyVersion, location: Location) -> None:
        """Return what was drawn after the new head; nobody measures another version any more."""
        for step in [step for step in self.batches if step > head.step]:
            for group_id in self.batches.pop(step).group_ids:
                group = self.live.get(group_id)
                if group is not None:
                    group.state, group.step, group.place = GroupState.READY, 0, 0
        for evaluation in list(self.evaluations.values()):
            if evaluation.evaluation.version != head:
                evaluation.closed = True
                self._end_if_complete(evaluation, location)

    def _roll_back(self, rolled_back: RunRolledBack, location: Location) -> None:
        version = rolled_back.version
        self.epoch = rolled_back.epoch
        self.rollback = Rollback(version, rolled_back.epoch)
        self._void_batches(version, location)
        self.committed_step = min(self.committed_step, version.step)
        self.lineage.discard_after(version)
        message = f"the run was rolled back to {version}"
        for group_id, task_index in zip(rolled_back.group_ids, rolled_back.task_indices, strict=True):
            if group_id in self.groups.unended:
                self._drop((group_id,), DropReason.ROLLED_BACK, message, location)
            else:
                self._take_back(group_id, task_index, message)

    def _take_back(self, group_id: str, task_index: int, message: str) -> None:
        """Drop a consumed group."""
        self.consumed -= 1
        self.dropped[DropReason.ROLLED_BACK] += 1
        self.requeued.append(task_index)
        group = self.ended.get(group_id)
        if group is not None:
            group.state, group.step, group.place = GroupState.DROPPED, 0, 0
            group.drop_reason, group.drop_message = DropReason.ROLLED_BACK, message
            self.ended.put(group)
