"""The fold: how transitions change a run's state, and nothing else.

`apply` is total on what the deciding functions produce, decides nothing beyond what a transition's docstring says, and
never looks at a clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final, assert_never

from leeway.types import Drain, DropReason, GroupState, PolicyVersion, Purpose, Rollback
from replay_buffer.rules.groups import DrawnBatch, EvaluationState, Group, GroupMember, MemberProgress, RecordHandle
from replay_buffer.rules.state import KEPT_DEAD_LETTERS, KEPT_EVALUATIONS, KEPT_INCARNATIONS, REQUEUED, RunState
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
    ServerDrained,
    ServerReadmitted,
    StepsCommitted,
    TicketIssued,
    TrajectoryClosed,
    TrajectoryFailed,
    Transition,
)

_BLAMELESS: Final = (DropReason.ROLLED_BACK, DropReason.DIVERGED)
"""Drops that say nothing about the group's task: its attempts are not counted."""


def apply(run: RunState, transition: Transition, recorded_at_ns: int, record: RecordHandle) -> None:
    """Take one transition over; `record` is what the log keeps of it."""
    match transition:
        case ChunkWritten():
            member = _member(run, transition.trajectory_id)
            member.records.append(record)
            new = [version for version in transition.versions if version not in member.versions]
            if new:
                member.versions = (*member.versions, *new)
        case TrajectoryClosed():
            _close(run, transition, record)
        case TrajectoryFailed():
            _fail(run, transition, record)
        case TicketIssued():
            _issue(run, transition, recorded_at_ns)
        case GroupsDropped():
            _drop(run, transition.group_ids, transition.reason, transition.message, record)
        case BatchDrawn():
            run.batches[transition.step] = DrawnBatch(transition.step, transition.group_ids)
            for place, group_id in enumerate(transition.group_ids):
                group = run.live[group_id]
                group.state, group.step, group.place = GroupState.DRAWN, transition.step, place
        case PolicyAdvanced():
            run.batches[transition.version.step].sealed = True
            run.lineage.register(transition.version, transition.parent)
            message = f"too old for version {transition.version}"
            _drop(run, transition.stale_group_ids, DropReason.STALE, message, record)
        case StepsCommitted():
            _commit(run, transition.step, record)
            run.oldest_kept_step = transition.oldest_kept_step
            run.lineage.forget_before(run.oldest_reachable_step)
        case RunOpened():
            _open(run, transition, record)
        case EvaluationCreated():
            evaluation = transition.evaluation
            run.evaluations[evaluation.evaluation_id] = EvaluationState(evaluation)
        case RunFinished():
            _drop(run, transition.group_ids, DropReason.RUN_END, "the run ended", record)
            run.finished, run.given_up = True, transition.given_up
            for evaluation_state in list(run.evaluations.values()):
                evaluation_state.closed = True
                _end_if_complete(run, evaluation_state, record)
        case RunRolledBack():
            _roll_back(run, transition, record)
        case RunRestored():
            run.epoch, run.created = transition.epoch, transition.created
            run.restored_at = run.head
            message = "the log was restored from a backup"
            _drop(run, transition.group_ids, DropReason.ROLLED_BACK, message, record)
        case DeadLettersRequeued():
            _requeue(run, transition)
        case ServerDrained():
            at = datetime.fromtimestamp(recorded_at_ns // 1_000_000_000, UTC)
            run.drained[transition.server_id] = Drain(transition.reason, transition.message, at)
            message = f"server {transition.server_id!r} was drained: {transition.message}"
            _drop(run, transition.group_ids, DropReason.DIVERGED, message, record)
        case ServerReadmitted():
            run.drained.pop(transition.server_id, None)
        case _:
            assert_never(transition)


def _member(run: RunState, trajectory_id: str) -> GroupMember:
    found = run.find(trajectory_id)
    assert found is not None
    return found[0].members[found[1]]


def _issue(run: RunState, issued: TicketIssued, recorded_at_ns: int) -> None:
    ticket = issued.ticket
    group = run.groups.unended.get(ticket.group_id)
    if group is None:
        group = _create(run, issued, recorded_at_ns)
    group.attempt = ticket.attempt
    group.server_id = issued.server_id
    group.version = issued.version
    for issued_member in ticket.members:
        group.members[issued_member.member].begin_attempt(ticket.attempt, issued.server_id)


def _create(run: RunState, issued: TicketIssued, recorded_at_ns: int) -> Group:
    ticket = issued.ticket
    run.created += 1
    group = Group(ticket.group_id, run.created, ticket.purpose, ticket.task_index, len(ticket.members))
    group.evaluation_id, group.issued_at_ns = ticket.evaluation_id, recorded_at_ns
    run.groups.unended[group.group_id] = group
    if ticket.purpose is Purpose.TRAIN:
        run.live[group.group_id] = group
        run.issued += 1
        group.number = run.issued
        if issued.task_cursor == run.task_cursor:
            run.requeued.remove(ticket.task_index)
        run.task_cursor = issued.task_cursor
    else:
        run.live_evaluation[group.group_id] = group
        run.evaluations[ticket.evaluation_id].group_ids[ticket.task_index] = group.group_id
    return group


def _close(run: RunState, closed: TrajectoryClosed, record: RecordHandle) -> None:
    found = run.find(closed.trajectory_id)
    assert found is not None
    group, index = found
    member = group.members[index]
    member.records.append(record)
    member.progress = MemberProgress.CLOSED
    member.reward = closed.close.reward
    if group.missing:
        return
    if group.purpose is Purpose.TRAIN:
        group.state = GroupState.READY
        run.lost_attempts.pop(group.task_index, None)
    else:
        _consume(run, group, record)


def _fail(run: RunState, failed: TrajectoryFailed, record: RecordHandle) -> None:
    found = run.find(failed.trajectory_id)
    if found is None:
        return  # it has been retired since
    group, index = found
    member = group.members[index]
    if group.ended and len(member.records) and member.records[len(member.records) - 1] == record:
        return  # `Ended` was ahead of a restart
    member.records.append(record)
    member.progress = MemberProgress.FAILED
    member.versions = ()
    if group.ended:
        run.ended.put(group)
    elif not failed.failure.retryable:
        message = f"trajectory {failed.trajectory_id}: {failed.failure.message}"
        _drop(run, (group.group_id,), DropReason.FAILED, message, record)


def _drop(run: RunState, group_ids: Iterable[str], reason: DropReason, message: str, record: RecordHandle) -> None:
    for group_id in group_ids:
        group = run.groups.unended.get(group_id)
        if group is None:
            continue  # the first durable reason stands
        if group.purpose is Purpose.TRAIN:
            run.dropped[reason] += 1
            if reason in REQUEUED:
                run.requeued.append(group.task_index)
                _count_lost(run, group, reason)
        group.state, group.drop_reason, group.drop_message = GroupState.DROPPED, reason, message
        if group.is_dead_letter:
            _set_aside(run, group)
        _end(run, group, record)


def _set_aside(run: RunState, group: Group) -> None:
    """Keep the dead letter; its task starts again with all its attempts when it is requeued."""
    group.lost_attempts = run.lost_attempts.pop(group.task_index, 0)
    run.dead_letters[group.group_id] = group.letter()
    run.dead_letter_count += 1
    if len(run.dead_letters) > KEPT_DEAD_LETTERS:
        del run.dead_letters[next(iter(run.dead_letters))]


def _requeue(run: RunState, requeued: DeadLettersRequeued) -> None:
    for group_id, task_index in zip(requeued.group_ids, requeued.task_indices, strict=True):
        run.dead_letters.pop(group_id, None)
        run.requeued.append(task_index)
        group = run.ended.get(group_id)
        if group is not None:  # it has not been retired
            group.requeued = True
            run.ended.put(group)
    run.dead_letter_count -= len(requeued.group_ids)
    if requeued.is_all:
        run.dead_letter_count = 0


def _count_lost(run: RunState, group: Group, reason: DropReason) -> None:
    """Remember failed attempts beyond their group, so that a task that kills its servers is not issued without end."""
    if group.state is not GroupState.OPEN or reason in _BLAMELESS:
        return
    still_tried = group.being_sampled and reason is DropReason.STALE
    if lost := group.attempt - still_tried:
        run.lost_attempts[group.task_index] += lost


def _consume(run: RunState, group: Group, record: RecordHandle) -> None:
    group.state = GroupState.CONSUMED
    if group.purpose is Purpose.TRAIN:
        run.consumed += 1
    _end(run, group, record)


def _end(run: RunState, group: Group, record: RecordHandle) -> None:
    """Let a group leave memory, without what only a live one needs."""
    group.ended_at = record
    group.version = None
    for member in group.members:
        member.versions = ()
    del run.groups.unended[group.group_id]
    run.live.pop(group.group_id, None)
    run.ended.put(group)
    if run.live_evaluation.pop(group.group_id, None) is not None:
        evaluation = run.evaluations[group.evaluation_id]
        consumed = group.state is GroupState.CONSUMED
        evaluation.outcomes[group.task_index] = tuple(member.reward for member in group.members) if consumed else ()
        _end_if_complete(run, evaluation, record)


def _end_if_complete(run: RunState, evaluation: EvaluationState, record: RecordHandle) -> None:
    if not evaluation.ended:
        return
    ended = [evaluation for evaluation in run.evaluations.values() if evaluation.ended]
    for oldest in ended[:-KEPT_EVALUATIONS]:
        del run.evaluations[oldest.evaluation.evaluation_id]
        run.ended.put_evaluation(oldest, record)


def _commit(run: RunState, step: int, record: RecordHandle) -> None:
    for at in range(run.committed_step + 1, step + 1):
        for group_id in run.batches.pop(at).group_ids:
            _consume(run, run.live[group_id], record)
    run.committed_step = max(run.committed_step, step)


def _open(run: RunState, opened: RunOpened, record: RecordHandle) -> None:
    run.epoch = opened.epoch
    if opened.incarnation:
        run.incarnations[opened.incarnation] = opened.epoch
        if len(run.incarnations) > KEPT_INCARNATIONS:
            del run.incarnations[next(iter(run.incarnations))]
    _commit(run, opened.checkpoint.step, record)
    _void_batches(run, opened.checkpoint, record)
    run.lineage.rollback(opened.checkpoint)


def _void_batches(run: RunState, head: PolicyVersion, record: RecordHandle) -> None:
    """Return what was drawn after the new head; nobody measures another version any more."""
    for step in [step for step in run.batches if step > head.step]:
        for group_id in run.batches.pop(step).group_ids:
            group = run.live.get(group_id)
            if group is not None:
                group.state, group.step, group.place = GroupState.READY, 0, 0
    for evaluation in list(run.evaluations.values()):
        if evaluation.evaluation.version != head:
            evaluation.closed = True
            _end_if_complete(run, evaluation, record)


def _roll_back(run: RunState, rolled_back: RunRolledBack, record: RecordHandle) -> None:
    version = rolled_back.version
    run.epoch = rolled_back.epoch
    run.rollback = Rollback(version, rolled_back.epoch)
    _void_batches(run, version, record)
    run.committed_step = min(run.committed_step, version.step)
    run.lineage.discard_after(version)
    message = f"the run was rolled back to {version}"
    for group_id, task_index in zip(rolled_back.group_ids, rolled_back.task_indices, strict=True):
        if group_id in run.groups.unended:
            _drop(run, (group_id,), DropReason.ROLLED_BACK, message, record)
        else:
            _take_back(run, group_id, task_index, message)


def _take_back(run: RunState, group_id: str, task_index: int, message: str) -> None:
    """Drop a consumed group."""
    run.consumed -= 1
    run.dropped[DropReason.ROLLED_BACK] += 1
    run.requeued.append(task_index)
    group = run.ended.get(group_id)
    if group is not None:
        group.state, group.step, group.place = GroupState.DROPPED, 0, 0
        group.drop_reason, group.drop_message = DropReason.ROLLED_BACK, message
        run.ended.put(group)
