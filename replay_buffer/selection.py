"""Which groups of a run match a filter: those in memory and those of the index, joined in the order of issue."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge

from replay_buffer.index import Filter, RunIndex
from replay_buffer.state import RunState


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
