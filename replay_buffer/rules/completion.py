"""Completion: a group whose last member closes becomes READY, or is dropped.

The close and the drop are two records. A crash may keep the first alone, so a restart decides again, before anything is
served: the group is dropped then for the reason it would have been dropped for.
"""

from __future__ import annotations

from collections.abc import Sequence

from leeway.types import DropReason, GroupState, Purpose
from replay_buffer.rules.admission import is_stale
from replay_buffer.rules.groups import Group
from replay_buffer.rules.state import RunState
from replay_buffer.rules.transitions import GroupsDropped


def decide_complete(run: RunState, group: Group, rewards: Sequence[float]) -> GroupsDropped | None:
    """Why a complete training group with these rewards is of no use; None when it is."""
    if group.purpose is not Purpose.TRAIN:
        return None
    if is_stale(run, group):
        message = f"its oldest token is too old for version {run.head}"
        return GroupsDropped((group.group_id,), DropReason.STALE, message)
    if run.spec.drop_no_signal and len(set(rewards)) == 1:
        message = f"the rewards of its {len(rewards)} members are all {rewards[0]:g}"
        return GroupsDropped((group.group_id,), DropReason.NO_SIGNAL, message)
    return None


def decide_after_restart(run: RunState) -> list[GroupsDropped]:
    """Drops whose cause is in the log and that themselves are not."""
    drops: list[GroupsDropped] = []
    for group in [*run.live.values(), *run.live_evaluation.values()]:
        versions = {version for member in group.members for version in member.versions}
        unknown = next((version for version in versions if run.lineage.is_unknown(version)), None)
        if unknown is not None:
            message = f"tokens are labelled with {unknown}, which was never registered"
            drops.append(GroupsDropped((group.group_id,), DropReason.UNKNOWN_VERSION, message))
        elif group.purpose is Purpose.TRAIN and any(run.lineage.is_discarded(version) for version in versions):
            message = "versions that a rollback discarded sampled tokens of it"
            drops.append(GroupsDropped((group.group_id,), DropReason.ROLLED_BACK, message))
        elif group.state is GroupState.READY:
            drop = decide_complete(run, group, [member.reward for member in group.members])
            drops += [] if drop is None else [drop]
    return drops
