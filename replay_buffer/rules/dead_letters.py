"""Dead letters: groups that were set aside, until a person queues their tasks again.

lost lease, failure ──> issued again ──> ... max_attempts tickets of one task ──> DROPPED (dead_letter)
failed, invalid, conflict, unknown_version ──> DROPPED at once: another attempt would end the same way
                                                    │
RequeueDeadLetters ── the task as a new group, with all its tries <──┘   the old group stays as it is
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from leeway.errors import NotFoundError, PreconditionError
from leeway.types import DeadLetter
from replay_buffer.rules.lifecycle import check_live
from replay_buffer.rules.state import RunState
from replay_buffer.rules.transitions import DeadLettersRequeued

MOST_LISTED: Final = 10_000
"""Dead letters of one answer: it has to fit into a message."""
_AT_ONCE: Final = 4096
"""Of one transition: it has to fit into a record."""


def list_dead_letters(run: RunState, limit: int = 0) -> list[DeadLetter]:
    """Dead letters, oldest first; a limit keeps the newest.

    The newest are in memory. Older ones come before them, in the order of issue, as long as their groups are kept.
    """
    limit = min(limit or MOST_LISTED, MOST_LISTED)
    kept = list(run.dead_letters.values())
    if len(kept) >= min(limit, run.dead_letter_count):
        return kept[-limit:]
    older = [group.letter() for group in run.ended.dead_letters(limit) if group.group_id not in run.dead_letters]
    return [*older, *kept][-limit:]


def decide_requeue(run: RunState, group_ids: Sequence[str]) -> DeadLettersRequeued | None:
    """Queue tasks again; None when they have been.

    Raises:
        NotFoundError: no such group.
        PreconditionError: a group is no dead letter, or the run has finished.
    """
    check_live(run)
    tasks: dict[str, int] = {}
    for group_id in group_ids:
        if (letter := run.dead_letters.get(group_id)) is not None:
            tasks[group_id] = letter.task_index
            continue
        group = run.groups.get(group_id)
        if group is None:
            raise NotFoundError(
                f"run {run.spec.run!r} has no group {group_id!r}; `leeway buffer dead-letters` lists them"
            )
        if group.is_dead_letter:
            tasks[group_id] = group.task_index
        elif not group.requeued:
            raise PreconditionError(
                f"group {group_id} is no dead letter: it is {group.state.name.lower()}"
                f"{'' if group.drop_reason is None else f' ({group.drop_reason.name.lower()})'}"
            )
    return DeadLettersRequeued(tuple(tasks), tuple(tasks.values())) if tasks else None


def decide_requeue_all(run: RunState) -> DeadLettersRequeued | None:
    """Queue as many tasks again as one transition takes; None when none is left. The last one says that it is."""
    check_live(run)
    if not run.dead_letter_count:
        return None
    listed = list_dead_letters(run)
    chosen = listed[-_AT_ONCE:]
    return DeadLettersRequeued(
        tuple(letter.group_id for letter in chosen),
        tuple(letter.task_index for letter in chosen),
        is_all=len(chosen) == len(listed),
    )
