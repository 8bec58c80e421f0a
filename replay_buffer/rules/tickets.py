"""Which tickets a server gets: for evaluation first, then groups that another ticket did not finish, then new groups.

A group goes whole to one server, since its attempt is one fence: a server without room for all of its missing members
waits until it has, and one that never had so much room is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from leeway.errors import InvalidDataError, PreconditionError
from leeway.service.seeds import seed_of
from leeway.types import (
    DropReason,
    Evaluation,
    GroupState,
    PolicyVersion,
    Purpose,
    SamplingParams,
    Ticket,
    TicketMember,
)
from replay_buffer.rules.admission import Admission, deadline_of, is_stale, may_serve
from replay_buffer.rules.groups import EvaluationState, Group, MemberProgress
from replay_buffer.rules.state import RunState
from replay_buffer.rules.transitions import GroupsDropped, TicketIssued

_MOST_MEMBERS: Final = 1 << 14
"""Of one call, whatever its server requests: the answer has to fit into a message."""

Expired = Callable[[str], bool]
"""Whether a group's lease has run out."""


@dataclass(frozen=True, slots=True)
class TicketRequest:
    """A server's request for tickets."""

    server_id: str
    version: PolicyVersion  # what it has acknowledged and samples from
    capacity: int  # the most members that it has ever requested at once


class TaskOrder:
    """The order in which a run's tasks are issued: tour after tour, each task once per tour.

    A tour is a shuffle that the run's seed and the tour's number decide, so that a restart in the middle of one goes on
    with it. Two tours are kept, since a request may look ahead over the end of one: four bytes for each task and tour.
    """

    def __init__(self, seed: int, task_count: int) -> None:
        self._seed = seed
        self._task_count = task_count
        self._tours: dict[int, NDArray[np.uint32]] = {}

    def at(self, cursor: int) -> int:
        """The task at a position of the cursor, which counts the tasks of all tours."""
        tour, place = divmod(cursor, self._task_count)
        if tour not in self._tours:
            while len(self._tours) > 1:
                del self._tours[min(self._tours)]
            # RandomState's numbers are frozen: a restart under a newer NumPy finds the same order.
            numbers = np.random.RandomState([self._seed % 2**32, self._seed >> 32, tour % 2**32])
            self._tours[tour] = numbers.permutation(np.arange(self._task_count, dtype=np.uint32))
        return int(self._tours[tour][place])


