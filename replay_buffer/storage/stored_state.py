"""Groups, evaluations and whole runs as protobuf and back: for snapshots and for the index."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Final

from leeway import codec
from leeway.errors import CorruptDataError
from leeway.types import DropReason, GroupState, PolicyVersion, Purpose
from leeway.v1 import replay_pb2, storage_pb2
from replay_buffer.rules.groups import (
    DrawnBatch,
    Ended,
    EvaluationState,
    Group,
    GroupMember,
    MemberProgress,
    RecordHandles,
)
from replay_buffer.rules.lineage import Lineage
from replay_buffer.rules.state import RunState
from replay_buffer.storage.segments import Location

_NANOS: Final = 1_000_000_000

# Locations are kept as the machine's own uint64, which the format says are little-endian.
assert sys.byteorder == "little", "the replay buffer needs a little-endian machine"


_GROUP_FIELDS: Final = (
    *("created", "number", "task_index", "evaluation_id", "drop_message", "step", "place", "attempt", "server_id"),
    *("lost_attempts", "requeued"),
)
_RUN_FIELDS: Final = (
    *("epoch", "committed_step", "oldest_kept_step", "finished", "given_up", "task_cursor", "created", "issued"),
    *("consumed", "dead_letter_count"),
)
"""Attributes that a message has under the same name."""


def _kept(state: object, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(state, name) for name in names}


def group_to_proto(group: Group) -> storage_pb2.GroupSnapshot:
    """A group as it is now."""
    message = storage_pb2.GroupSnapshot(
        group_id=group.group_id,
        purpose=int(group.purpose),  # type: ignore[arg-type]
        state=int(group.state),  # type: ignore[arg-type]
        drop_reason=int(group.drop_reason or 0),  # type: ignore[arg-type]
        members=[_member_to_proto(member) for member in group.members],
        ended_at=() if group.ended_at is None else Location.of(group.ended_at),
        version=None if group.version is None else codec.version_to_proto(group.version),
        **_kept(group, _GROUP_FIELDS),
    )
    message.issued_at.seconds, message.issued_at.nanos = divmod(group.issued_at_ns, _NANOS)
    return message


def _member_to_proto(member: GroupMember) -> storage_pb2.MemberSnapshot:
    return storage_pb2.MemberSnapshot(
        attempt=member.attempt,
        server_id=member.server_id,
        progress=int(member.progress),  # type: ignore[arg-type]
        records=member.records.packed(),
        versions=[codec.version_to_proto(version) for version in member.versions],
        reward=member.reward,
    )


def group_from_proto(message: storage_pb2.GroupSnapshot) -> Group:
    """The group of a snapshot."""
    purpose = codec.enum_from_proto(Purpose, message.purpose)
    group = Group(message.group_id, message.created, purpose, message.task_index, len(message.members))
    for name in _GROUP_FIELDS:
        setattr(group, name, getattr(message, name))
    group.issued_at_ns = message.issued_at.seconds * _NANOS + message.issued_at.nanos
    group.state = codec.enum_from_proto(GroupState, message.state)
    group.drop_reason = codec.enum_from_proto(DropReason, message.drop_reason) if message.drop_reason else None
    group.version = codec.version_from_proto(message.version) if message.HasField("version") else None
    group.ended_at = Location(*message.ended_at).handle if message.ended_at else None
    for member, stored in zip(group.members, message.members, strict=True):
        member.attempt, member.server_id = stored.attempt, stored.server_id
        member.progress = codec.enum_from_proto(MemberProgress, stored.progress)
        member.records = RecordHandles(stored.records)
        member.versions = tuple(PolicyVersion(v.run, v.epoch, v.step, v.digest) for v in stored.versions)
        member.reward = stored.reward
    return group


def evaluation_to_proto(state: EvaluationState) -> storage_pb2.EvaluationSnapshot:
    """An evaluation as it is now."""
    return storage_pb2.EvaluationSnapshot(
        evaluation=codec.evaluation_to_proto(state.evaluation, 0),
        closed=state.closed,
        tasks=[
            storage_pb2.EvaluatedTask(
                task_index=task_index,
                group_id=group_id,
                ended=task_index in state.outcomes,
                rewards=state.outcomes.get(task_index, ()),
            )
            for task_index, group_id in state.group_ids.items()
        ],
    )


def evaluation_from_proto(message: storage_pb2.EvaluationSnapshot) -> EvaluationState:
    """The evaluation of a snapshot."""
    return EvaluationState(
        codec.evaluation_from_proto(message.evaluation),
        {task.task_index: task.group_id for task in message.tasks},
        {task.task_index: tuple(task.rewards) for task in message.tasks if task.ended},
        message.closed,
    )


def run_to_proto(state: RunState) -> storage_pb2.RunSnapshot:
    """A run's live state as it is now."""
    message = storage_pb2.RunSnapshot(
        spec=codec.spec_to_proto(state.spec),
        groups=[group_to_proto(group) for group in state.groups.unended.values()],
        batches=[
            storage_pb2.BatchSnapshot(step=batch.step, group_ids=batch.group_ids, sealed=batch.sealed)
            for batch in state.batches.values()
        ],
        evaluations=[evaluation_to_proto(evaluation) for evaluation in state.evaluations.values()],
        requeued=state.requeued,
        dropped=[
            replay_pb2.DropCount(reason=int(reason), count=count)  # type: ignore[arg-type]
            for reason, count in state.dropped.items()
        ],
        lost_attempts=[
            storage_pb2.LostAttempts(task_index=task_index, count=count)
            for task_index, count in state.lost_attempts.items()
        ],
        dead_letters=[codec.letter_to_proto(letter) for letter in state.dead_letters.values()],
        rollback=None if state.rollback is None else codec.rollback_to_proto(state.rollback),
        restored_at=None if state.restored_at is None else codec.version_to_proto(state.restored_at),
        incarnations=[
            storage_pb2.Incarnation(incarnation=incarnation, epoch=epoch)
            for incarnation, epoch in state.incarnations.items()
        ],
        drained_servers=[
            storage_pb2.DrainedServer(server_id=server_id, drain=codec.drain_to_proto(drain))
            for server_id, drain in state.drained.items()
        ],
        **_kept(state, _RUN_FIELDS),
    )
    _lineage_to_proto(state.lineage, message)
    return message


