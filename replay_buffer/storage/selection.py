"""Which groups of a run match a filter: those in memory and those of the index, joined in the order of issue."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge

from leeway.errors import NotFoundError
from leeway.types import Purpose
from replay_buffer.rules.state import RunState
from replay_buffer.storage.index_file import Filter
from replay_buffer.storage.run_index import RunIndex


def check_kept(state: RunState, wanted: Filter) -> None:
    """Say so when what a step trained on is no longer there, instead of giving less.

    Raises:
        NotFoundError: groups of the step have been retired.
    """
    step, ended = wanted.step, state.ended
    assert isinstance(ended, RunIndex)
    if not 0 < step <= state.committed_step or wanted.purpose is Purpose.EVAL:
        return
    if len(state.batch(step)) < state.spec.groups_per_step:
        kept = ended.first_whole_step(state.spec.groups_per_step)
        there = (
            "no committed step's groups are left" if kept is None else f"those of step {kept} and later are still there"
        )
        raise NotFoundError(
            f"run {state.spec.run!r}: the groups that step {step} trained on have been retired from the log "
            f"([replay_buffer] retain_bytes, retain_seconds); {there}"
        )


def select(state: RunState, wanted: Filter, limit: int = 0) -> Iterator[str]:
    """Ids of matching groups, in the order of issue; a limit keeps the newest.

    What is live at the first call is listed by what it was then, whatever becomes of it while the rest is read.
    """
    ended = state.ended
    assert isinstance(ended, RunIndex)
    unended = {group.created: group for group in state.groups.unended.values()}
    live = sorted(created for created, group in unended.items() if wanted.matches(group))
    older = (created for created in ended.created(wanted, newest=limit) if created not in unended)
    if not limit:
        yield from (ended.group_id(created) for created in merge(older, live))
        return
    newest = sorted([*older, *live])[-limit:]
    yield from (ended.group_id(created) for created in newest)
