"""Runs, tickets, evaluations, and the answers of the replay buffer about them."""

from __future__ import annotations

from typing import Final

from leeway.codec.basics import (
    duration_to_proto,
    enum_from_proto,
    seconds_from_proto,
    timestamp_from_proto,
    timestamp_to_proto,
)
from leeway.codec.policies import (
    sampling_from_proto,
    sampling_to_proto,
    signature_from_proto,
    signature_to_proto,
    version_from_proto,
    version_to_proto,
)
from leeway.errors import InvalidDataError
from leeway.types import (
    DeadLetter,
    Drain,
    DrainReason,
    DropReason,
    Evaluation,
    GroupState,
    Purpose,
    Rollback,
    RunSpec,
    RunStatus,
    ServerStatus,
    Ticket,
    TicketMember,
)
from leeway.v1 import replay_pb2

_MOST: Final = {
    "groups_per_step": 1 << 16,
    "members": 1 << 12,
    "total_steps": 1 << 48,
    "train_task_count": 1 << 22,
    "max_attempts": 1 << 31,
}
"""Largest numbers of a run. What a caller makes the buffer hold at once is a product of the first two, and the order of
its tasks, four bytes for each."""
_MOST_TASKS: Final = 1 << 32
"""Largest number of tasks of an evaluation."""


def spec_to_proto(spec: RunSpec) -> replay_pb2.RunSpec:
    return replay_pb2.RunSpec(
        run=spec.run,
        groups_per_step=spec.groups_per_step,
        members=spec.members,
        max_staleness=spec.max_staleness,
        total_steps=spec.total_steps,
        seed=spec.seed,
        train_task_count=spec.train_task_count,
        sampling=sampling_to_proto(spec.sampling),
        signature=signature_to_proto(spec.signature),
        dataset_digest=spec.dataset_digest,
        root=version_to_proto(spec.root),
        max_attempts=spec.max_attempts,
        drop_no_signal=spec.drop_no_signal,
    )


def spec_from_proto(message: replay_pb2.RunSpec) -> RunSpec:
    for name, most in _MOST.items():
        if not 1 <= getattr(message, name) <= most:
            raise InvalidDataError(f"run {message.run!r}: {name} must be between 1 and {most}")
    if message.max_staleness > _MOST["total_steps"]:
        raise InvalidDataError(f"run {message.run!r}: max_staleness must be at most {_MOST['total_steps']}")
    if message.drop_no_signal and message.members < 2:
        raise InvalidDataError(f"run {message.run!r}: groups of one member never have a signal; unset drop_no_signal")
    root = version_from_proto(message.root)
    if root.run != message.run or root.epoch or root.step:
        raise InvalidDataError(f"run {message.run!r}: the root version must be epoch 0, step 0 of the same run")
    return RunSpec(
        run=message.run,
        groups_per_step=message.groups_per_step,
        members=message.members,
        max_staleness=message.max_staleness,
        total_steps=message.total_steps,
        seed=message.seed,
        train_task_count=message.train_task_count,
        sampling=sampling_from_proto(message.sampling),
        signature=signature_from_proto(message.signature),
        dataset_digest=message.dataset_digest,
        root=root,
        max_attempts=message.max_attempts,
        drop_no_signal=message.drop_no_signal,
    )


def ticket_to_proto(ticket: Ticket) -> replay_pb2.Ticket:
    return replay_pb2.Ticket(
        group_id=ticket.group_id,
        attempt=ticket.attempt,
        purpose=int(ticket.purpose),  # type: ignore[arg-type]
        task_index=ticket.task_index,
        members=[
            replay_pb2.TicketMember(trajectory_id=member.trajectory_id, member=member.member, seed=member.seed)
            for member in ticket.members
        ],
        sampling=sampling_to_proto(ticket.sampling),
        lease=duration_to_proto(ticket.lease_seconds),
        pinned_version=None if ticket.pinned_version is None else version_to_proto(ticket.pinned_version),
        evaluation_id=ticket.evaluation_id,
    )


def ticket_from_proto(message: replay_pb2.Ticket) -> Ticket:
    return Ticket(
        group_id=message.group_id,
        attempt=message.attempt,
        purpose=enum_from_proto(Purpose, message.purpose),
        task_index=message.task_index,
        members=tuple(TicketMember(member.trajectory_id, member.member, member.seed) for member in message.members),
        sampling=sampling_from_proto(message.sampling),
        lease_seconds=seconds_from_proto(message.lease),
        pinned_version=version_from_proto(message.pinned_version) if message.HasField("pinned_version") else None,
        evaluation_id=message.evaluation_id,
    )


def evaluation_to_proto(evaluation: Evaluation, epoch: int) -> replay_pb2.CreateEvaluationRequest:
    return replay_pb2.CreateEvaluationRequest(
        run=evaluation.version.run,
        epoch=epoch,
        evaluation_id=evaluation.evaluation_id,
        version=version_to_proto(evaluation.version),
        task_count=evaluation.task_count,
        members=evaluation.members,
        sampling=sampling_to_proto(evaluation.sampling),
    )


