"""A run's state: the result of its transitions (`fold`), and what can be read off it.

Occupancy is read off the groups' states, so it cannot leak.

    live groups, batches that are not committed, the newest evaluations    in memory
    ended groups, older evaluations                                        handed to `Ended`, and read by id

    versions                                                               from the oldest that the run can go back to
    tries of tasks                                                         while a group of the task is due or live
    dead letters                                                           the newest; the others are read from `Ended`

So memory is bounded by what is live and by how far back the learner's checkpoints reach, however long the run is.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from typing import Final

from leeway.types import (
    DeadLetter,
    Drain,
    DropReason,
    EvaluationResult,
    GroupState,
    PolicyVersion,
    Purpose,
    Rollback,
    RunSpec,
    RunStatus,
)
from replay_buffer.rules.groups import DrawnBatch, Ended, EvaluationState, Group, Groups
from replay_buffer.rules.lineage import Lineage

REQUEUED: Final = frozenset({DropReason.STALE, DropReason.LEASE_LOST, DropReason.ROLLED_BACK, DropReason.DIVERGED})
"""A group dropped for one of these gives its task back."""

KEPT_EVALUATIONS: Final = 4
"""Ended evaluations that stay in memory: a learner may read their results again, whatever is retired."""

KEPT_DEAD_LETTERS: Final = 256
"""Dead letters that stay in memory, the newest: a person can look at them even when their records are retired."""

KEPT_INCARNATIONS: Final = 256
"""Learners whose late OpenRun is told from a new one's, the newest: nothing is on its way for so many starts."""


class RunState:
    """One run."""

    def __init__(self, spec: RunSpec, ended: Ended) -> None:
        self.spec = spec
        self.ended = ended
        self.epoch = 0
        self.incarnations: dict[bytes, int] = {}  # epochs of the newest learners that named themselves, in order
        self.lineage = Lineage(spec.root)
        self.committed_step = 0
        self.oldest_kept_step = 0  # of the learner's checkpoints; 0 while it has not said
        self.finished = False
        self.given_up = False  # it has finished because a person said so
        self.groups = Groups(ended)
        self.live: dict[str, Group] = {}  # training groups that have not ended, in the order of issue
        self.live_evaluation: dict[str, Group] = {}
        self.batches: dict[int, DrawnBatch] = {}  # of steps that are not committed
        self.evaluations: dict[str, EvaluationState] = {}  # under way, and the newest ended ones
        self.task_cursor = 0
        self.requeued: deque[int] = deque()
        self.lost_attempts: Counter[int] = Counter()  # by task that is due or live: what earlier groups of it cost
        self.dead_letters: dict[str, DeadLetter] = {}  # by group, oldest first; the newest of them
        self.dead_letter_count = 0
        self.drained: dict[str, Drain] = {}  # servers that get no tickets, in the order in which they were drained
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

    @property
    def oldest_reachable_step(self) -> int:
        """Step of the oldest version that still matters.

        The head may go back to what is committed, or to a checkpoint that is kept; tokens count up to S steps back from
        there; a repeated Advance names one parent more.
        """
        return min(self.committed_step, self.oldest_kept_step) - self.spec.max_staleness - 1

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
            dead_letters=self.dead_letter_count,
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
