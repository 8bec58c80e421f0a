"""The judgement of one written item.

same (trajectory, attempt, seq, bytes) again    acknowledged
lower seq, other bytes                          conflict; the group is dropped
lower attempt, or the group has ended           aborted
higher seq                                      out of range, with the next expected
next seq                                        appended; a close is validated first, against the draft
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from leeway.errors import CorruptDataError, InvalidDataError
from leeway.types import (
    DropReason,
    GroupState,
    Purpose,
    TrajectoryClose,
    TrajectoryFailure,
    WriteItem,
    WriteResult,
    WriteStatus,
)
from replay_buffer.live.open_trajectories import OpenTrajectories
from replay_buffer.rules.completion import decide_complete
from replay_buffer.rules.groups import Group, GroupMember, MemberProgress, RecordHandle
from replay_buffer.rules.state import RunState
from replay_buffer.rules.tickets import dead_letter
from replay_buffer.rules.transitions import ChunkWritten, GroupsDropped, TrajectoryClosed, TrajectoryFailed, Transition

Read = Callable[[RecordHandle], Transition]
"""Reads a record back from the log, whether it is on disk yet or not."""

_DROPPABLE = (GroupState.OPEN, GroupState.READY)


class WriteDecision(NamedTuple):
    """The answer to an item, and what it does to the run."""

    result: WriteResult
    transitions: tuple[Transition, ...] = ()


def decide_write(run: RunState, item: WriteItem, read: Read, drafts: OpenTrajectories, *, room: bool) -> WriteDecision:
    """Judge one item; `room` is false while the disk is too full for chunks.

    The transitions have to be applied: `drafts` counts on it.
    """
    found = run.find(item.trajectory_id)
    if found is None and run.is_retired(item.trajectory_id):
        return _refuse(item, WriteStatus.ABORTED, f"the group of {item.trajectory_id} ended and has been retired")
    if found is None:
        return _refuse(item, WriteStatus.UNKNOWN, f"trajectory {item.trajectory_id!r} was never issued in this run")
    group, index = found
    member = group.members[index]
    if item.attempt < member.attempt:
        message = f"attempt {item.attempt} of group {group.group_id} is fenced by attempt {member.attempt}"
        return _refuse(item, WriteStatus.ABORTED, message)
    if item.attempt > member.attempt:
        return _refuse(item, WriteStatus.UNKNOWN, f"attempt {item.attempt} of {item.trajectory_id} was never issued")
    next_seq = len(member.records)
    if item.seq < next_seq:
        return _repeated(group, item, read(member.records[item.seq]))
    if group.state is GroupState.DROPPED:
        return _refuse(item, WriteStatus.ABORTED, f"group {group.group_id} was dropped: {group.drop_message}")
    if item.seq > next_seq:
        message = f"{item.trajectory_id}: item {item.seq} came, but {next_seq} is next"
        return _refuse(item, WriteStatus.OUT_OF_RANGE, message, next_seq)
    if member.progress is not MemberProgress.OPEN:
        return _refuse(item, WriteStatus.INVALID, f"{item.trajectory_id} has ended with item {next_seq - 1}")
    match item.content:
        case TrajectoryClose() as close:
            return _closed(run, group, index, item, close, drafts, read)
        case TrajectoryFailure() as failure:
            return WriteDecision(_acknowledge(item), _failed(run, group, index, item, failure))
        case chunk:
            return (
                _chunk(run, group, item, chunk, member, drafts)
                if room
                else _refuse(item, WriteStatus.EXHAUSTED, "the disk is full")
            )


def _repeated(group: Group, item: WriteItem, written: Transition) -> WriteDecision:
    match written:
        case ChunkWritten():
            before: object = written.chunk
        case TrajectoryClosed():
            before = written.close
        case TrajectoryFailed():
            before = written.failure
        case _:
            raise CorruptDataError(f"item {item.seq} of {item.trajectory_id} is another record in the log")
    if before == item.content:
        return WriteDecision(_acknowledge(item))
    if group.state is GroupState.DROPPED:
        return _refuse(item, WriteStatus.ABORTED, f"group {group.group_id} was dropped: {group.drop_message}")
    message = f"item {item.seq} of {item.trajectory_id} was written before with other bytes"
    decision = _refuse(item, WriteStatus.CONFLICT, message)
    if group.state not in _DROPPABLE:
        return decision  # what was drawn is sealed by its closes; the odd one out is the repetition
    return WriteDecision(decision.result, (GroupsDropped((group.group_id,), DropReason.CONFLICT, message),))


def _chunk(
    run: RunState, group: Group, item: WriteItem, chunk: bytes, member: GroupMember, drafts: OpenTrajectories
) -> WriteDecision:
    try:
        versions = drafts.add(member, chunk)
    except InvalidDataError as error:
        return _refuse(item, WriteStatus.INVALID, f"item {item.seq} of {item.trajectory_id}: {error.message}")
    written = ChunkWritten(item.trajectory_id, item.attempt, item.seq, chunk, versions)
    for version in versions:
        if run.lineage.is_unknown(version):
            message = f"trajectory {item.trajectory_id}: tokens are labelled with {version}, which was never registered"
            drop = GroupsDropped((group.group_id,), DropReason.UNKNOWN_VERSION, message)
            return WriteDecision(_acknowledge(item), (written, drop))
        if run.lineage.is_discarded(version) and group.purpose is Purpose.TRAIN:
            message = f"trajectory {item.trajectory_id}: {version}, which a rollback discarded, sampled tokens of it"
            drop = GroupsDropped((group.group_id,), DropReason.ROLLED_BACK, message)
            return WriteDecision(_acknowledge(item), (written, drop))
    return WriteDecision(_acknowledge(item), (written,))


def _failed(
    run: RunState, group: Group, index: int, item: WriteItem, failure: TrajectoryFailure
) -> tuple[Transition, ...]:
    failed = TrajectoryFailed(item.trajectory_id, item.attempt, failure)
    others_open = any(
        other.progress is MemberProgress.OPEN for place, other in enumerate(group.members) if place != index
    )
    if failure.retryable and not others_open and run.attempts(group) >= run.spec.max_attempts:
        return (failed, dead_letter(run, group))
    return (failed,)


def _closed(
    run: RunState,
    group: Group,
    index: int,
    item: WriteItem,
    close: TrajectoryClose,
    drafts: OpenTrajectories,
    read: Read,
) -> WriteDecision:
    member = group.members[index]
    try:
        _validate(run, group, index, close, drafts, read)
    except InvalidDataError as error:
        cause = error.message
    except CorruptDataError as error:
        cause = error.message
    else:
        if group.purpose is Purpose.EVAL and any(
            version != run.evaluations[group.evaluation_id].evaluation.version for version in member.versions
        ):
            failure = TrajectoryFailure("sampled from another version than the evaluation measures", retryable=True)
            return WriteDecision(_acknowledge(item), _failed(run, group, index, item, failure))
        closed = TrajectoryClosed(item.trajectory_id, item.attempt, close)
        drop = decide_complete(run, group, _rewards(group, index, close)) if group.missing == [index] else None
        return WriteDecision(_acknowledge(item), (closed,) if drop is None else (closed, drop))
    # Set aside with its reason first: the first durable one stands.
    drop = GroupsDropped((group.group_id,), DropReason.INVALID, cause)
    failed = TrajectoryFailed(item.trajectory_id, item.attempt, TrajectoryFailure(cause, retryable=False))
    return WriteDecision(_acknowledge(item), (drop, failed))


def _rewards(group: Group, index: int, close: TrajectoryClose) -> list[float]:
    """The rewards of all members, of which the one at `index` closes now."""
    return [close.reward if place == index else member.reward for place, member in enumerate(group.members)]


def _validate(
    run: RunState, group: Group, index: int, close: TrajectoryClose, drafts: OpenTrajectories, read: Read
) -> None:
    """Raises InvalidDataError or CorruptDataError, naming the trajectory and what is wrong with it."""
    member = group.members[index]
    sampling = (
        run.spec.sampling
        if group.purpose is Purpose.TRAIN
        else run.evaluations[group.evaluation_id].evaluation.sampling
    )
    draft = drafts.whole(member, lambda location: _chunk_of(read(location)))
    try:
        draft.check(close, run.spec, sampling)
    except (InvalidDataError, CorruptDataError) as error:
        raise type(error)(f"trajectory {member.trajectory_id}: {error.message}") from error


def _chunk_of(written: Transition) -> bytes:
    assert isinstance(written, ChunkWritten)
    return written.chunk


def _acknowledge(item: WriteItem) -> WriteResult:
    return WriteResult(item.trajectory_id, item.attempt, item.seq, WriteStatus.ACKNOWLEDGED)


def _refuse(item: WriteItem, status: WriteStatus, message: str, expected_seq: int = 0) -> WriteDecision:
    return WriteDecision(WriteResult(item.trajectory_id, item.attempt, item.seq, status, expected_seq, message))
