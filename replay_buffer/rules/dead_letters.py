"""Dead letters: groups that were set aside, until a person queues their tasks again.

lost lease, failure ──> lent again ──> ... max_attempts tickets of one task ──> DROPPED (dead_letter)
failed, invalid, conflict, unknown_version ──> DROPPED at once: another attempt would end the same way
                                                    │
RequeueDeadLetters ── the task as a new group, with all its tries <──┘   the old group stays as it is
"""

from __future__ import annotations

from collections.abc import Sequence

from leeway.errors import NotFoundError, PreconditionError
from leeway.types import Purpose
from replay_buffer.rules.lifecycle import check_live
from replay_buffer.rules.state import SET_ASIDE, RunState
from replay_buffer.rules.transitions import DeadLettersRequeued


def decide_requeue(run: RunState, group_ids: Sequence[str]) -> DeadLettersRequeued | None:
    """Queue tasks again, of all dead letters when none is named; None when nothing is left to queue.

    Raises:
        NotFoundError: no such group.
        PreconditionError: a group is no dead letter, or the run has finished.
    """
    check_live(run)
    name = run.spec.run
    for group_id in group_ids:
        if group_id in run.dead_letters:
            continue
        group = run.groups.get(group_id)
        if group is None:
            raise NotFoundError(f"run {name!r} has no group {group_id!r}; `leeway buffer dead-letters` lists them")
        if group.purpose is not Purpose.TRAIN or group.drop_reason not in SET_ASIDE:
            raise PreconditionError(
                f"group {group_id} is no dead letter: it is {group.state.name.lower()}"
                f"{'' if group.drop_reason is None else f' ({group.drop_reason.name.lower()})'}"
            )
    wanted = dict.fromkeys(group_ids or run.dead_letters)
    chosen = tuple(group_id for group_id in wanted if group_id in run.dead_letters)
    return DeadLettersRequeued(chosen) if chosen else None