class TicketOffice:
    """Issues tickets to one server, as long as members and admission allow."""

    def __init__(
        self, run: RunState, request: TicketRequest, order: TaskOrder, expired: Expired, lease_seconds: float
    ) -> None:
        """Look at the run as it is now.

        Raises:
            PreconditionError: the server's version was never registered.
        """
        if run.lineage.is_unknown(request.version):
            raise PreconditionError(
                f"server {request.server_id!r} requests tickets at {request.version}, which run {run.spec.run!r} "
                "never registered; let it fetch the weights that the learner publishes"
            )
        self._run = run
        self._request = request
        self._version = request.version
        self._order = order
        self._expired = expired
        self._lease_seconds = lease_seconds
        self._next_number = run.created + 1
        self._reissued: dict[str, int] = {}  # new deadlines of the groups that this office has reissued

    def issue(self, max_members: int) -> list[TicketIssued]:
        """The tickets to hand out now, possibly none.

        Raises:
            InvalidDataError: the request is for no members.
        """
        if max_members < 1:
            raise InvalidDataError(
                f"server {self._request.server_id!r} requests tickets for {max_members} members; request at least 1"
            )
        max_members = min(max_members, _MOST_MEMBERS)
        issued: list[TicketIssued] = []
        for ticket in self._candidates():
            if len(ticket.ticket.members) > max_members:
                break
            issued.append(ticket)
            max_members -= len(ticket.ticket.members)
        return issued

    def _candidates(self) -> Iterator[TicketIssued]:
        for evaluation in self._run.evaluations.values():
            if evaluation.evaluation.version == self._version and not evaluation.closed:
                yield from self._evaluation_tickets(evaluation)
        if may_serve(self._run, self._version):
            yield from self._reissues(self._run.live.values())
            yield from self._new_groups()

    def _evaluation_tickets(self, state: EvaluationState) -> Iterator[TicketIssued]:
        evaluation_id = state.evaluation.evaluation_id
        groups = [group for group in self._run.live_evaluation.values() if group.evaluation_id == evaluation_id]
        yield from self._reissues(groups, state.evaluation)
        if state.evaluation.members > self._request.capacity:
            return
        for task_index in range(state.evaluation.task_count):
            if task_index not in state.group_ids:
                yield self._new_group(task_index, self._run.task_cursor, state.evaluation)

    def _reissues(self, groups: Iterable[Group], evaluation: Evaluation | None = None) -> Iterator[TicketIssued]:
        run = self._run
        for group in groups:
            if not may_be_reissued(run, group, self._expired) or len(group.missing) > self._request.capacity:
                continue
            if evaluation is None:
                closed = {version for index in _closed(group) for version in group.members[index].versions}
                due = deadline_of(run, closed | {self._version})
                if due < run.head.step:
                    continue
                self._reissued[group.group_id] = due  # with an older server it is due earlier than it was
            yield self._ticket(group.group_id, group.attempt + 1, group.task_index, group.missing, evaluation)

    def _new_groups(self) -> Iterator[TicketIssued]:
        run, admission = self._run, Admission(self._run, self._reissued)
        due = deadline_of(run, (self._version,))
        requeued, cursor = iter(list(run.requeued)), run.task_cursor
        while admission.admits(due):
            task_index = next(requeued, None)
            if task_index is None:
                task_index = self._order.at(cursor)
                cursor += 1
            yield self._new_group(task_index, cursor, None)

    def _new_group(self, task_index: int, cursor: int, evaluation: Evaluation | None) -> TicketIssued:
        group_id = f"{self._run.spec.run}-g{self._next_number}"
        self._next_number += 1
        members = range(self._run.spec.members if evaluation is None else evaluation.members)
        return self._ticket(group_id, 1, task_index, members, evaluation, cursor)

    def _ticket(
        self,
        group_id: str,
        attempt: int,
        task_index: int,
        members: Iterable[int],
        evaluation: Evaluation | None,
        cursor: int | None = None,
    ) -> TicketIssued:
        spec = self._run.spec
        # An evaluation is measured with the same seeds however often it is repeated.
        origin = group_id if evaluation is None else f"{evaluation.evaluation_id}/{task_index}"
        sampling: SamplingParams = spec.sampling if evaluation is None else evaluation.sampling
        ticket = Ticket(
            group_id=group_id,
            attempt=attempt,
            purpose=Purpose.TRAIN if evaluation is None else Purpose.EVAL,
            task_index=task_index,
            members=tuple(
                TicketMember(f"{group_id}.{member}", member, member_seed(spec.seed, origin, member, attempt))
                for member in members
            ),
            sampling=sampling,
            lease_seconds=self._lease_seconds,
            pinned_version=None if evaluation is None else evaluation.version,
            evaluation_id="" if evaluation is None else evaluation.evaluation_id,
        )
        return TicketIssued(
            ticket, self._request.server_id, self._version, self._run.task_cursor if cursor is None else cursor
        )


def may_be_reissued(run: RunState, group: Group, expired: Expired) -> bool:
    """Whether a group's missing members may get a new ticket: no server still samples them, or the lease ran out."""
    return (
        group.state is GroupState.OPEN
        and run.attempts(group) < run.spec.max_attempts
        and (not group.being_sampled or expired(group.group_id))
    )


def decide_expired(run: RunState, expired: Expired) -> list[GroupsDropped]:
    """Drop what was not finished and cannot be reissued: its attempts are used up, or it is too old."""
    drops: list[GroupsDropped] = []
    for group in [*run.live.values(), *run.live_evaluation.values()]:
        if group.state is not GroupState.OPEN or (group.being_sampled and not expired(group.group_id)):
            continue
        if run.attempts(group) >= run.spec.max_attempts:
            drops.append(dead_letter(run, group))
        elif group.purpose is Purpose.TRAIN and is_stale(run, group):
            message = f"the lease of server {group.server_id!r} ran out and the group is too old to be issued again"
            drops.append(GroupsDropped((group.group_id,), DropReason.LEASE_LOST, message))
    return drops


def dead_letter(run: RunState, group: Group) -> GroupsDropped:
    """Set a group aside whose task used up its attempts."""
    message = f"not finished in {run.attempts(group)} attempts, the last by server {group.server_id!r}"
    return GroupsDropped((group.group_id,), DropReason.DEAD_LETTER, message)


def _closed(group: Group) -> list[int]:
    return [index for index, member in enumerate(group.members) if member.progress is MemberProgress.CLOSED]


def member_seed(run_seed: int, origin: str, member: int, attempt: int) -> int:
    """A sampling seed below 2^63 that no other member or attempt shares."""
    return seed_of(f"{run_seed}/{origin}/{member}/{attempt}".encode())