def run_from_proto(message: storage_pb2.RunSnapshot, ended: Ended) -> RunState:
    """The run of a snapshot.

    Raises:
        CorruptDataError: the snapshot contradicts itself.
    """
    state = RunState(codec.spec_from_proto(message.spec), ended)
    try:
        _lineage_from_proto(message, state.lineage)
        for stored in message.groups:
            group = group_from_proto(stored)
            state.groups.unended[group.group_id] = group
            live = state.live if group.purpose is Purpose.TRAIN else state.live_evaluation
            live[group.group_id] = group
    except (IndexError, KeyError, AssertionError, ValueError) as error:
        raise CorruptDataError(f"the snapshot of run {message.spec.run!r} contradicts itself: {error!r}") from error
    for name in _RUN_FIELDS:
        setattr(state, name, getattr(message, name))
    state.batches = {kept.step: DrawnBatch(kept.step, tuple(kept.group_ids), kept.sealed) for kept in message.batches}
    for evaluation in map(evaluation_from_proto, message.evaluations):
        state.evaluations[evaluation.evaluation.evaluation_id] = evaluation
    state.requeued.extend(message.requeued)
    for entry in message.dropped:
        state.dropped[codec.enum_from_proto(DropReason, entry.reason)] = entry.count
    state.lost_attempts.update({entry.task_index: entry.count for entry in message.lost_attempts})
    state.dead_letters = {letter.group_id: codec.letter_from_proto(letter) for letter in message.dead_letters}
    state.rollback = codec.rollback_from_proto(message.rollback) if message.HasField("rollback") else None
    state.restored_at = codec.version_from_proto(message.restored_at) if message.HasField("restored_at") else None
    state.incarnations = {entry.incarnation: entry.epoch for entry in message.incarnations}
    state.drained = {entry.server_id: codec.drain_from_proto(entry.drain) for entry in message.drained_servers}
    return state


def _lineage_to_proto(lineage: Lineage, message: storage_pb2.RunSnapshot) -> None:
    places: dict[PolicyVersion, int] = {}
    for version in lineage:
        parent = lineage.parent(version)
        message.versions.add(
            version=codec.version_to_proto(version),
            parent=None if parent is None else places[parent],
            discarded=lineage.is_discarded(version),
        )
        places[version] = len(places)
    message.head = places[lineage.head]


def _lineage_from_proto(message: storage_pb2.RunSnapshot, lineage: Lineage) -> None:
    versions = [codec.version_from_proto(entry.version) for entry in message.versions]
    parents = [versions[entry.parent] if entry.HasField("parent") else None for entry in message.versions]
    discarded = [version for version, entry in zip(versions, message.versions, strict=True) if entry.discarded]
    lineage.restore(dict(zip(versions, parents, strict=True)), discarded, versions[message.head])
