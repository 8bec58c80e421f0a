"""A group at one moment: what a draw or an export is streamed from, while the state moves on."""

from __future__ import annotations

from dataclasses import dataclass

from leeway.types import DropReason, GroupState, Purpose
from replay_buffer.rules.groups import Group, Location, Progress


@dataclass(frozen=True, slots=True)
class MemberView:
    """One trajectory: its chunks' places in the log, then the place of its close or failure."""

    trajectory_id: str
    member: int
    attempt: int
    server_id: str
    progress: Progress
    chunks: tuple[Location, ...]
    ending: Location | None


@dataclass(frozen=True, slots=True)
class GroupView:
    """One group with its fate."""

    group_id: str
    purpose: Purpose
    task_index: int
    state: GroupState
    drop_reason: DropReason | None
    drop_message: str
    step: int
    evaluation_id: str
    issued_at_ns: int
    members: tuple[MemberView, ...]


def view_group(group: Group) -> GroupView:
    """Freeze a group as it is now."""
    members: list[MemberView] = []
    for index, member in enumerate(group.members):
        records = tuple(member.records)
        ending = None if member.progress is Progress.OPEN else records[-1]
        members.append(
            MemberView(
                trajectory_id=member.trajectory_id,
                member=index,
                attempt=member.attempt,
                server_id=member.server_id,
                progress=member.progress,
                chunks=records[: member.chunk_count],
                ending=ending,
            )
        )
    return GroupView(
        group_id=group.group_id,
        purpose=group.purpose,
        task_index=group.task_index,
        state=group.state,
        drop_reason=group.drop_reason,
        drop_message=group.drop_message,
        step=group.step,
        evaluation_id=group.evaluation_id,
        issued_at_ns=group.issued_at_ns,
        members=tuple(members),
    )