def evaluation_from_proto(message: replay_pb2.CreateEvaluationRequest) -> Evaluation:
    if not message.evaluation_id or message.task_count < 1 or message.members < 1:
        raise InvalidDataError("an evaluation needs an id, at least one task and at least one member")
    if message.task_count > _MOST_TASKS or message.members > _MOST["members"]:
        most = f"{_MOST_TASKS} tasks and {_MOST['members']} members"
        raise InvalidDataError(f"evaluation {message.evaluation_id!r} is too large: at most {most}")
    return Evaluation(
        message.evaluation_id,
        version_from_proto(message.version),
        message.task_count,
        message.members,
        sampling_from_proto(message.sampling),
    )


def status_to_proto(status: RunStatus) -> replay_pb2.GetRunStatusResponse:
    return replay_pb2.GetRunStatusResponse(
        spec=spec_to_proto(status.spec),
        epoch=status.epoch,
        head=version_to_proto(status.head),
        committed_step=status.committed_step,
        finished=status.finished,
        issued=status.issued,
        open=status.open,
        ready=status.ready,
        drawn=status.drawn,
        consumed=status.consumed,
        dropped=[
            replay_pb2.DropCount(reason=int(reason), count=count)  # type: ignore[arg-type]
            for reason, count in sorted(status.dropped.items())
        ],
        rollback=None if status.rollback is None else rollback_to_proto(status.rollback),
        dead_letters=status.dead_letters,
    )


def status_from_proto(message: replay_pb2.GetRunStatusResponse) -> RunStatus:
    return RunStatus(
        spec=spec_from_proto(message.spec),
        epoch=message.epoch,
        head=version_from_proto(message.head),
        committed_step=message.committed_step,
        finished=message.finished,
        issued=message.issued,
        open=message.open,
        ready=message.ready,
        drawn=message.drawn,
        consumed=message.consumed,
        dropped={enum_from_proto(DropReason, entry.reason): entry.count for entry in message.dropped},
        rollback=rollback_from_proto(message.rollback) if message.HasField("rollback") else None,
        dead_letters=message.dead_letters,
    )


def rollback_to_proto(rollback: Rollback) -> replay_pb2.Rollback:
    return replay_pb2.Rollback(version=version_to_proto(rollback.version), epoch=rollback.epoch)


def rollback_from_proto(message: replay_pb2.Rollback) -> Rollback:
    return Rollback(version_from_proto(message.version), message.epoch)


def letter_to_proto(letter: DeadLetter) -> replay_pb2.DeadLetter:
    return replay_pb2.DeadLetter(
        group_id=letter.group_id,
        task_index=letter.task_index,
        reason=int(letter.reason),  # type: ignore[arg-type]
        message=letter.message,
        attempts=letter.attempts,
        server_id=letter.server_id,
    )


def letter_from_proto(message: replay_pb2.DeadLetter) -> DeadLetter:
    return DeadLetter(
        message.group_id,
        message.task_index,
        enum_from_proto(DropReason, message.reason),
        message.message,
        message.attempts,
        message.server_id,
    )


def drain_to_proto(drain: Drain) -> replay_pb2.Drain:
    return replay_pb2.Drain(
        reason=int(drain.reason),  # type: ignore[arg-type]
        message=drain.message,
        drained_at=timestamp_to_proto(drain.drained_at),
    )


def drain_from_proto(message: replay_pb2.Drain) -> Drain:
    reason = enum_from_proto(DrainReason, message.reason)
    return Drain(reason, message.message, timestamp_from_proto(message.drained_at))


def server_status_to_proto(status: ServerStatus) -> replay_pb2.ServerStatus:
    return replay_pb2.ServerStatus(
        server_id=status.server_id,
        present=status.present,
        drained=None if status.drained is None else drain_to_proto(status.drained),
        version=None if status.version is None else version_to_proto(status.version),
        tickets=status.tickets,
        oldest_ticket=duration_to_proto(status.oldest_ticket_seconds),
        timed_tickets=status.timed_tickets,
        median_ticket=duration_to_proto(status.median_ticket_seconds),
    )


def server_status_from_proto(message: replay_pb2.ServerStatus) -> ServerStatus:
    return ServerStatus(
        server_id=message.server_id,
        present=message.present,
        drained=drain_from_proto(message.drained) if message.HasField("drained") else None,
        version=version_from_proto(message.version) if message.HasField("version") else None,
        tickets=message.tickets,
        oldest_ticket_seconds=seconds_from_proto(message.oldest_ticket),
        timed_tickets=message.timed_tickets,
        median_ticket_seconds=seconds_from_proto(message.median_ticket),
    )


def optional_state(number: int) -> GroupState | None:
    """A state filter; 0 means none."""
    return enum_from_proto(GroupState, number) if number else None


def optional_purpose(number: int) -> Purpose | None:
    """A purpose filter; 0 means none."""
    return enum_from_proto(Purpose, number) if number else None
