"""Which work a server gets: evaluation first, then groups that another ticket did not finish, then new groups.

A group goes whole to one server, since its attempt is one fence: a server without room for all of its missing members
waits until it has, and one that never had so much room is passed over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

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
from replay_buffer.rules.groups import EvaluationState, Group, Progress
from replay_buffer.rules.state import RunState
from replay_buffer.rules.transitions import GroupsDropped, TicketIssued

_MOST_MEMBERS: Final = 1 << 14
"""Of one call, whatever its server asks for: the answer has to fit into a message."""
_FEISTEL_TURNS: Final = 6

Expired = Callable[[str], bool]
"""Whether a group's lease has run out."""


@dataclass(frozen=True, slots=True)
class Server:
    """Who asks for work."""

    server_id: str
    version: PolicyVersion  # what it has acknowledged and samples from
    capacity: int  # most members it has ever asked for at once


class TicketOffice:
    """Issues tickets to one server, as long as members and admission allow."""

    def __init__(self, run: RunState, server: Server, expired: Expired, lease_seconds: float) -> None:
        """Look at the run as it is now.

        Raises:
            PreconditionError: the server's version was never registered.
        """
        if run.lineage.is_unknown(server.version):
            raise PreconditionError(
                f"server {server.server_id!r} asks for work at {server.version}, which run {run.spec.run!r} "
                "never registered; let it fetch the weights that the learner publishes"
            )
        self._run = run
        self._server = server
        self._version = server.version
        self._expired = expired
        self._lease_seconds = lease_seconds
        self._next_number = run.created + 1
        self._lent_again: dict[str, int] = {}  # deadlines of the groups that this office has lent again

    def issue(self, max_members: int) -> list[TicketIssued]:
        """The tickets to hand out now, possibly none.

        Raises:
            InvalidDataError: no members were asked for.
        """
        if max_members < 1:
            raise InvalidDataError(
                f"server {self._server.server_id!r} asks for work for {max_members} members; ask for at least 1"
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
        if state.evaluation.members > self._server.capacity:
            return
        for task_index in range(state.evaluation.task_count):
            if task_index not in state.group_ids:
                yield self._new_group(task_index, self._run.task_cursor, state.evaluation)

    def _reissues(self, groups: Iterable[Group], evaluation: Evaluation | None = None) -> Iterator[TicketIssued]:
        run = self._run
        for group in groups:
            if not may_be_lent_again(run, group, self._expired) or len(group.missing) > self._server.capacity:
                continue
            if evaluation is None:
                closed = {version for index in _closed(group) for version in group.members[index].versions}
                due = deadline_of(run, closed | {self._version})
                if due < run.head.step:
                    continue
                self._lent_again[group.group_id] = due  # with an older server it is due earlier than it was
            yield self._ticket(group.group_id, group.attempt + 1, group.task_index, group.missing, evaluation)

    def _new_groups(self) -> Iterator[TicketIssued]:
        run, admission = self._run, Admission(self._run, self._lent_again)
        due = deadline_of(run, (self._version,))
        requeued, cursor = iter(list(run.requeued)), run.task_cursor
        while admission.admits(due):
            task_index = next(requeued, None)
            if task_index is None:
                task_index = task_at(run.spec.seed, run.spec.train_task_count, cursor)
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
            ticket, self._server.server_id, self._version, self._run.task_cursor if cursor is None else cursor
        )


def may_be_lent_again(run: RunState, group: Group, expired: Expired) -> bool:
    """Whether a group's missing members may go to a server again: none is at work on them, or the lease ran out."""
    return (
        group.state is GroupState.OPEN
        and run.attempts(group) < run.spec.max_attempts
        and (not group.at_work or expired(group.group_id))
    )


def decide_expired(run: RunState, expired: Expired) -> list[GroupsDropped]:
    """Drop what was not finished and cannot be lent again: its attempts are used up, or it is too old."""
    drops: list[GroupsDropped] = []
    for group in [*run.live.values(), *run.live_evaluation.values()]:
        if group.state is not GroupState.OPEN or (group.at_work and not expired(group.group_id)):
            continue
        if run.attempts(group) >= run.spec.max_attempts:
            drops.append(dead_letter(run, group))
        elif group.purpose is Purpose.TRAIN and is_stale(run, group):
            message = f"the lease of server {group.server_id!r} ran out and the group is too old to be lent again"
            drops.append(GroupsDropped((group.group_id,), DropReason.LEASE_LOST, message))
    return drops


def dead_letter(run: RunState, group: Group) -> GroupsDropped:
    """Set a group aside whose task used up its attempts."""
    message = f"not finished in {run.attempts(group)} attempts, the last by server {group.server_id!r}"
    return GroupsDropped((group.group_id,), DropReason.DEAD_LETTER, message)


def _closed(group: Group) -> list[int]:
    return [index for index, member in enumerate(group.members) if member.progress is Progress.CLOSED]


def member_seed(run_seed: int, origin: str, member: int, attempt: int) -> int:
    """A sampling seed below 2^63 that no other member or attempt shares."""
    return seed_of(f"{run_seed}/{origin}/{member}/{attempt}".encode())


def task_at(seed: int, task_count: int, cursor: int) -> int:
    """The task at a position of the cursor, which walks one permutation of all tasks after another.

    Each permutation is a Feistel network over the next even number of bits, walked until it meets a task (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains"): it needs no memory, whatever the number of tasks.
    """
    tour, at = divmod(cursor, task_count)
    half_bits = ((task_count - 1).bit_length() + 1) // 2
    while True:
        at = _permuted(f"{seed}/{tour}".encode(), half_bits, at)
        if at < task_count:
            return at


def _permuted(key: bytes, half_bits: int, number: int) -> int:
    mask = (1 << half_bits) - 1
    left, right = number >> half_bits, number & mask
    for turn in range(_FEISTEL_TURNS):
        digest = hashlib.blake2b(b"%d/%d" % (turn, right), key=key[:64], digest_size=8).digest()
        left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
    return left << half_bits | right
